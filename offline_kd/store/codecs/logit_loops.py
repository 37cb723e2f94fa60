"""The loops of `whole.py`, `likeliest.py` and `klt_means.py`, compiled as those of `row_loops.py` are."""

from functools import partial
from typing import Any

import numpy as np

from offline_kd.store.codecs.row_loops import compiled, inlined

BUCKETS, CLASS_BITS = 256, 32
# What may be done to sums of whole numbers, which are exact: multiplied and added at once, added in another order.
_fused: Any = partial(compiled, fastmath={"contract"})
_in_any_order: Any = partial(compiled, fastmath={"reassoc"})


@_in_any_order
def round_logits(logits, factor, mean, whole):
    """Fills `whole` `[n, C]` float32 with logits times `factor`, less the mean, rounded; sums of squares `[n]`."""
    squares = np.empty(len(logits), dtype=np.float64)
    for row in range(len(logits)):
        total = 0.0
        for one in range(mean.size):
            number = np.rint(np.float64(logits[row, one]) * factor - mean[one])
            whole[row, one] = number
            total += number * number
        squares[row] = total
    return squares


@compiled
def round_views(x, p, finer, up, reach, q):
    """Fills `q` `[n, v, k]` with what `x` adds to `p` `[n, 1, k]`, in steps of `finer`, no further from 0 than `reach`.

    What is left of a size is dropped after `up` was added to it. Returns the largest sum of squares of a view.
    """
    largest = np.int64(0)
    for image in range(x.shape[0]):
        for view in range(x.shape[1]):
            total = np.int64(0)
            for axis in range(x.shape[2]):
                value = (x[image, view, axis] - np.float32(p[image, 0, axis])) / finer
                size = np.int32(min(np.floor(np.abs(value) + up), reach[axis]))
                q[image, view, axis] = -size if value < 0 else size
                total += size * size
            largest = max(largest, total)
    return largest


@compiled
def refine_rows(logits, whole, unit, found, counts, reach, level, differences):
    """Fills `level` `[n]` and `differences` `[n, m]`, which are 0: see `KltMeans._refined`.

    Args:
        found: what `likeliest` found.
        reach: `[levels, m]` how far from 0 a difference may be.
    """
    classes, steps, is_fine = found
    for row in range(len(logits)):
        fine, at = 0, 0
        for rank in range(classes.shape[1]):
            fine += is_fine[row, rank]
        while counts[at] < fine:
            at += 1
        level[row] = at
        for rank in range(counts[at]):
            one = classes[row, rank]
            steps_away = np.rint((logits[row, one] - whole[row, one] * unit) / steps[row, rank])
            most = np.float32(reach[at, rank])
            differences[row, rank] = np.int16(max(-most, min(most, steps_away)))


@_fused
def add_differences(numbers, axes, whole):
    """Fills `whole` `[n, v, C]`, of which that of first views is there, for `numbers` `[n, v, k]` on `axes` `[k, C]`.

    Views of an image differ in a few numbers of hundreds. Sums are of whole numbers below 2**24, whatever their order.
    """
    num_images, num_views, num_axes = numbers.shape
    used, by = np.empty(num_axes + 1, dtype=np.int64), np.empty(num_axes + 1, dtype=np.float32)
    for image in range(num_images):
        for view in range(1, num_views):
            count = 0
            for axis in range(num_axes):
                difference = np.int32(numbers[image, view, axis]) - np.int32(numbers[image, 0, axis])
                used[count], by[count] = axis, difference
                count += difference != 0
            sums, first = whole[image, view], whole[image, 0]
            for one in range(sums.size):
                sums[one] = first[one]
            fours = count - count % 4
            for at in range(0, fours, 4):
                a, b, c, d = axes[used[at]], axes[used[at + 1]], axes[used[at + 2]], axes[used[at + 3]]
                by_a, by_b, by_c, by_d = by[at], by[at + 1], by[at + 2], by[at + 3]
                for one in range(sums.size):
                    sums[one] += by_a * a[one] + by_b * b[one] + by_c * c[one] + by_d * d[one]
            for at in range(fours, count):
                a, by_a = axes[used[at]], by[at]
                for one in range(sums.size):
                    sums[one] += by_a * a[one]


@compiled
def add_refinement(whole, unit, classes, differences, steps):
    """Logits in place of `whole` `[n, C]`, which are in `unit`: `classes` `[n, m]` have `differences` `steps` more."""
    for row in range(whole.shape[0]):
        for one in range(whole.shape[1]):
            whole[row, one] *= unit
        for rank in range(classes.shape[1]):
            whole[row, classes[row, rank]] += np.float32(differences[row, rank]) * steps[row, rank]


@inlined
def _fill_buckets(below, shift, sizes):
    """Counts in `sizes[0]` how many of `below` are in each bucket; four counters, since each waits for its own last."""
    sizes[:] = 0
    fours = below.size - below.size % 4
    for one in range(0, fours, 4):
        for counter in range(4):
            sizes[counter, below[one + counter] >> shift] += 1
    for one in range(fours, below.size):
        sizes[0, below[one] >> shift] += 1
    for counter in range(1, 4):
        for bucket in range(sizes.shape[1]):
            sizes[0, bucket] += sizes[counter, bucket]


@inlined
def _sort_closest(below, count, shift, ends, places, keys):
    """Fills `keys`: how far at least `count` classes lie below the first, shifted by CLASS_BITS, and which; in order.

    Only what is in the first few buckets, of which `ends` has the sizes, is looked at, and put where its bucket is;
    there hardly anything has to move.
    """
    last, there = 0, ends[0]
    while there < count:
        last += 1
        there += ends[last]
        ends[last] = there
    furthest, found = np.int32(((np.int64(last) + 1) << shift) - 1), 0
    for one in range(below.size):
        places[found] = one
        found += below[one] <= furthest
    for index in range(found - 1, -1, -1):
        place = places[index]
        bucket = below[place] >> shift
        ends[bucket] -= 1
        keys[ends[bucket]] = (np.int64(below[place]) << CLASS_BITS) | place
    for index in range(1, found):
        key, to = keys[index], index
        while to > 0 and keys[to - 1] > key:
            keys[to] = keys[to - 1]
            to -= 1
        keys[to] = key


@compiled
def likeliest_rows(whole, most, count, scale, exp, log, steps):
    """See `likeliest`: classes, steps and whether these are fine, `[n, count]` of `[n, C]`."""
    eighth, width = scale
    rows, num_classes = whole.shape
    classes = np.empty((rows, count), dtype=np.int64)
    sizes = np.empty((rows, count), dtype=np.float32)
    is_fine = np.empty((rows, count), dtype=np.bool_)
    below, places = np.empty(num_classes, dtype=np.int32), np.empty(num_classes + 1, dtype=np.int32)
    buckets, ordered = np.empty((4, BUCKETS), dtype=np.int32), np.empty(num_classes, dtype=np.int64)
    for row in range(rows):
        for one in range(num_classes):
            value = whole[row, one] if whole[row, one] < most else most
            below[one] = np.int32(value if value > -most else -most)
        highest = lowest = below[0]
        for one in range(num_classes):
            highest, lowest = max(highest, below[one]), min(lowest, below[one])
        shift = np.int32(0)
        while (highest - lowest) >> shift >= BUCKETS:
            shift += np.int32(1)
        for one in range(num_classes):
            below[one] = highest - below[one]
        _fill_buckets(below, shift, buckets)
        _sort_closest(below, count, shift, buckets[0], places, ordered)
        # Both sums and steps only grow with the rank: no division.
        total, share, edge = 0, 0, eighth
        for rank in range(count):
            while share < exp.size - 1 and (ordered[rank] >> CLASS_BITS) >= edge:
                share += 1
                edge += eighth
            total += exp[share]
        lift = eighth * np.searchsorted(log, total)
        step, edge = 0, width
        for rank in range(count):
            while step < steps.size and (ordered[rank] >> CLASS_BITS) + lift >= edge:
                step += 1
                edge += width
            classes[row, rank] = ordered[rank] & ((1 << CLASS_BITS) - 1)
            sizes[row, rank] = steps[min(step, steps.size - 1)]
            is_fine[row, rank] = step < steps.size
    return classes, sizes, is_fine
