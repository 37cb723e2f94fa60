"""Which operations a view gets, with which magnitudes."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from offline_kd.support.errors import did_you_mean
from offline_kd.support.strict import Strict
from offline_kd.views.kind import AUGMENT, JITTER, Uniform, ViewArray
from offline_kd.views.operations import FIRST_CODES, OPERATIONS, operation_name

# The operations of RandAugment and TrivialAugment, in the order in which they are drawn.
FOURTEEN = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
THREE = ("grayscale", "solarize", "blur")
JITTERED = ("brightness", "contrast", "color", "hue")

Drawn = tuple[NDArray[np.int64], NDArray[np.float64]]  # codes and magnitudes of one operation of every view, `[n, v]`


def _known(names: list[str] | None) -> list[str] | None:
    for name in names or []:
        if name not in OPERATIONS:
            raise ValueError(f"unknown operation '{name}'.{did_you_mean(name, OPERATIONS)}")
    return names


# Not written where it is absent: stores and fingerprints from before there was a choice stay what they are.
Operations = Annotated[
    Annotated[list[str], Field(min_length=1)] | None,
    AfterValidator(_known),
    Field(exclude_if=lambda names: names is None, description="that one is drawn from; by default the paper's 14"),
]


class RandAugment(Strict):
    """`num_ops` of 14 operations, one after the other (Cubuk et al. 2020, arXiv:1909.13719).

    `magnitude` is the share of each operation's full strength: 9 of 30 in torchvision, 9 of 10 in timm's `rand-m9`.
    """

    kind: Literal["randaugment"]
    num_ops: int = Field(2, ge=1, le=8, description="operations of a view")
    magnitude: float = Field(0.3, ge=0, le=1, description="share of each operation's full strength")
    magnitude_std: float = Field(0, ge=0, le=1, description="standard deviation of the magnitude, from view to view")
    probability: float = Field(1, ge=0, le=1, description="that an operation is applied")
    operations: Operations = None

    @property
    def num_places(self) -> int:
        """Places for operations that every view has."""
        return self.num_ops

    def codes(self) -> list[int]:
        """Of the operations that may be drawn."""
        return codes_of(self.operations or FOURTEEN)

    def draw(self, uniform: Uniform) -> list[Drawn]:
        """Code and magnitude for each place; the identity where none is applied."""
        from scipy import special  # only where it is needed, because it takes its time

        drawn = []
        for number in range(self.num_ops):
            op = _one_of(self.codes(), uniform(AUGMENT, 4 * number))
            op = np.where(uniform(AUGMENT, 4 * number + 1) < self.probability, op, OPERATIONS["identity"].code)
            # A normal deviate, by the inverse of its distribution.
            deviation = special.ndtri(uniform(AUGMENT, 4 * number + 2).clip(1e-12, 1 - 1e-12))
            strength = (self.magnitude + self.magnitude_std * deviation).clip(0, 1)
            drawn.append((op, magnitudes(op, strength, uniform(AUGMENT, 4 * number + 3) < 0.5, wide=False)))
        return drawn


class TrivialAugment(Strict):
    """One of 14 operations at a random strength, from wide ranges (Mueller and Hutter 2021, arXiv:2103.10158)."""

    kind: Literal["trivialaugment"]
    operations: Operations = None

    @property
    def num_places(self) -> int:
        """Places for operations that every view has."""
        return 1

    def codes(self) -> list[int]:
        """Of the operations that may be drawn."""
        return codes_of(self.operations or FOURTEEN)

    def draw(self, uniform: Uniform) -> list[Drawn]:
        """Code and magnitude of the one operation, at one of 31 strengths."""
        op = _one_of(self.codes(), uniform(AUGMENT, 0))
        strength = np.floor(uniform(AUGMENT, 2) * 31) / 30
        return [(op, magnitudes(op, strength, uniform(AUGMENT, 3) < 0.5, wide=True))]


class ThreeAugment(Strict):
    """Greyscale, solarisation or blur (Touvron et al. 2022, DeiT III, arXiv:2204.07118)."""

    kind: Literal["three_augment"]

    @property
    def num_places(self) -> int:
        """Places for operations that every view has."""
        return 1

    def codes(self) -> list[int]:
        """Of the operations that may be drawn."""
        return codes_of(THREE)

    def draw(self, uniform: Uniform) -> list[Drawn]:
        """Code and magnitude of the one operation: the threshold of solarisation, the radius of blur."""
        which = np.floor(uniform(AUGMENT, 0) * len(THREE)).astype(int)
        sigma = 0.1 + 1.9 * uniform(AUGMENT, 2)
        magnitude = np.choose(which, [np.zeros_like(sigma), np.full_like(sigma, 128.0), sigma])
        return [(np.array(self.codes())[which], magnitude)]


class ColorJitter(Strict):
    """Factors from 1 - x to 1 + x (hue: shifts from -x to x of the circle), applied in random order."""

    brightness: float = Field(0, ge=0, le=1, description="x of the factor")
    contrast: float = Field(0, ge=0, le=1, description="x of the factor")
    saturation: float = Field(0, ge=0, le=1, description="x of the factor")
    hue: float = Field(0, ge=0, le=0.5, description="x of the shift")

    @property
    def num_places(self) -> int:
        """Places for operations that every view has."""
        return len(JITTERED)

    def draw(self, uniform: Uniform) -> list[Drawn]:
        """Code and magnitude of each of the four operations, in the order in which they are applied."""
        spread = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        centre = np.array([1.0, 1.0, 1.0, 0.0])
        order = np.stack([uniform(JITTER, 2 * number) for number in range(len(JITTERED))], axis=-1).argsort(axis=-1)
        drawn = []
        for number in range(len(JITTERED)):
            which = order[..., number]
            magnitude = centre[which] + spread[which] * (2 * uniform(JITTER, 2 * number + 1) - 1)
            drawn.append((np.array(codes_of(JITTERED))[which], magnitude))
        return drawn


Augment = Annotated[RandAugment | TrivialAugment | ThreeAugment, Field(discriminator="kind")]


def operation_arrays(num_ops: int, codes: Sequence[int]) -> dict[str, ViewArray]:
    """The arrays of so many operations per view, which may be those of `codes` beside the first eighteen.

    What stores say of the first eighteen never changes, whatever operations there are today: it is part of their
    metadata, and so of their digest.
    """
    more = sorted(set(codes) - set(range(FIRST_CODES)))
    first = ", ".join(operation_name(code) for code in range(FIRST_CODES))
    named = "".join(f", {code}: {operation_name(code)}" for code in more)
    ops = ("op", num_ops)
    return {
        "op": ViewArray("|u1", 255, ops, (0, max([FIRST_CODES - 1, *more])), f"operation: {first}{named}"),
        "magnitude": ViewArray("<f4", np.nan, ops, (-1e4, 1e4), "of the operation, in its own unit"),
    }


def codes_of(names: Sequence[str]) -> list[int]:
    """What `view/op` holds for operations of these names."""
    return [OPERATIONS[name].code for name in names]


def magnitudes(
    codes: NDArray[np.int64], strength: NDArray[np.float64], negative: NDArray[np.bool_], *, wide: bool
) -> NDArray[np.float64]:
    """Strengths of 0 to 1 in the unit of each operation.

    Args:
        negative: where signed operations go to the other side.
        wide: the ranges of TrivialAugment, not those of RandAugment.
    """
    by_code = {op.code: op for op in OPERATIONS.values()}

    def of_each(value: Any) -> NDArray[Any]:
        return np.array([value(by_code[code]) if code in by_code else 0 for code in range(max(by_code) + 1)])[codes]

    change = of_each(lambda op: op.full[wide]) * strength
    change = np.where(of_each(lambda op: op.signed).astype(bool) & negative, -change, change)
    change = np.where(of_each(lambda op: op.whole).astype(bool), np.rint(change), change)
    start = of_each(lambda op: op.start)
    return np.where(start != 0, start + change, change)


def _one_of(codes: list[int], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.array(codes)[np.floor(uniform * len(codes)).astype(int)]
