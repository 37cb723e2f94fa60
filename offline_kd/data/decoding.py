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


def decode(encoded: bytes, scale: int = 1) -> Decoded:
    """What `decode_image` gives, and where it lies: a scaled image has ceil(side / scale) pixels.

    The last one reaches beyond the image, or the first one where the image was turned. What libjpeg fills it up with
    is what the encoder has put there.
    """
    pixels, before = np.array(decode_image(encoded, scale)), (0, 0)
    if scale > 1:
        with _open_image(encoded) as image:
            rows, columns = REVERSED.get(_orientation(image), (False, False))
        height, width = image_size(encoded)
        before = (-height % scale if rows else 0, -width % scale if columns else 0)
    return Decoded(pixels, scale, before)


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


def decode_image(encoded: bytes, scale: int = 1) -> Image.Image:
    """The RGB image that an image file means, by the rules above; raises one of UNDECODABLE.

    Args:
        scale: of SCALES, for what `is_scalable`: the image at 1/scale.
    """
    upright: Image.Image = _open_image(encoded)
    if scale > 1:
        if min(upright.size) < scale:
            raise ValueError(f"{upright.width}x{upright.height} pixels cannot be decoded at 1/{scale}")
        upright.draft(None, (upright.width // scale, upright.height // scale))
    turn = UPRIGHT.get(_orientation(upright))
    upright.load()
    if turn is not None:  # not by exif_transpose: it writes the other tags again, and fails on damaged ones
        upright = upright.transpose(turn)
    if upright.mode == "RGB" and "transparency" not in upright.info:
        return upright
    if upright.mode.startswith("I"):
        return Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        over = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return upright.convert("RGB")


def image_size(encoded: bytes) -> tuple[int, int]:
    """Height and width of the upright image, without decoding it."""
    with _open_image(encoded) as image:
        turned = _orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """As EXIF has it, which may be anything."""
    orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def _open_image(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are read, {MAX_SIDE} a side")
    return image
