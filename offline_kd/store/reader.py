"""Open a store, wherever it lies, and read blocks from it.

Nothing is handed out that was not checked: every page of hashes against the manifest, every ledger entry against its
page, every object's size and sha256 against its entry, each time it is read, and the bytes that were hashed are the
bytes that are decoded. Pages and entries are read when a block of theirs is first wanted.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from offline_kd.store.chunks import decode_chunk, most_object_bytes
from offline_kd.store.codecs import CODEC_TABLES
from offline_kd.store.layout import ArraySpec, Part, parts_of
from offline_kd.store.memory import Memory
from offline_kd.store.objects import ENTRY_BYTES
from offline_kd.store.schema import (
    KINDS,
    PAGE_BLOCKS,
    Addition,
    LedgerEntry,
    StoredObject,
    StoreIdentity,
    StoreManifest,
    TablesEntry,
    kind_of,
    ledger_name,
    page_name,
    tables_ledger_name,
)
from offline_kd.support.downloads import Downloads
from offline_kd.support.errors import RecipeError, StoreCorrupt, StoreIncomplete
from offline_kd.support.places import Place
from offline_kd.support.proven import REPAIR, read_proven
from offline_kd.support.strict import M, parse

READ_BYTES = 2**28  # of objects that are held at once, stored and decoded
MAX_VALUES = 2**18, 32  # in a JSON file: so many, or one for so many bytes
IN_PART = 100  # blocks whose keys are read together
HASH_BYTES = 32

Arrays = dict[str, NDArray[np.generic]]
Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Store:
    """A store of which every block is committed, as seen by those who want the targets of one of its teachers.

    `manifest` is None only while the store is being finished.
    """

    place: Place
    created: StoreIdentity  # as in store.json
    additions: list[Addition]
    targets: str  # "" are the first ones
    identity: StoreIdentity  # with teacher, codec and decisions of these targets, and the views that are stored
    listed: dict[str, str]  # sha256 by file name of pages and tables; of every ledger entry where there are no pages
    digest: str
    manifest: StoreManifest | None = None
    downloads: Downloads | None = field(default=None, repr=False)
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: without what follows from the fields, and without threads."""
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    @cached_property
    def parts(self) -> dict[str, Part]:
        return parts_of(self.created, self.additions)

    @cached_property
    def arrays(self) -> dict[str, tuple[Part, ArraySpec]]:
        """The part and description of every array of these targets, by the name that readers ask for."""
        return {
            spec.name: (part, spec)
            for part in self.parts.values()
            for spec in part.specs
            if part.targets == self.targets or (part.name == "" and kind_of(spec.name) not in KINDS)
        }

    @property
    def has_logits(self) -> bool:
        """Whether logits are here: not in a copy without them, and not of a teacher that has no classes."""
        held, codec = self.manifest.held if self.manifest else None, self.identity.codec
        return bool(codec.arrays() or codec.of_features) and (held is None or held.has("logits/"))

    @cached_property
    def codec_tables(self) -> Arrays:
        """What the codec of the logits learned from the teacher; nothing for most."""
        return self.read_tables(CODEC_TABLES) if self.identity.codec.has_tables else {}

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.place.parallel, thread_name_prefix="store")

    @cached_property
    def block_of_tar(self) -> dict[str | None, int]:
        """The block of a tar's sha256: of the manifest, or of what was captured where that had none."""
        tars = self.created.dataset.tars
        found = {tars[block].sha256: block for block in self.blocks if tars[block].sha256 is not None}
        others = [block for block in self.blocks if tars[block].sha256 is None]
        captured = self.side_by_side(lambda block: self.entry("", block, 0).tar_sha256, others)
        return {**found, **dict(zip(captured, others, strict=True))}

    @property
    def blocks(self) -> range:
        """The numbers of the blocks that are here: all, except in a partial copy."""
        held = self.manifest.held if self.manifest else None
        return range(held.first_block, held.end_block) if held else range(self.created.num_blocks)

    @cached_property
    def row_index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """All key hashes, sorted, and the row of each: where a sample is, whatever tar it came in.

        Raises StoreCorrupt when two rows have one key hash.
        """

        def of_block(block: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
            hashes = self._read_one(block, 0, "key_hash").astype(np.uint64)
            # Alone first: a block that unpacks to millions of equal keys must not be one of many in memory.
            return self._in_order(hashes, block * self.identity.rows_per_block + np.arange(len(hashes)))

        found: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        at_once = self.at_once(IN_PART)
        for start in range(0, len(self.blocks), at_once):
            found += self.side_by_side(of_block, self.blocks[start : start + at_once])
        return self._in_order(np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found]))

    def _in_order(
        self, hashes: NDArray[np.uint64], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        order = np.argsort(hashes, kind="stable")
        hashes, rows = hashes[order], rows[order]
        twice = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(twice):
            first, second = rows[twice[0]], rows[twice[0] + 1]
            tars, per_block = self.identity.dataset.tars, self.identity.rows_per_block
            raise StoreCorrupt(
                f"{self.place}: rows {first} and {second} have one key hash: a key is used twice in the dataset "
                f"(tars {tars[first // per_block].file} and {tars[second // per_block].file}). Repack it and capture "
                "again."
            )
        return hashes, rows

    def at_once(self, most: int) -> int:
        """How many of the largest objects may be held at once, stored and decoded: `most`, if they are small."""
        largest = max(spec.chunk_bytes for part in self.parts.values() for spec in part.all_specs)
        return max(1, min(most, READ_BYTES // (2 * largest)))

    def side_by_side(self, work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
        """`work` on every item: at the same time, where a request takes long."""
        return list(self._threads.map(work, items) if self.place.is_remote else map(work, items))

    def read(self, block: int, group: int, names: Iterable[str]) -> Arrays:
        """Arrays of one block and view group, `[rows, ...]`; probes `[P, ...]`.

        Raises StoreIncomplete for a missing object and StoreCorrupt for one that is not what was committed.
        """
        wanted = list(names)
        found = self.side_by_side(lambda name: self._read_one(block, group, name), wanted)
        return dict(zip(wanted, found, strict=True))

    def _read_one(self, block: int, group: int, name: str) -> NDArray[np.generic]:
        part, spec = self.arrays[name]
        place = (block, -1 if spec.extent == "block" else group, name)
        kept = self.memory.kept.get(place)
        if kept is not None:
            return kept
        coming = self.memory.coming.pop(place, None)
        content = coming[0].result() if coming else self._content(block, group, name)
        entry = self.entry(part.name, block, group)
        chunk = decode_chunk(spec, content, f"{self.place}/targets.zarr/{spec.object_key(block, group)}")
        array = chunk[0, 0] if name.startswith("probe/") else chunk[: entry.rows]
        self.memory.keep(place, array, chunk.nbytes)
        return array

    def _content(self, block: int, group: int, name: str) -> bytes:
        part, spec = self.arrays[name]
        return self.verified(self.entry(part.name, block, group), spec, block, group)

    def fetch_ahead(self, block: int, group: int, names: Iterable[str]) -> None:
        """Begin to fetch what `read` with the same arguments will want, while it fits; errors come out there.

        Bytes only: a second thread that runs torch operations makes those of the first slower by a third on two cores,
        because OpenMP's threads then sleep, instead of waiting for the next operation.
        """
        for name in names:
            spec, memory = self.arrays[name][1], self.memory
            place = (block, -1 if spec.extent == "block" else group, name)
            known = place in memory.kept or place in memory.coming
            if not known and memory.has_room_ahead(spec.chunk_bytes):
                memory.coming[place] = self._threads.submit(self._content, block, group, name), spec.chunk_bytes

    def read_tables(self, name: str) -> Arrays:
        """The templates (or LDA and sub-classes) behind decisions or features, by the last part of their names.

        Raises StoreCorrupt also for tables of the codec that cannot be what it learned.
        """
        part = next(
            (part for part in self.parts.values() if part.targets == self.targets and name in part.tables), None
        )
        if part is None:
            raise StoreIncomplete(f"{self.place}: there are no templates of '{name}': capture or copy the store again.")
        held, kind = self.manifest.held if self.manifest else None, part.kind_of_tables(name)
        if held and not held.has(kind):
            raise StoreIncomplete(
                f"{self.place}: this copy holds {held.arrays} only, not the tables of {kind[:-1]}. Pull these too."
            )
        entry = self.tables_entry(part.name, name)
        arrays: Arrays = {}
        for spec in part.tables[name]:
            where = f"{self.place}/targets.zarr/{spec.object_key(0, 0)}"
            arrays[spec.name.rsplit("/", 1)[-1]] = decode_chunk(spec, self.verified(entry, spec, 0, 0), where)
        if name == CODEC_TABLES and (problem := part.codec.problem_of(arrays)):
            raise StoreCorrupt(
                f"{self.place}/ledger/{entry.file_name}: vouches for tables of codec {part.codec.name} with {problem}. "
                "Whoever wrote this store was faulty: capture it again."
            )
        return arrays

    def tables_statistics(self, name: str) -> dict[str, float]:
        part = next(part for part in self.parts.values() if part.targets == self.targets and name in part.tables)
        return self.tables_entry(part.name, name).statistics

    # ---- the ledger ------------------------------------------------------------------------------------------------

    def entry(self, part: str, block: int, group: int) -> LedgerEntry:
        """What the ledger says of a block and view group; raises StoreIncomplete for one that is not here."""
        if block not in self.blocks:
            raise StoreIncomplete(
                f"{self.place}: this copy holds blocks {self.blocks.start} to {self.blocks.stop - 1}, not {block} (tar "
                f"{self.created.dataset.tars[block].file}). Pull that too, or train on these tars: --set data.tars=..."
            )
        return self.block_entry(part, block, self.identity.groups[group])

    def block_entry(self, part: str, block: int, views: range) -> LedgerEntry:
        """As `entry`, for blocks and views that the store has, whether or not these targets do."""
        name = ledger_name(block, views, part)
        entry = self._entry(name, LedgerEntry, lambda: self.sha256_of(part, block, views))
        if not 0 < entry.rows <= self.created.rows_per_block:
            raise StoreCorrupt(
                f"{self.place}/ledger/{name}: says {entry.rows} rows, a block has 1 to "
                f"{self.created.rows_per_block}: {REPAIR}"
            )
        return entry

    def tables_entry(self, part: str, name: str) -> TablesEntry:
        file = tables_ledger_name(name, part)
        return self._entry(file, TablesEntry, lambda: self.sha256_listed(file))

    def sha256_of(self, part: str, block: int, views: range) -> str:
        """Of the ledger entry of a block: as its page says, or the manifest where there are no pages."""
        name, page = ledger_name(block, views, part), page_name(block, views, part)
        if not self.created.has_pages or name in self.listed:  # an unfinished store lists what it has been told of
            return self.sha256_listed(name)
        content = self.memory.pages.get(page)
        if content is None:
            content = self.memory.once(page, lambda: self._page(page, block))
        at = block % PAGE_BLOCKS * HASH_BYTES
        return content[at : at + HASH_BYTES].hex()

    def sha256_listed(self, name: str) -> str:
        if name not in self.listed:
            raise StoreIncomplete(f"{self.place}: manifest.json lacks the entry {name}: {REPAIR}")
        return self.listed[name]

    def _page(self, name: str, block: int) -> bytes:
        """The sha256 of the entries of a page, one after the other."""
        if name in self.memory.pages:
            return self.memory.pages[name]
        size = page_bytes(self.created, block)
        content = self._proven(f"hashes/{name}", self.sha256_listed(name), size, size)
        self.memory.remember_page(name, content)
        return content

    def _proven(self, file: str, sha256: str, limit: int, size: int | None = None) -> bytes:
        try:
            return read_proven(self.place, file, sha256, size=size, limit=limit, downloads=self.downloads)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreIncomplete(f"{self.place}/{file}: missing, though manifest.json lists it: {REPAIR}") from None

    def _entry(self, name: str, model: type[M], sha256: Callable[[], str]) -> M:
        def ask() -> LedgerEntry | TablesEntry:
            if name in self.memory.parsed:
                return self.memory.parsed[name]
            content = self._proven(f"ledger/{name}", sha256(), ENTRY_BYTES)
            parsed: Any = parse_metadata(model, content, f"{self.place}/ledger/{name}")
            if parsed.file_name != name:
                raise StoreCorrupt(f"{self.place}/ledger/{name}: speaks of {parsed.file_name}: {REPAIR}")
            self.memory.remember(name, parsed, len(content))
            entry: LedgerEntry | TablesEntry = parsed
            return entry

        found = self.memory.parsed.get(name) or self.memory.once(name, ask)
        assert isinstance(found, model)
        return found

    def verified(self, entry: LedgerEntry | TablesEntry, spec: ArraySpec, block: int, group: int) -> bytes:
        """The content of the object that holds a block of an array, after checking that it is what was committed."""
        held = self.manifest.held if self.manifest else None
        if held and not held.has(spec.name):
            raise StoreIncomplete(f"{self.place}: this copy holds {held.arrays} only, not {spec.name}. Pull that too.")
        key = spec.object_key(block, group)
        expected = self.vouched(entry, spec, key)
        try:
            return read_proven(
                self.place,
                f"targets.zarr/{key}",
                expected.sha256,
                size=expected.bytes,
                limit=expected.bytes,
                downloads=self.downloads,
            )
        except (FileNotFoundError, NotADirectoryError):
            raise StoreIncomplete(
                f"{self.place}/targets.zarr/{key}: missing, though {entry.file_name} was committed: {REPAIR}"
            ) from None

    def vouched(self, entry: LedgerEntry | TablesEntry, spec: ArraySpec, key: str) -> StoredObject:
        """What an entry says of an object; raises StoreCorrupt when it says nothing, or what cannot be."""
        expected = entry.objects.get(key)
        if expected is None:
            known = tuple(f"{one.path}/c" for part in self.parts.values() for one in part.all_specs)
            if strange := next((one for one in entry.objects if not one.startswith(known)), None):
                raise StoreCorrupt(
                    f"{self.place}/ledger/{entry.file_name}: vouches for {strange!r}, not for {key}: what this store "
                    "holds is in a form that this version does not read. Capture the store again."
                )
            raise StoreCorrupt(
                f"{self.place}/targets.zarr/{key}: the ledger entry {entry.file_name} does not vouch for it: {REPAIR}"
            )
        if expected.bytes > most_object_bytes(spec):
            raise StoreCorrupt(
                f"{self.place}/ledger/{entry.file_name}: says that {key} has {expected.bytes:,} bytes, a chunk of "
                f"{spec.chunk_bytes:,} never takes more than {most_object_bytes(spec):,}: {REPAIR}"
            )
        return expected

    def check_size(self, entry: LedgerEntry | TablesEntry, expected: StoredObject, key: str, found: int | None) -> None:
        """Compare an object's size with what its entry says; `found` is what listing the store gave."""
        where = f"{self.place}/targets.zarr/{key}"
        if found != expected.bytes and self.place.is_remote:
            found = self.place.size(f"targets.zarr/{key}")  # listings have no checksum
        if found is None:
            raise StoreIncomplete(f"{where}: missing, though {entry.file_name} was committed: {REPAIR}")
        if found != expected.bytes:
            raise StoreCorrupt(f"{where}: {found:,} bytes, committed were {expected.bytes:,}: {REPAIR}")


def page_bytes(created: StoreIdentity, block: int) -> int:
    """How long the page is that vouches for a block."""
    first = block - block % PAGE_BLOCKS
    return HASH_BYTES * min(PAGE_BLOCKS, created.num_blocks - first)


# ---- metadata -------------------------------------------------------------------------------------------------------


def parse_metadata(model: type[M], content: bytes, where: str) -> M:
    """Checked metadata from JSON; raises StoreCorrupt naming the field that is wrong."""
    return checked(model, read_json(content, where), where)


def read_json(content: bytes, where: str) -> object:
    """Metadata from JSON; raises StoreCorrupt for what is none, or would take many times its size in memory."""
    values, most = sum(map(content.count, (b",", b"[", b"{"))), max(MAX_VALUES[0], len(content) // MAX_VALUES[1])
    if values > most:
        raise StoreCorrupt(
            f"{where}: {len(content):,} bytes with {values:,} values, more than {most:,}: no metadata of ours. Restore "
            "the file, or copy the store again."
        )
    try:
        return json.loads(content)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise StoreCorrupt(
            f"{where}: not readable as JSON ({error}). Restore the file, or copy the store again."
        ) from error


def checked(model: type[M], content: object, where: str) -> M:
    try:
        return parse(model, content, where=where)
    except RecipeError as error:
        raise StoreCorrupt(f"{error}. Restore the file, or copy the store again.") from error


def stored_object(content: bytes) -> StoredObject:
    return StoredObject(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
