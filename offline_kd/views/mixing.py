"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899): drawn, stored and done."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offline_kd.support.strict import Strict
from offline_kd.views.erase import inner_box
from offline_kd.views.kind import BOX, EMPTY, MIX, UNIT, Parameters, Uniform, ViewArray

PARTNERS = 64  # an image is mixed with one of the same so many of its tar, so that few are held in memory together
NO_PARTNER = -1
WHOLE = 2**15  # `share` is in 1/WHOLE


class Mixing(Strict):
    """Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) with another image of the same tar, the same view of it.

    Where both have an alpha, `switch` is the chance of cutmix.
    """

    mixup: float = Field(0, ge=0, description="alpha; 0: none")
    cutmix: float = Field(0, ge=0, description="alpha; 0: none")
    probability: float = Field(1, ge=0, le=1, description="that another image is mixed in")
    switch: float = Field(0.5, ge=0, le=1, description="chance of cutmix where both have an alpha")

    def arrays(self) -> dict[str, ViewArray]:
        """Who is mixed in, how much of the image itself stays, and the box that the other one covers."""
        partner = f"row of the block that is mixed in, {NO_PARTNER}: none"
        share = f"of the image itself in the mixture, in 1/{WHOLE}"
        mix_box = f"box that the other image covers, in 1/{UNIT} of the side; 0: it is blended in"
        return {
            "partner": ViewArray("<i4", -2, None, (NO_PARTNER, 2**31 - 1), partner),
            "share": ViewArray("<u2", 65535, None, (0, WHOLE), share),
            "mix_box": ViewArray("<i2", EMPTY, BOX, (0, UNIT), mix_box),
        }

    def draw(self, uniform: Uniform) -> Parameters:
        """Those arrays, `[n, v, ...]`, for all n rows of a tar."""
        from scipy import special  # only where it is needed, because it takes its time

        u = uniform(MIX, 3)
        count = len(u)
        row = np.arange(count)[:, None]
        first = row // PARTNERS * PARTNERS
        together = np.minimum(PARTNERS, count - first)  # in this row's company
        other = np.floor(uniform(MIX, 0) * (together - 1)).astype(np.int64)
        partner = first + other + (first + other >= row)  # anyone but the row itself
        mixed = (uniform(MIX, 1) < self.probability) & (together > 1) & (self.mixup > 0 or self.cutmix > 0)
        chance = self.switch if self.mixup and self.cutmix else float(self.cutmix > 0)
        cut = mixed & (uniform(MIX, 2) < chance)
        mixup, cutmix = (
            special.betaincinv(alpha, alpha, u) if alpha else np.ones_like(u) for alpha in (self.mixup, self.cutmix)
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


def mix_in(pixels: NDArray[np.uint8], other: NDArray[np.uint8], box: NDArray[np.int16], share: int) -> None:
    """Mix an image into another `[3, size, size]`, in place: cutmix where there is a box, else mixup.

    In whole numbers, so that it is the same everywhere.
    """
    if box[2] and box[3]:
        rows, columns = inner_box(box, pixels.shape[1])
        pixels[:, rows, columns] = other[:, rows, columns]
    else:
        blend = pixels.astype(np.int32) * share + other.astype(np.int32) * (WHOLE - share) + WHOLE // 2
        pixels[:] = (blend // WHOLE).astype(np.uint8)


def drop_bad_partners(parameters: Parameters, bad: Collection[int]) -> None:
    """Let nothing be mixed into the views, of a whole block, that were to be mixed with rows that cannot be decoded."""
    if "partner" in parameters and bad:
        lost = np.isin(parameters["partner"], list(bad))
        parameters["partner"][lost] = NO_PARTNER
        parameters["share"][lost] = WHOLE
        parameters["mix_box"][lost] = 0


def without_rows(parameters: Parameters, bad: Collection[int]) -> Parameters:
    """Parameters `[n, v, ...]` of a block without its rows `bad`, which are mixed into nothing; numbers follow."""
    if not bad:
        return parameters
    drop_bad_partners(parameters, bad)
    good = ~np.isin(np.arange(len(parameters["flip"])), list(bad))
    kept = {name: array[good] for name, array in parameters.items()}
    if "partner" in kept:
        partner = kept["partner"]
        kept["partner"] = np.where(partner < 0, partner, (np.cumsum(good) - 1)[partner]).astype(partner.dtype)
    return kept
