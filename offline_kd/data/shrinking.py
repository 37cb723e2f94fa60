"""Pictures of many more pixels than networks see, made smaller once, when they are packed."""

import io

import numpy as np
from PIL import Image

from offline_kd.data.decoding import SCALES, decode, image_size, is_scalable

JPEG_QUALITY = 95


def shrunk_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width in pixels of a picture of this size when its shorter side is made `side`; never more."""
    shorter = min(size)
    if shorter <= side:
        return size
    return round(size[0] * side / shorter), round(size[1] * side / shorter)


def shrink(encoded: bytes, side: int) -> bytes:
    """A JPEG of a picture that is larger, with a shorter side of `side` pixels, upright and in RGB.

    A JPEG is decoded at 1/2, 1/4 or 1/8 as long as it still has twice the pixels a side; the rest is done by Lanczos
    resampling. Other versions of Pillow may write other bytes. Raises one of UNDECODABLE.
    """
    size = image_size(encoded)
    height, width = shrunk_size(size, side)
    scale = next((one for one in SCALES if min(size) >= 2 * one * side), 1) if is_scalable(encoded) else 1
    decoded = decode(encoded, scale)
    top, left, rows, columns = decoded.box(np.array([0, 0, *size])).tolist()
    whole = (left, top, left + columns, top + rows)
    image = Image.fromarray(decoded.pixels).resize((width, height), Image.Resampling.LANCZOS, whole)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
