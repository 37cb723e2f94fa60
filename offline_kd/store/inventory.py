"""What a store must have: ledger entries and pages of hashes; and what is there, by listing it once.

A listing may have millions of files: it is gone through as it comes, and what is kept of it is a few bytes a file.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offline_kd.store.layout import RECIPE_FILE, ArraySpec, Part, small_files
from offline_kd.store.reader import Store, page_bytes
from offline_kd.store.schema import PAGE_BLOCKS, Held, StoreIdentity, ledger_name, page_name, tables_ledger_name
from offline_kd.support.errors import StoreError
from offline_kd.support.places import Place
from offline_kd.views.epochs import view_groups

MAX_OTHERS = 2**20  # files that are neither objects nor ledger entries
DIGITS = 6  # of a block's number in the name of its ledger entry, or more


@dataclass(frozen=True)
class PromisedEntry:
    """A ledger entry that a store, or a part of it, must have, and the arrays whose objects it vouches for."""

    name: str
    part: str
    decisions: str  # or features, whose templates these are; '' for a block
    block: int
    group: int
    views: range  # of that group; empty for templates
    specs: list[ArraySpec]

    @property
    def page(self) -> str:
        """Of hashes, that vouches for it; not for templates."""
        return page_name(self.block, self.views, self.part)

    @property
    def keys(self) -> list[str]:
        return [spec.object_key(self.block, self.group) for spec in self.specs]


def promised_entries(store: Store, held: Held | None) -> Iterator[PromisedEntry]:
    """The ledger entries of every part, those of a block together, as far as a copy that holds so much (None: all) has
    them."""
    for part in store.parts.values():
        for name, specs in part.tables.items():
            if held is None or held.has(part.kind_of_tables(name)):
                yield PromisedEntry(tables_ledger_name(name, part.name), part.name, name, 0, 0, range(0), specs)
        specs = [spec for spec in part.specs if held is None or held.has(spec.name)]
        groups = promised_groups(store, part, held)
        for block in held_blocks(store, held) if specs else ():
            for index, views in enumerate(groups):
                name = ledger_name(block, views, part.name)
                yield PromisedEntry(name, part.name, "", block, index, views, specs)


def num_promised(store: Store, held: Held | None) -> int:
    """How many ledger entries those are, or a few more: for a progress bar."""
    blocks = len(held_blocks(store, held))
    return sum(len(part.tables) + blocks * len(promised_groups(store, part, held)) for part in store.parts.values())


def promised_groups(store: Store, part: Part, held: Held | None) -> list[range]:
    """The view groups of a part, as far as a copy that holds so much has them."""
    assert store.manifest is not None
    num_views = store.manifest.views[part.name]
    wanted = min(num_views, held.views) if held else num_views
    return [group for group in view_groups(num_views, store.created.views_per_group) if group.start < wanted]


def held_blocks(store: Store, held: Held | None) -> range:
    return range(held.first_block, held.end_block) if held else range(store.created.num_blocks)


def promised_pages(store: Store, held: Held | None) -> dict[str, int]:
    """Length by name of the pages of hashes that vouch for these entries; none where the manifest does by itself."""
    if not store.created.has_pages:
        return {}
    blocks = held_blocks(store, held)
    firsts = range(blocks.start - blocks.start % PAGE_BLOCKS, blocks.stop, PAGE_BLOCKS)
    return {
        page_name(block, views, part.name): page_bytes(store.created, block)
        for part in store.parts.values()
        if held is None or any(held.has(spec.name) for spec in part.specs)
        for views in promised_groups(store, part, held)
        for block in firsts
    }


def few_files(store: Store, held: Held | None) -> set[str]:
    """The files of a store of which there are few: all but the objects and ledger entries of blocks."""
    tables = [(name, part.name, specs) for part in store.parts.values() for name, specs in part.tables.items()]
    return {
        "manifest.json",
        RECIPE_FILE,
        *small_files(store.additions, store.parts),
        *(f"hashes/{name}" for name in promised_pages(store, held)),
        *(f"ledger/{tables_ledger_name(name, part)}" for name, part, _ in tables),
        *(f"targets.zarr/{spec.object_key(0, 0)}" for _, _, specs in tables for spec in specs),
    }


# ---- what is there -------------------------------------------------------------------------------------------------


def committed(place: Place, created: StoreIdentity, views: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
    """By part, `[blocks, groups]`: what of so many views has a ledger entry. Lists the ledger, and reads nothing."""
    found, columns = dict[str, NDArray[np.bool_]](), dict[str, NDArray[np.bool_]]()
    for part, num_views in views.items():
        groups = view_groups(num_views, created.views_per_group)
        found[part] = np.zeros((created.num_blocks, len(groups)), dtype=bool)
        columns |= {_ending(group, part): found[part][:, index] for index, group in enumerate(groups)}
    for name in place.names("ledger"):
        block, ending = _split(name.removeprefix("ledger/"))
        if ending in columns and block < created.num_blocks:
            columns[ending][block] = True
    return found


def whole_views(place: Place, created: StoreIdentity, parts: Iterable[str]) -> dict[str, int]:
    """How many views of every part are committed for all blocks, where any are: what a lost manifest said."""
    counts = Counter(_split(name.removeprefix("ledger/"))[1] for name in place.names("ledger"))
    views = {}
    for part in parts:
        for group in view_groups(created.views.num_distinct, created.views_per_group):
            if counts[_ending(group, part)] < created.num_blocks:
                break
            views[part] = group.stop
    return views


def _ending(views: range, part: str) -> str:
    """Of the names of ledger entries: all but the block's number."""
    return ledger_name(0, views, part)[DIGITS:]


def _split(name: str) -> tuple[int, str]:
    """The block and the rest of the name of a ledger entry; -1 and '' for what is none."""
    number = name.partition("-")[0]
    if not (number.isascii() and number.isdigit() and DIGITS <= len(number) <= 9):
        return -1, ""
    if len(number) > DIGITS and number[0] == "0":
        return -1, ""
    return int(number), name[len(number) :]


class Listing:
    """The size of every file of a store that was listed, in 8 bytes for each object and ledger entry."""

    def __init__(self, store: Store, files: Iterable[tuple[str, int]]) -> None:
        assert store.manifest is not None
        per_group, views = store.created.views_per_group, store.manifest.views
        self.specs = {spec.path: spec for part in store.parts.values() for spec in part.specs}
        most = -(-max(views.values()) // per_group)
        # Sizes plus 1. Memory is taken for what is set, not for what a manifest promises.
        self.objects = {
            path: np.zeros((store.created.num_blocks, most if spec.extent == "group" else 1), dtype=np.int64)
            for path, spec in self.specs.items()
        }
        self.entries = {
            _ending(group, part): np.zeros(store.created.num_blocks, dtype=np.int64)
            for part, num_views in views.items()
            for group in view_groups(num_views, per_group)
        }
        self.others: dict[str, int] = {}
        for name, size in files:
            at = self._place(name)
            if at is not None:
                at[0][at[1]] = size + 1
                continue
            self.others[name] = size
            if len(self.others) > MAX_OTHERS:
                raise StoreError(f"{store.place}: has more than {MAX_OTHERS:,} files that are no part of a store.")

    def get(self, name: str) -> int | None:
        """The size of a file; None if it was not there."""
        at = self._place(name)
        if at is None:
            return self.others.get(name)
        size = int(at[0][at[1]]) - 1
        return size if size >= 0 else None

    def beyond(self, store: Store, held: Held | None, known: set[str]) -> list[str]:
        """The files that a copy that holds so much (None: all) does not have, apart from those that are `known`."""
        assert store.manifest is not None
        strange, blocks = set(self.others) - known, held_blocks(store, held)
        for part in store.parts.values():
            wanted = [spec for spec in part.specs if held is None or held.has(spec.name)]
            promised = promised_groups(store, part, held) if wanted else []
            for spec in part.specs:
                groups = len(promised) if spec in wanted else 0
                for block, group in _outside(self.objects[spec.path], blocks, groups):
                    strange.add(f"targets.zarr/{spec.object_key(block, group)}")
            for views in view_groups(store.manifest.views[part.name], store.created.views_per_group):
                sizes = self.entries[_ending(views, part.name)][:, None]
                for block, _ in _outside(sizes, blocks, int(views in promised)):
                    strange.add(f"ledger/{ledger_name(block, views, part.name)}")
        return sorted(strange)

    def _place(self, name: str) -> tuple[NDArray[np.int64], int | tuple[int, int]] | None:
        """Where the size of a file is kept; None for files of which there are few."""
        if name.startswith("ledger/"):
            block, ending = _split(name.removeprefix("ledger/"))
            entries = self.entries.get(ending)
            return (entries, block) if entries is not None and block < len(entries) else None
        path, _, key = name.removeprefix("targets.zarr/").partition("/c/")
        if path not in self.specs:
            return None
        spec, sizes = self.specs[path], self.objects[path]
        numbers = [int(one) if one.isascii() and one.isdigit() and len(one) < 10 else -1 for one in key.split("/")[:2]]
        block, group = numbers[0], numbers[1] if spec.extent == "group" and len(numbers) > 1 else 0
        if not (0 <= block < sizes.shape[0] and 0 <= group < sizes.shape[1]):
            return None
        return (sizes, (block, group)) if name == f"targets.zarr/{spec.object_key(block, group)}" else None


def _outside(sizes: NDArray[np.int64], blocks: range, groups: int) -> Iterator[tuple[int, int]]:
    """Block and group of what is there and lies outside of these blocks and so many groups."""
    there = sizes > 0
    there[blocks.start : blocks.stop, :groups] = False
    for block, group in np.argwhere(there):
        yield int(block), int(group)
