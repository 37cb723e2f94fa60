"""Operations that move pixels: each takes an RGB image and a magnitude, and gives one of the same size.

Each is there twice: with bilinear resampling and ImageNet's mean colour behind the edge, and, called `nearest`, with
the nearest pixel and black behind the edge, as torchvision's RandAugment has it by default.
"""

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from offline_kd.views.erase import GREY

BLACK = (0, 0, 0)


def shear_x(image: Image.Image, magnitude: float) -> Image.Image:
    """Rows are shifted by `magnitude` of their distance to the top."""
    return _warped(image, [0, 0], [_degrees(magnitude), 0.0], center=[0, 0])


def shear_x_nearest(image: Image.Image, magnitude: float) -> Image.Image:
    """The same without interpolation."""
    return _warped(image, [0, 0], [_degrees(magnitude), 0.0], center=[0, 0], nearest=True)


def shear_y(image: Image.Image, magnitude: float) -> Image.Image:
    """Columns are shifted by `magnitude` of their distance to the left."""
    return _warped(image, [0, 0], [0.0, _degrees(magnitude)], center=[0, 0])


def shear_y_nearest(image: Image.Image, magnitude: float) -> Image.Image:
    """The same without interpolation."""
    return _warped(image, [0, 0], [0.0, _degrees(magnitude)], center=[0, 0], nearest=True)


def translate_x(image: Image.Image, magnitude: float) -> Image.Image:
    """To the right by `magnitude` of the side."""
    return _warped(image, [round(magnitude * image.width), 0], [0.0, 0.0])


def translate_x_nearest(image: Image.Image, magnitude: float) -> Image.Image:
    """The same with black behind the edge."""
    return _warped(image, [round(magnitude * image.width), 0], [0.0, 0.0], nearest=True)


def translate_y(image: Image.Image, magnitude: float) -> Image.Image:
    """Down by `magnitude` of the side."""
    return _warped(image, [0, round(magnitude * image.width)], [0.0, 0.0])


def translate_y_nearest(image: Image.Image, magnitude: float) -> Image.Image:
    """The same with black behind the edge."""
    return _warped(image, [0, round(magnitude * image.width)], [0.0, 0.0], nearest=True)


def rotate(image: Image.Image, magnitude: float) -> Image.Image:
    """By `magnitude` degrees around the middle."""
    return TF.rotate(image, magnitude, interpolation=InterpolationMode.BILINEAR, fill=list(GREY))


def rotate_nearest(image: Image.Image, magnitude: float) -> Image.Image:
    """The same without interpolation."""
    return TF.rotate(image, magnitude, interpolation=InterpolationMode.NEAREST, fill=list(BLACK))


def _degrees(slope: float) -> float:
    return float(np.degrees(np.arctan(slope)))


def _warped(
    image: Image.Image,
    translate: list[int],
    shear: list[float],
    center: list[int] | None = None,
    *,
    nearest: bool = False,
) -> Image.Image:
    return TF.affine(
        image,
        angle=0.0,
        translate=translate,
        scale=1.0,
        shear=shear,
        interpolation=InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR,
        fill=list(BLACK if nearest else GREY),
        center=center,
    )
