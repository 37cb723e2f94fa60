"""One view of each of some rows: its parameters, and those of the image that is mixed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline_kd.support.counter_rng import U64
from offline_kd.views.kind import Parameters, ViewSpec, draw


@dataclass(frozen=True)
class Choice:
    """One view of each of m rows of a block."""

    row: NDArray[np.int64]  # [m]
    own: Parameters  # [m, ...]
    partner_row: NDArray[np.int64]  # [m] whose same view is mixed in; negative: none
    partner: Parameters  # [m, ...] of that view; it is mixed in without what would be mixed into it

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_] | slice) -> "Choice":
        """Some of the rows, in the order of `index`."""
        own, partner = ({name: array[index] for name, array in one.items()} for one in (self.own, self.partner))
        return Choice(self.row[index], own, self.partner_row[index], partner)


def side_by_side(choices: Sequence[Choice]) -> Choice:
    """Several views of the same rows as one choice, all of the first row first."""

    def of_row(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])

    if len(choices) == 1:
        return choices[0]
    own, partner = (
        {name: of_row([one[name] for one in every]) for name in every[0]}
        for every in ([choice.own for choice in choices], [choice.partner for choice in choices])
    )
    return Choice(
        of_row([choice.row for choice in choices]), own, of_row([choice.partner_row for choice in choices]), partner
    )


def choose(parameters: Parameters, row: NDArray[np.int64], view: NDArray[np.int64]) -> Choice:
    """Views `view` `[m]` of the rows `row` `[m]`, out of the parameters `[n, v, ...]` of all."""
    own = {name: array[row, view] for name, array in parameters.items()}
    if "partner" not in own:
        return Choice(row, own, np.full(len(row), -1), own)
    partner_row = own["partner"].astype(np.int64)
    partner = {name: array[partner_row.clip(min=0), view] for name, array in parameters.items()}
    return Choice(row, own, partner_row, partner)


def draw_choice(views: ViewSpec, key_hash: U64, sizes: NDArray[np.int64], view: NDArray[np.int64]) -> Choice:
    """The view `view` `[n]` of each sample of a tar, drawn here: what `choose` finds among all views, without them.

    Args:
        key_hash: `[n]`, in the order of the tar.
        sizes: `[n, 2]` height and width of the images.
    """
    row = np.arange(len(key_hash))
    own = {name: array[:, 0] for name, array in draw(views, key_hash, sizes, view).items()}
    if "partner" not in own:
        return Choice(row, own, np.full(len(row), -1), own)
    partner_row = own["partner"].astype(np.int64)
    there = partner_row.clip(min=0)
    partner = {name: array[:, 0] for name, array in draw(views, key_hash[there], sizes[there], view).items()}
    return Choice(row, own, partner_row, partner)
