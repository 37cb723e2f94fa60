"""Random erasing (Zhong et al. 2017, arXiv:1708.04896): drawn, stored and done."""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.strict import Strict
from offline_kd.views.kind import BOX, EMPTY, ERASE, TRIES, UNIT, Erased, Uniform, ViewArray

GREY = (124, 116, 104)  # ImageNet's mean colour: what erasing and rotating leave


class Erase(Strict):
    """A box of the image is replaced by one colour or by noise (Zhong et al. 2017, arXiv:1708.04896)."""

    probability: float = Field(0.25, ge=0, le=1, description="that a view has an erased box")
    area: tuple[float, float] = Field((0.02, 0.33), description="of the box, as a share of the image: from, to")
    ratio: tuple[float, float] = Field((0.3, 3.3), description="height / width of the box: from, to")
    fill: Erased = Field("mean", description="what lies in the box: ImageNet's mean colour, noise, or black")

    def arrays(self) -> dict[str, ViewArray]:
        """The array of erased boxes."""
        what = f"top, left, height, width of the erased box, in 1/{UNIT} of the side; 0: none"
        return {"erase": ViewArray("<i2", EMPTY, BOX, (0, UNIT), what)}

    def draw(self, uniform: Uniform) -> NDArray[np.int16]:
        """Boxes `[n, v, 4]` in 1/UNIT of the side; all 0 where nothing is erased, or no try has fitted."""
        box = np.zeros((*uniform(ERASE, 0).shape, 4), dtype=np.int16)
        open_ = uniform(ERASE, 0) < self.probability
        for number in range(TRIES):
            area = self.area[0] + uniform(ERASE, 4 * number + 1) * (self.area[1] - self.area[0])
            low, high = np.log(self.ratio[0]), np.log(self.ratio[1])
            ratio = np.exp(low + uniform(ERASE, 4 * number + 2) * (high - low))
            h, w = np.sqrt(area * ratio), np.sqrt(area / ratio)
            fits = open_ & (h < 1) & (w < 1)
            top, left = uniform(ERASE, 4 * number + 3) * (1 - h), uniform(ERASE, 4 * number + 4) * (1 - w)
            box[fits] = np.rint(np.stack([top, left, h, w], axis=-1)[fits] * UNIT).astype(np.int16)
            open_ &= ~fits
        return box


def inner_box(box: NDArray[np.int16], size: int) -> tuple[slice, slice]:
    """Rows and columns of a box in 1/UNIT of a side; the share of the side decides, whatever the resolution."""
    top, left, height, width = (int(value) for value in box)
    first_row, first_column = round(top * size / UNIT), round(left * size / UNIT)
    return (
        slice(first_row, round((top + height) * size / UNIT)),
        slice(first_column, round((left + width) * size / UNIT)),
    )


def erase_box(pixels: NDArray[np.uint8], box: NDArray[np.int16], fill: Erased) -> None:
    """Erase a box `[4]` of an image `[3, size, size]`, in place; the noise is a function of the box."""
    rows, columns = inner_box(box, pixels.shape[1])
    if fill != "noise":
        pixels[:, rows, columns] = np.array(GREY if fill == "mean" else (0, 0, 0), dtype=np.uint8)[:, None, None]
        return
    shape = pixels[:, rows, columns].shape
    noise = counter_hash(*(int(value) for value in box), np.arange(int(np.prod(shape)), dtype=np.uint64))
    pixels[:, rows, columns] = (noise >> np.uint64(56)).astype(np.uint8).reshape(shape)
