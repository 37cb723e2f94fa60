"""What an image file means, whatever wrote it: 8-bit RGB pixels.

Turned upright as its EXIF orientation says; grey is repeated, CMYK and palettes are converted, of 16 bits the upper 8
count, and what is transparent is laid over white. Images of up to MAX_PIXELS pixels and sides up to 32,767 are read;
larger, cut and unreadable ones are bad images.

JPEGs can also be decoded at 1/2, 1/4 or 1/8 of their size, which costs less than decoding and shrinking them: libjpeg
leaves away the high frequencies of every 8 x 8 block, in whole numbers, the same with any instruction set.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

MAX_PIXELS = 2**27
MAX_SIDE = 2**15 - 1
UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)
UPRIGHT = {  # EXIF orientation -> how the pixels get upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# EXIF orientation -> whether rows and columns of the upright image run against those of the file
REVERSED = {
    2: (False, True),
    3: (True, True),
    4: (True, False),
    6: (False, True),
    7: (True, True),
    8: (True, False),
}
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")  # modes with an alpha channel
SCALES = (8, 4, 2)  # a JPEG can be decoded at 1/scale

# Pillow warns of images that are read here. Its limit is raised once: filters of warnings, put and taken away by
# several threads, may stay behind. None, somebody's wish for no limit, is left alone.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)


@dataclass(frozen=True)
class Decoded:
    """The pixels of an image file, whole or at 1/scale."""

    pixels: NDArray[np.uint8]  # [h, w, 3], upright
    scale: int
    before: tuple[int, int]  # rows above and columns left of the image, in pixels of the file, that they begin with

    def box(self, box: NDArray[Any]) -> NDArray[Any]:
        """`[4]` top, left, height, width in these pixels, of a box in pixels of the file; in parts of 1/scale."""
        return box if self.scale == 1 else (box + np.array([*self.before, 0, 0])) / self.scale


def is_scalable(encoded: bytes) -> bool:
    """Whether a file can be decoded at 1/scale: JPEGs of blocks of frequencies, which lossless ones have not."""
    at = 2
    while encoded[:2] == b"\xff\xd8" and encoded[at : at + 1] == b"\xff" and at + 4 <= len(encoded):
        marker = encoded[at + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            return True
        if marker not in (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)):  # tables, comments and applications' segments
            return False
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4])
    return False


def decode_image(encoded: bytes) -> Image.Image:
    """The RGB image that an image file means, by the rules above; raises one of UNDECODABLE."""
    return upright_rgb(_open_image(encoded))


def upright_rgb(image: Image.Image) -> Image.Image:
    """The same of an image that Pillow has opened, in any mode."""
    return _upright_rgb(image, _orientation(image))


def decode(encoded: bytes, scale: int = 1) -> Decoded:
    """The same as pixels, and at 1/scale for a scale of SCALES and what `is_scalable`: of ceil(side / scale) pixels.

    The last one of a side reaches beyond the image, or the first one where the image was turned. There libjpeg shows
    what the encoder has filled its last block up with.
    """
    image = _open_image(encoded)
    orientation = _orientation(image)
    height, width = _upright_size(image, orientation)
    if scale > 1:
        if min(image.size) < scale:
            raise ValueError(f"{image.width}x{image.height} pixels cannot be decoded at 1/{scale}")
        image.draft(None, (image.width // scale, image.height // scale))
    rows, columns = REVERSED.get(orientation, (False, False))
    before = (-height % scale if rows else 0, -width % scale if columns else 0)
    return Decoded(np.array(_upright_rgb(image, orientation)), scale, before)


def image_size(encoded: bytes) -> tuple[int, int]:
    """Height and width of the upright image, without decoding it."""
    with _open_image(encoded) as image:
        return _upright_size(image, _orientation(image))


def seen_otherwise(encoded: bytes) -> str:
    """Why programs that open images and say `convert("RGB")` see other pixels of a file than these; "" if they do not.

    So do torchvision's folders of images.
    """
    try:
        with _open_image(encoded) as image:
            orientation = _orientation(image)
            if orientation in UPRIGHT:
                return f"the image is turned by its EXIF orientation ({orientation}), which other programs ignore"
            if image.mode.startswith("I"):
                return "the image has 16 bits, of which other programs keep others"
            if image.mode in TRANSPARENT or "transparency" in image.info:
                return "the image is transparent, and other programs do not lay it over white"
    except UNDECODABLE as error:
        return f"the image cannot be read ({' '.join(str(error).split())[:80]})"
    return ""


def _orientation(image: Image.Image) -> int:
    """As EXIF has it, which may be anything."""
    orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    return (image.width, image.height) if orientation in (5, 6, 7, 8) else (image.height, image.width)


def _upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    turn = UPRIGHT.get(orientation)
    image.load()
    if turn is not None:  # not by exif_transpose: it writes the other tags again, and fails on damaged ones
        image = image.transpose(turn)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in TRANSPARENT or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _open_image(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are read, {MAX_SIDE} a side")
    return image
