"""What `view/op` numbers: operations on the colours and the geometry of a view, one row each.

A code is what stores hold, so it never moves, and none is used again. A new operation takes the next one; recipes name
it in `operations` of RandAugment and TrivialAugment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pkgutil import resolve_name

from PIL import Image

Apply = Callable[[Image.Image, float], Image.Image]  # an RGB image and a magnitude: an RGB image of the same size


@dataclass(frozen=True)
class Op:
    """One operation. Its magnitude at strength s of 0 to 1 is `start + s * full`.

    `apply` names a module of this folder and its function, which is imported when a view is rendered: torchvision
    takes as long as torch itself, and most commands never get here.
    """

    code: int  # what stores hold
    apply: str  # module:function
    full: tuple[float, float] = (0, 0)  # change at full strength: RandAugment's, TrivialAugment's
    start: float = 0
    signed: bool = False  # half of the views take `start - s * full`
    whole: bool = False  # the change is rounded to a whole number


OPERATIONS: dict[str, Op] = {
    "identity": Op(0, "colour:identity"),
    "shear_x": Op(1, "geometry:shear_x", (0.3, 0.99), signed=True),
    "shear_y": Op(2, "geometry:shear_y", (0.3, 0.99), signed=True),
    "translate_x": Op(3, "geometry:translate_x", (150 / 331, 32 / 224), signed=True),  # of the side
    "translate_y": Op(4, "geometry:translate_y", (150 / 331, 32 / 224), signed=True),
    "rotate": Op(5, "geometry:rotate", (30, 135), signed=True),  # degrees
    "brightness": Op(6, "colour:brightness", (0.9, 0.99), start=1, signed=True),
    "color": Op(7, "colour:saturation", (0.9, 0.99), start=1, signed=True),
    "contrast": Op(8, "colour:contrast", (0.9, 0.99), start=1, signed=True),
    "sharpness": Op(9, "colour:sharpness", (0.9, 0.99), start=1, signed=True),
    "posterize": Op(10, "colour:posterize", (-4, -6), start=8, whole=True),  # bits
    "solarize": Op(11, "colour:solarize", (-255, -255), start=255),  # threshold
    "autocontrast": Op(12, "colour:autocontrast"),
    "equalize": Op(13, "colour:equalize"),
    "invert": Op(14, "colour:invert"),
    "grayscale": Op(15, "colour:grayscale"),
    "blur": Op(16, "colour:blur"),
    "hue": Op(17, "colour:hue"),
    "shear_x_nearest": Op(18, "geometry:shear_x_nearest", (0.3, 0.99), signed=True),
    "shear_y_nearest": Op(19, "geometry:shear_y_nearest", (0.3, 0.99), signed=True),
    "translate_x_nearest": Op(20, "geometry:translate_x_nearest", (150 / 331, 32 / 224), signed=True),
    "translate_y_nearest": Op(21, "geometry:translate_y_nearest", (150 / 331, 32 / 224), signed=True),
    "rotate_nearest": Op(22, "geometry:rotate_nearest", (30, 135), signed=True),
}
FIRST_CODES = 18  # operations that every store's metadata names


def operation_name(code: int) -> str:
    """The name of the operation that a store numbers so."""
    return _names()[code]


def apply_op(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """An RGB image after one operation, with its magnitude in the operation's own unit."""
    return _function(OPERATIONS[name].apply)(image, magnitude)


@cache
def _names() -> dict[int, str]:
    return {op.code: name for name, op in OPERATIONS.items()}


@cache
def _function(where: str) -> Apply:
    function: Apply = resolve_name(f"{__name__}.{where}")
    return function
