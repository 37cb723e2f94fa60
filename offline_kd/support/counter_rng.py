"""Random numbers that are pure functions of counters: no library, worker count, batch size or rank can change them."""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


# ---- choosing ------------------------------------------------------------------------------------------------------


def mix(counters: U64) -> U64:
    """A bijective scrambling of 64-bit counters (the finaliser of splitmix64, Steele et al. 2014)."""
    z = (counters ^ (counters >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def counter_hash(*counters: int | U64) -> U64:
    """A 64-bit hash of a tuple of counters, elementwise with broadcasting. Changing this breaks every store."""
    state = np.zeros(1, dtype=np.uint64)
    for counter in counters:
        value = np.atleast_1d(np.asarray(counter, dtype=np.uint64))
        state = mix((state ^ value) + np.uint64(0x9E3779B97F4A7C15))
    return state


def counter_uniform(*counters: int | U64) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), a pure function of the counters."""
    return (counter_hash(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(num: int, *counters: int | U64) -> NDArray[np.int64]:
    """`[n, num]`: for every row of counters (broadcast to `[n]`) its own permutation of 0..num-1."""
    rows = counter_hash(*counters)[:, None]
    return order_of_rows(counter_hash(rows, np.arange(num, dtype=np.uint64)[None]))


def order_of_rows(draws: U64) -> NDArray[np.int64]:
    """`[n, num]`: every row's stable argsort. Numbers that end with their place sort faster than places by number."""
    num = draws.shape[1]
    bits = np.uint64((num - 1).bit_length())
    places = (np.uint64(1) << bits) - np.uint64(1)
    draws_and_places = np.sort(draws & ~places | np.arange(num, dtype=np.uint64), axis=1)
    order = (draws_and_places & places).astype(np.int64)
    # What differs in the bits that made way for places only, which is rare.
    rounded = draws_and_places >> bits
    unclear = (rounded[:, 1:] == rounded[:, :-1]).any(axis=1)
    order[unclear] = np.argsort(draws[unclear], axis=1, kind="stable")
    return order
