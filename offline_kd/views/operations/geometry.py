"""Operations that move pixels: each takes an RGB image and a magnitude, and gives one of the same size."""

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from offline_kd.views.erase import GREY


def shear_x(image: Image.Image, magnitude: float) -> Image.Image:
    """Rows are shifted by `magnitude` of their distance to the top."""
    return _warped(image, [0, 0], [_degrees(magnitude), 0.0], center=[0, 0])


def shear_y(image: Image.Image, magnitude: float) -> Image.Image:
    """Columns are shifted by `magnitude` of their distance to the left."""
    return _warped(image, [0, 0], [0.0, _degrees(magnitude)], center=[0, 0])


def translate_x(image: Image.Image, magnitude: float) -> Image.Image:
    """To the right by `magnitude` of the side."""
    return _warped(image, [round(magnitude * image.width), 0], [0.0, 0.0])


def translate_y(image: Image.Image, magnitude: float) -> Image.Image:
    """Down by `magnitude` of the side."""
    return _warped(image, [0, round(magnitude * image.width)], [0.0, 0.0])


def rotate(image: Image.Image, magnitude: float) -> Image.Image:
    """By `magnitude` degrees around the middle."""
    return TF.rotate(image, magnitude, interpolation=InterpolationMode.BILINEAR, fill=list(GREY))


def _degrees(slope: float) -> float:
    return float(np.degrees(np.arctan(slope)))


def _warped(
    image: Image.Image, translate: list[int], shear: list[float], center: list[int] | None = None
) -> Image.Image:
    return TF.affine(
        image,
        angle=0.0,
        translate=translate,
        scale=1.0,
        shear=shear,
        interpolation=InterpolationMode.BILINEAR,
        fill=list(GREY),
        center=center,
    )
