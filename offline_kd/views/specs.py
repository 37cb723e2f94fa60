"""Views: which augmentation a sample gets, as explicit numbers. `render.py` makes pixels of them.

A view is a box in source pixels, which may reach outside the image, and what happens to its pixels afterwards: a flip,
operations with magnitudes, an erased box, another image of the same tar mixed in. Both stages render the same stored
numbers, so the student sees the very pixels that the teacher saw.

All random choices are pure functions of counters (seed, key hash, view), computed here: no library, worker count,
batch size or rank can change them.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offline_kd.data.manifest import Interpolation
from offline_kd.support.counter_rng import U64, counter_uniform, keyed_permutation
from offline_kd.support.errors import RecipeError
from offline_kd.support.strict import Strict

Fill = Literal["zeros", "reflect"]  # what lies outside the image: black, or its mirror image
Parameters = dict[str, NDArray[Any]]  # of views, by array: `[n, v, ...]`; which there are says `view_arrays`

PARTNERS = 64  # an image is mixed with one of the same so many of its tar, so that few are held in memory together
NO_PARTNER = -1
UNIT = 2**14  # boxes of erasing and mixing are in 1/UNIT of the image's side
WHOLE = 2**15  # `share` is in 1/WHOLE
MOST_VIEWS = 4096  # of an image, where there is no end of different ones

# What `view/op` numbers. A changed order would break every store.
OPS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize", "invert", "grayscale", "blur", "hue"),
)
AUGMENT_OPS = OPS[: OPS.index("invert")]  # the 14 of RandAugment and TrivialAugment
SIGNED_OPS = (*OPS[1:10],)


class NoAugmentation(Strict):
    """The image as it is; one view."""

    kind: Literal["none"] = "none"

    @property
    def num_distinct(self) -> int:
        return 1

    @property
    def num_views(self) -> int:
        return 1


class PadCropFlip(Strict):
    """Pad by `padding` pixels, crop back to the image's size, flip left-right: the augmentation of the CIFAR papers.

    There are only (2 * padding + 1)**2 * 2 such views, so `count: all` stores every one and offline training is
    online training exactly. A smaller `count` draws that many different ones for every sample.
    """

    kind: Literal["pad_crop_flip"]
    padding: int = Field(4, ge=0, le=64)
    fill: Fill = "zeros"
    flip: bool = True
    count: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    seed: int = Field(0, ge=0)

    @property
    def num_distinct(self) -> int:
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    @property
    def num_views(self) -> int:
        if self.count == "all":
            return self.num_distinct
        if self.count > self.num_distinct:
            raise RecipeError(
                f"views.count is {self.count}, but padding {self.padding} {'with' if self.flip else 'without'} flip "
                f"has only {self.num_distinct} different views. Use `count: all`."
            )
        return self.count


class CenterCrop(Strict):
    """One view without augmentation of images of any size: the short side to `resize`, the middle `size` x `size`."""

    kind: Literal["center_crop"]
    size: int = Field(224, ge=1, le=4096, description="of the student's image; the teacher may have another")
    resize: int = Field(256, ge=1, le=8192)
    interpolation: Interpolation = "bilinear"

    @property
    def num_distinct(self) -> int:
        return 1

    @property
    def num_views(self) -> int:
        return 1


class RandAugment(Strict):
    """`num_ops` of 14 operations, one after the other (Cubuk et al. 2020, arXiv:1909.13719).

    `magnitude` is the share of each operation's full strength: 9 of 30 in torchvision, 9 of 10 in timm's `rand-m9`.
    """

    kind: Literal["randaugment"]
    num_ops: int = Field(2, ge=1, le=8)
    magnitude: float = Field(0.3, ge=0, le=1)
    magnitude_std: float = Field(0, ge=0, le=1)
    probability: float = Field(1, ge=0, le=1, description="that an operation is applied")


class TrivialAugment(Strict):
    """One of 14 operations at a random strength, from wide ranges (Mueller and Hutter 2021, arXiv:2103.10158)."""

    kind: Literal["trivialaugment"]


class ThreeAugment(Strict):
    """Greyscale, solarisation or blur (Touvron et al. 2022, DeiT III, arXiv:2204.07118)."""

    kind: Literal["three_augment"]


class ColorJitter(Strict):
    """Factors from 1 - x to 1 + x (hue: shifts from -x to x of the circle), applied in random order."""

    brightness: float = Field(0, ge=0, le=1)
    contrast: float = Field(0, ge=0, le=1)
    saturation: float = Field(0, ge=0, le=1)
    hue: float = Field(0, ge=0, le=0.5)


class Erase(Strict):
    """A box of the image is replaced by one colour or by noise (Zhong et al. 2017, arXiv:1708.04896)."""

    probability: float = Field(0.25, ge=0, le=1)
    area: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: Literal["mean", "noise"] = "mean"


class Mixing(Strict):
    """Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) with another image of the same tar, the same view of it.

    Where both have an alpha, `switch` is the chance of cutmix.
    """

    mixup: float = Field(0, ge=0, description="alpha; 0: none")
    cutmix: float = Field(0, ge=0, description="alpha; 0: none")
    probability: float = Field(1, ge=0, le=1)
    switch: float = Field(0.5, ge=0, le=1)


Augment = Annotated[RandAugment | TrivialAugment | ThreeAugment, Field(discriminator="kind")]


class RandomCrop(Strict):
    """Random-resized crops (Szegedy et al. 2015) of images of any size, and what may follow. Any number of views."""

    kind: Literal["random_resized_crop"]
    size: int = Field(224, ge=1, le=4096, description="of the student's image; the teacher may have another")
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.08, 1.0)
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip: float = Field(0.5, ge=0, le=1, description="probability")
    augment: Augment | None = None
    jitter: ColorJitter | None = None
    erase: Erase | None = None
    mixing: Mixing | None = None
    count: int = Field(ge=1, le=MOST_VIEWS)
    seed: int = Field(0, ge=0)

    @property
    def num_distinct(self) -> int:
        return MOST_VIEWS

    @property
    def num_views(self) -> int:
        return self.count

    @property
    def num_ops(self) -> int:
        """Places for operations that every view has."""
        augment = self.augment.num_ops if isinstance(self.augment, RandAugment) else 1 if self.augment else 0
        return augment + (len(JITTERED) if self.jitter else 0)


AnyViews = NoAugmentation | PadCropFlip | CenterCrop | RandomCrop
Views = Annotated[AnyViews, Field(discriminator="kind")]
JITTERED = ("brightness", "contrast", "color", "hue")


@dataclass(frozen=True)
class ViewArray:
    """One array of view parameters: type, what marks an empty place, and its axis behind row and view if it has one."""

    dtype: str
    fill: float
    axis: tuple[str, int] | None
    legal: tuple[float, float]
    description: str


def view_arrays(views: AnyViews) -> dict[str, ViewArray]:
    """The arrays, below `view/` in the store, that `draw` returns."""
    box, empty = ("box", 4), -(2**15)
    arrays = {
        "box": ViewArray("<i2", empty, box, (empty + 1, 2**15 - 1), "top, left, height, width in source pixels"),
        "flip": ViewArray("|u1", 255, None, (0, 1), "1: mirrored left-right after cropping"),
    }
    if not isinstance(views, RandomCrop):
        return arrays
    if views.num_ops:
        ops = ("op", views.num_ops)
        arrays["op"] = ViewArray("|u1", 255, ops, (0, len(OPS) - 1), f"operation: {', '.join(OPS)}")
        arrays["magnitude"] = ViewArray("<f4", np.nan, ops, (-1e4, 1e4), "of the operation, in its own unit")
    if views.erase:
        what = f"top, left, height, width of the erased box, in 1/{UNIT} of the side; 0: none"
        arrays["erase"] = ViewArray("<i2", empty, box, (0, UNIT), what)
    if views.mixing:
        what = f"row of the block that is mixed in, {NO_PARTNER}: none"
        arrays["partner"] = ViewArray("<i4", -2, None, (NO_PARTNER, 2**31 - 1), what)
        arrays["share"] = ViewArray("<u2", 65535, None, (0, WHOLE), f"of the image itself in the mixture, in 1/{WHOLE}")
        what = f"box that the other image covers, in 1/{UNIT} of the side; 0: it is blended in"
        arrays["mix_box"] = ViewArray("<i2", empty, box, (0, UNIT), what)
    return arrays


def is_exact(views: AnyViews) -> bool:
    """Whether rendering copies pixels only, so that images have one size and are rendered in batches on the device."""
    return isinstance(views, NoAugmentation | PadCropFlip)


def outside(views: AnyViews) -> Fill:
    """What lies outside the image."""
    return views.fill if isinstance(views, PadCropFlip) else "zeros"


def draw(views: AnyViews, key_hash: U64, sizes: NDArray[np.int64]) -> Parameters:
    """Parameters of all views of the samples `key_hash` `[n]`, in the order of their tar.

    More views can be added later without changing those before. View v of a sample is, for PadCropFlip, the v-th
    element of the sample's own permutation of the distinct views: none comes twice, and `all` is the whole permutation.

    Args:
        sizes: `[n, 2]` height and width of the images.
    """
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    match views:
        case NoAugmentation():
            box = np.stack([np.zeros_like(height), np.zeros_like(height), height, width], axis=-1)[:, None]
            return {"box": box.astype(np.int16), "flip": np.zeros((len(key_hash), 1), dtype=np.uint8)}
        case PadCropFlip():
            return _draw_pad_crop_flip(views, key_hash, height, width)
        case CenterCrop():
            side = np.maximum(np.rint(np.minimum(height, width) * min(views.size / views.resize, 1)), 1)
            side = side.astype(np.int64)
            box = np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=-1)[:, None]
            return {"box": box.astype(np.int16), "flip": np.zeros((len(key_hash), 1), dtype=np.uint8)}
        case RandomCrop():
            return _draw_random_crop(views, key_hash, height, width)


def _draw_pad_crop_flip(views: PadCropFlip, key_hash: U64, height: NDArray[Any], width: NDArray[Any]) -> Parameters:
    shortest = int(min(height.min(), width.min()))
    if views.fill == "reflect" and views.padding >= shortest:
        raise RecipeError(
            f"views.padding is {views.padding} with fill reflect, but the images are {width[0]}x{height[0]}: "
            "reflection reaches at most one pixel less than the image's side. Use a smaller padding."
        )
    choice = keyed_permutation(views.num_distinct, views.seed, key_hash)[:, : views.num_views]
    side = 2 * views.padding + 1
    flip, offset = np.divmod(choice, side * side)
    top, left = offset // side - views.padding, offset % side - views.padding
    height, width = (np.broadcast_to(size[:, None], top.shape) for size in (height, width))
    return {
        "box": np.stack([top, left, height, width], axis=-1).astype(np.int16),
        "flip": flip.astype(np.uint8),
    }


# First counters of the draws for random crops, so that they are independent of each other.
CROP, FLIP, AUGMENT, JITTER, ERASE, MIX = (0x76696577 << 8 | number for number in range(6))
TRIES = 10  # for a box that fits


def _draw_random_crop(views: RandomCrop, key_hash: U64, height: NDArray[Any], width: NDArray[Any]) -> Parameters:
    view = np.arange(views.num_views, dtype=np.uint64)

    def uniform(stream: int, number: int) -> NDArray[np.float64]:
        """`[n, v]`, a draw for every view."""
        return counter_uniform(views.seed, stream, number, key_hash[:, None], view[None])

    parameters: Parameters = {
        "box": _crop_boxes(views, uniform, height, width),
        "flip": (uniform(FLIP, 0) < views.flip).astype(np.uint8),
    }
    ops = _draw_augment(views.augment, uniform) + _draw_jitter(views.jitter, uniform)
    if ops:
        parameters["op"] = np.stack([op for op, _ in ops], axis=-1).astype(np.uint8)
        parameters["magnitude"] = np.stack([magnitude for _, magnitude in ops], axis=-1).astype(np.float32)
    if views.erase:
        parameters["erase"] = _draw_erase(views.erase, uniform)
    if views.mixing:
        parameters |= _draw_mixing(views.mixing, uniform, len(key_hash))
    return parameters


def _crop_boxes(views: RandomCrop, uniform: Any, height: NDArray[Any], width: NDArray[Any]) -> NDArray[np.int16]:
    """As torchvision's RandomResizedCrop: up to ten tries, and a crop of the middle when none fits."""
    num_views = views.num_views
    h, w = (np.repeat(size[:, None], num_views, axis=1) for size in (height, width))
    low, high = views.ratio
    # Of the middle: all of the image, as far as the ratio allows.
    box_h = np.where(w / h > high, h, np.where(w / h < low, np.rint(w / low), h)).clip(1, h)
    box_w = np.where(w / h > high, np.rint(h * high), w).clip(1, w)
    top, left = np.rint((h - box_h) / 2), np.rint((w - box_w) / 2)
    found = np.zeros(h.shape, dtype=bool)
    for number in range(TRIES):
        area = h * w * (views.scale[0] + uniform(CROP, 4 * number) * (views.scale[1] - views.scale[0]))
        ratio = np.exp(np.log(low) + uniform(CROP, 4 * number + 1) * (np.log(high) - np.log(low)))
        try_h, try_w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
        fits = ~found & (try_h >= 1) & (try_w >= 1) & (try_h <= h) & (try_w <= w)
        top = np.where(fits, np.floor(uniform(CROP, 4 * number + 2) * (h - try_h + 1)), top)
        left = np.where(fits, np.floor(uniform(CROP, 4 * number + 3) * (w - try_w + 1)), left)
        box_h, box_w = np.where(fits, try_h, box_h), np.where(fits, try_w, box_w)
        found |= fits
    return np.stack([top, left, box_h, box_w], axis=-1).astype(np.int16)


Op = tuple[NDArray[Any], NDArray[Any]]  # numbers and magnitudes, `[n, v]`


def _draw_augment(augment: Augment | None, uniform: Any) -> list[Op]:
    from scipy import special  # as in `_draw_mixing`: only where it is needed, because it takes its time

    identity = OPS.index("identity")
    match augment:
        case RandAugment():
            drawn = []
            for number in range(augment.num_ops):
                op = np.floor(uniform(AUGMENT, 4 * number) * len(AUGMENT_OPS)).astype(int)
                op = np.where(uniform(AUGMENT, 4 * number + 1) < augment.probability, op, identity)
                # A normal deviate, by the inverse of its distribution.
                deviation = special.ndtri(uniform(AUGMENT, 4 * number + 2).clip(1e-12, 1 - 1e-12))
                strength = (augment.magnitude + augment.magnitude_std * deviation).clip(0, 1)
                drawn.append((op, _magnitude(op, strength, uniform(AUGMENT, 4 * number + 3) < 0.5, wide=False)))
            return drawn
        case TrivialAugment():
            op = np.floor(uniform(AUGMENT, 0) * len(AUGMENT_OPS)).astype(int)
            strength = np.floor(uniform(AUGMENT, 2) * 31) / 30
            return [(op, _magnitude(op, strength, uniform(AUGMENT, 3) < 0.5, wide=True))]
        case ThreeAugment():
            which = np.floor(uniform(AUGMENT, 0) * 3).astype(int)
            op = np.array([OPS.index(name) for name in ("grayscale", "solarize", "blur")])[which]
            sigma = 0.1 + 1.9 * uniform(AUGMENT, 2)
            return [(op, np.choose(which, [np.zeros_like(sigma), np.full_like(sigma, 128.0), sigma]))]
    return []


def _magnitude(op: NDArray[Any], strength: NDArray[Any], negative: NDArray[Any], *, wide: bool) -> NDArray[Any]:
    """Strengths of 0 to 1 in the unit of each operation; `wide`: the ranges of TrivialAugment."""
    full = {  # RandAugment's, TrivialAugment's
        "shear_x": (0.3, 0.99),
        "shear_y": (0.3, 0.99),
        "translate_x": (150 / 331, 32 / 224),  # of the image's side
        "translate_y": (150 / 331, 32 / 224),
        "rotate": (30, 135),  # degrees
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (0.9, 0.99)),
        "posterize": (4, 6),  # bits fewer than 8
        "solarize": (255, 255),  # below the threshold of 255
    }
    ranges = np.array([full.get(name, (0, 0))[wide] for name in OPS])
    magnitude = ranges[op] * strength
    magnitude = np.where(np.isin(op, [OPS.index(name) for name in SIGNED_OPS]) & negative, -magnitude, magnitude)
    factors = [OPS.index(name) for name in ("brightness", "color", "contrast", "sharpness")]
    magnitude = np.where(np.isin(op, factors), 1 + magnitude, magnitude)
    magnitude = np.where(op == OPS.index("posterize"), 8 - np.rint(magnitude), magnitude)
    return np.where(op == OPS.index("solarize"), 255 - magnitude, magnitude)


def _draw_jitter(jitter: ColorJitter | None, uniform: Any) -> list[Op]:
    if jitter is None:
        return []
    spread = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    order = np.stack([uniform(JITTER, 2 * number) for number in range(len(JITTERED))], axis=-1).argsort(axis=-1)
    drawn = []
    for number in range(len(JITTERED)):
        which = order[..., number]
        magnitude = centre[which] + spread[which] * (2 * uniform(JITTER, 2 * number + 1) - 1)
        drawn.append((np.array([OPS.index(name) for name in JITTERED])[which], magnitude))
    return drawn


def _draw_erase(erase: Erase, uniform: Any) -> NDArray[np.int16]:
    box = np.zeros((*uniform(ERASE, 0).shape, 4), dtype=np.int16)
    open_ = uniform(ERASE, 0) < erase.probability
    for number in range(TRIES):
        area = erase.area[0] + uniform(ERASE, 4 * number + 1) * (erase.area[1] - erase.area[0])
        low, high = np.log(erase.ratio[0]), np.log(erase.ratio[1])
        ratio = np.exp(low + uniform(ERASE, 4 * number + 2) * (high - low))
        h, w = np.sqrt(area * ratio), np.sqrt(area / ratio)
        fits = open_ & (h < 1) & (w < 1)
        top, left = uniform(ERASE, 4 * number + 3) * (1 - h), uniform(ERASE, 4 * number + 4) * (1 - w)
        box[fits] = np.rint(np.stack([top, left, h, w], axis=-1)[fits] * UNIT).astype(np.int16)
        open_ &= ~fits
    return box


def _draw_mixing(mixing: Mixing, uniform: Any, count: int) -> Parameters:
    from scipy import special

    row = np.arange(count)[:, None]
    first = row // PARTNERS * PARTNERS
    together = np.minimum(PARTNERS, count - first)  # in this row's company
    other = np.floor(uniform(MIX, 0) * (together - 1)).astype(np.int64)
    partner = first + other + (first + other >= row)  # anyone but the row itself
    mixed = (uniform(MIX, 1) < mixing.probability) & (together > 1) & (mixing.mixup > 0 or mixing.cutmix > 0)
    chance = mixing.switch if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0)
    cut = mixed & (uniform(MIX, 2) < chance)
    u = uniform(MIX, 3)
    mixup, cutmix = (
        special.betaincinv(alpha, alpha, u) if alpha else np.ones_like(u) for alpha in (mixing.mixup, mixing.cutmix)
    )
    side = np.sqrt(1 - cutmix)
    middle_y, middle_x = uniform(MIX, 4), uniform(MIX, 5)
    edges = np.stack([middle_y - side / 2, middle_x - side / 2, middle_y + side / 2, middle_x + side / 2], axis=-1)
    edges = np.rint(edges.clip(0, 1) * UNIT).astype(np.int64)
    box = np.concatenate([edges[..., :2], edges[..., 2:] - edges[..., :2]], axis=-1)
    box = np.where(cut[..., None], box, 0)
    cut_share = WHOLE - np.rint(box[..., 2] * box[..., 3] / UNIT**2 * WHOLE)
    share = np.where(cut, cut_share, np.where(mixed, np.rint(mixup * WHOLE), WHOLE))
    partner = np.where(share < WHOLE, partner, NO_PARTNER)
    return {
        "partner": partner.astype(np.int32),
        "share": share.astype(np.uint16),
        "mix_box": np.where(partner[..., None] >= 0, box, 0).astype(np.int16),
    }
