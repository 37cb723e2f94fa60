"""One key, one row: found early by whoever captures, and proven over the whole store before it is finished."""

from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from offline_kd.data.tars import unpack_keys
from offline_kd.store.reader import Store
from offline_kd.support.errors import DataError

READ_AHEAD = 16  # blocks of a store that is not on this machine
MOST_SORTED = 2**24  # keys that are compared at once in the end
MOST_KNOWN = 2**24  # keys that a capture compares as it goes; all are compared in the end

Run = tuple[NDArray[np.uint64], NDArray[np.int32]]  # hashes of keys, and the block of each


class KnownKeys:
    """The key hashes of the blocks that a process has seen, in 12 bytes each, as long as they are few enough."""

    def __init__(self) -> None:
        self.blocks: set[int] = set()
        self.runs: list[Run] = []  # sorted, each at least twice as long as the next: there are few
        self.size = 0

    def add(self, block: int, key_hash: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Make a block known; returns which of its rows have the key of a row of another block, and of which."""
        used = np.zeros(len(key_hash), dtype=bool)
        owner = np.zeros(len(key_hash), dtype=np.int32)
        if block in self.blocks or self.size + len(key_hash) > MOST_KNOWN:
            return np.flatnonzero(used), owner[used]
        for hashes, blocks in self.runs:
            place = np.searchsorted(hashes, key_hash).clip(max=len(hashes) - 1)
            same = hashes[place] == key_hash
            used |= same
            owner[same] = blocks[place[same]]
        self.blocks.add(block)
        self.size += len(key_hash)
        self.runs.append((np.sort(key_hash), np.full(len(key_hash), block, dtype=np.int32)))
        while len(self.runs) > 1 and len(self.runs[-2][0]) < 2 * len(self.runs[-1][0]):
            (hashes, blocks), (more, of_more) = self.runs.pop(-2), self.runs.pop()
            hashes, blocks = np.concatenate([hashes, more]), np.concatenate([blocks, of_more])
            order = hashes.argsort(kind="stable")
            self.runs.append((hashes[order], blocks[order]))
        return np.flatnonzero(used), owner[used]


def prove_unique_keys(store: Store) -> None:
    """Make sure that no two rows of a store have one key, whoever wrote them.

    Memory is bounded: the keys of a large store are read several times, and each time those in a part of all hashes are
    compared.

    Raises DataError naming both tars.
    """
    rows = sum(store.created.dataset.tars[block].count for block in store.blocks)
    passes = -(-rows // MOST_SORTED)
    for number in range(passes):
        first, last = number * 2**64 // passes, (number + 1) * 2**64 // passes - 1
        found = []
        for some in _all_key_hashes(store):
            found.append(some[(some >= np.uint64(first)) & (some <= np.uint64(last))] if passes > 1 else some)
        hashes = np.concatenate(found)
        hashes.sort()
        twice = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(twice):
            refuse_key(store, hashes[twice[0]])


def _all_key_hashes(store: Store) -> Iterator[NDArray[np.uint64]]:
    """`[rows]` of every block."""
    for block in store.blocks:
        if store.place.is_remote:
            for later in range(block + 1, min(block + 1 + READ_AHEAD, store.blocks.stop)):
                store.fetch_ahead(later, 0, ["key_hash"])
        yield _key_hashes(store, block)


def refuse_key(store: Store, key_hash: np.uint64) -> NoReturn:
    """Raise DataError naming the tars in which the key is, and the key where the store knows it."""
    places, key = [], f"with hash {key_hash:016x}"
    for block in store.blocks:
        for row in np.flatnonzero(_key_hashes(store, block) == key_hash):
            places.append(f"{store.created.dataset.tars[block].file} (row {row})")
            if store.created.keeps_digests:
                key = f"'{unpack_keys(store.read(block, 0, ['key'])['key'][row : row + 1].astype(np.uint8))[0]}'"
    raise DataError(
        f"{store.place}: key {key} is that of {len(places)} samples: {', '.join(places[:5])}. Keys of a split must be "
        "unique: pack the dataset again, and capture it into another --store."
    )


def _key_hashes(store: Store, block: int) -> NDArray[np.uint64]:
    """`[rows]`"""
    return store.read(block, 0, ["key_hash"])["key_hash"].astype(np.uint64)
