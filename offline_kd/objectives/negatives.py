"""Which rows of the training split a sample is contrasted with: images of other classes, drawn on the device."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from offline_kd.support.device_rng import device_hash
from offline_kd.support.errors import DataError

STREAM = 0x6E65676174697665  # first counter of the draws made here, so that they are independent of all others
OWN_STREAM = 0x6F776E
DRAWS_AT_ONCE = 2**22  # 8 bytes each, some of them at a time

Mode = Literal["exact", "relax"]


class Negatives(nn.Module):
    """Draws for every sample a row to agree with, and `count` rows of other classes.

    Every row of another class is equally likely. The rows of a sample are distinct, where so many have another class;
    otherwise each is drawn from all of them. They are pure functions of the counters and of the sample's own row.

    Args:
        labels: `[n]` int64 of all rows; a row without one (-1) is a class of its own.
        mode: "exact": the row to agree with is the sample's own; "relax": any of its class.

    Raises DataError where all rows have one class.
    """

    def __init__(self, labels: Tensor, count: int, mode: Mode) -> None:
        super().__init__()
        self.count, self.mode, self.num_rows = count, mode, len(labels)
        apart = int(labels.max()) + 1 + torch.arange(len(labels))
        own = torch.where(labels >= 0, labels, apart).numpy()
        kind, sizes = map(torch.from_numpy, np.unique(own, return_inverse=True, return_counts=True)[1:])
        # How many rows have another class: of the largest class and of the smallest.
        self.fewest, self.most = len(labels) - int(sizes.max()), len(labels) - int(sizes.min())
        if self.fewest == 0:
            raise DataError(
                f"term 'crd': all {len(labels)} training rows have one class, so none is there to contrast them with. "
                "Leave the term out."
            )
        self.order: Tensor
        self.start: Tensor
        self.size: Tensor
        self.register_buffer("order", kind.argsort(stable=True), persistent=False)  # [n] rows, class by class
        self.register_buffer("start", (sizes.cumsum(0) - sizes)[kind], persistent=False)  # [n] place of its class there
        self.register_buffer("size", sizes[kind], persistent=False)  # [n] of its class

    def forward(self, rows: Tensor, *counters: int) -> Tensor:
        """`[B, 1 + count]` int64 for samples in `rows` `[B]` int64; the first column is what they agree with."""
        state = device_hash(STREAM, *counters, rows, device=rows.device)[:, None]
        start, size = self.start[rows][:, None], self.size[rows][:, None]
        if self.count <= self.fewest:
            places = self._distinct(state, start, size)
        elif self.count > self.most:
            places = self._repeated(state, start, size)
        else:
            enough = self.num_rows - size >= self.count
            places = torch.where(enough, self._distinct(state, start, size), self._repeated(state, start, size))
        own = rows[:, None]
        if self.mode == "relax":
            own = self.order[start + _below(size, device_hash(state, OWN_STREAM, device=rows.device))]
        return torch.cat([own, self.order[places]], dim=1)

    def _distinct(self, state: Tensor, start: Tensor, size: Tensor) -> Tensor:
        """`[B, count]` places in `order`: those with the smallest draws of all that are not in the sample's class."""
        every = torch.arange(self.num_rows, device=state.device)
        at_once = max(DRAWS_AT_ONCE // self.num_rows, 1)
        found = []
        for begin in range(0, len(state), at_once):
            some = slice(begin, begin + at_once)
            draws = device_hash(state[some], every, device=state.device)
            own_class = (every >= start[some]) & (every < start[some] + size[some])
            draws.masked_fill_(own_class, torch.iinfo(torch.int64).max)
            found.append(draws.topk(self.count, dim=1, largest=False, sorted=False).indices)
        return torch.cat(found)

    def _repeated(self, state: Tensor, start: Tensor, size: Tensor) -> Tensor:
        """`[B, count]` places in `order`, each drawn from all that are not in the sample's class."""
        draws = device_hash(state, torch.arange(self.count, device=state.device), device=state.device)
        place = _below(self.num_rows - size, draws)
        return torch.where(place < start, place, place + size)


def _below(limit: Tensor, draws: Tensor) -> Tensor:
    """Draws from 0 to below `limit`, which is far smaller than 2**63."""
    return (draws & torch.iinfo(torch.int64).max) % limit
