"""What an image file means, whatever wrote it: 8-bit RGB pixels.

Turned upright as its EXIF orientation says; grey is repeated, CMYK and palettes are converted, of 16 bits the upper 8
count, and what is transparent is laid over white. Images of up to MAX_PIXELS pixels and sides up to 32,767 are read;
larger, cut and unreadable ones are bad images.
"""

import io

import numpy as np
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

# Pillow warns of images that are read here. Its limit is raised once: filters of warnings, put and taken away by
# several threads, may stay behind. None, somebody's wish for no limit, is left alone.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)


def decode_image(encoded: bytes) -> Image.Image:
    """The RGB image that an image file means, by the rules above; raises one of UNDECODABLE."""
    upright: Image.Image = _open_image(encoded)
    turn = UPRIGHT.get(upright.getexif().get(ExifTags.Base.Orientation, 1))
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
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _open_image(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are read, {MAX_SIDE} a side")
    return image
