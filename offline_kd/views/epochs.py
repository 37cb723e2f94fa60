"""Which view of a sample an epoch shows."""

import numpy as np
from numpy.typing import NDArray

from offline_kd.support.counter_rng import U64, keyed_permutation


def view_groups(num_views: int, views_per_group: int) -> list[range]:
    """The views 0..num_views-1 in the groups that are stored, committed and read together."""
    return [range(start, min(start + views_per_group, num_views)) for start in range(0, num_views, views_per_group)]


def view_of_epoch(seed: int, key_hash: U64, epoch: int, groups: list[range]) -> tuple[int, NDArray[np.int64]]:
    """Which view each sample shows in an epoch (counted from 0): a group, and `[n]` positions within that group.

    A pure function of (seed, key, epoch). A sample shows all its views before one comes again; after that a new cycle
    begins, in another order. The group is common to all samples, so an epoch reads one group of the store and not
    all; the order within the group is the sample's own.
    """
    cycle, step = divmod(epoch, sum(len(group) for group in groups))
    for group in keyed_permutation(len(groups), seed, cycle)[0]:
        if step < len(groups[group]):
            break
        step -= len(groups[group])
    return int(group), keyed_permutation(len(groups[group]), seed, cycle, key_hash)[:, step]
