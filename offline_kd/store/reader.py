"""Open a store and read blocks from it.

Nothing is handed out that was not checked: every object's size and sha256 against the ledger each time it is read, and
the bytes that were hashed are the bytes that are decoded. Decoding follows `schema.py`, never the metadata on disk.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from offline_kd.errors import RecipeError, StoreCorrupt, StoreError, StoreIncomplete
from offline_kd.manifest import M, parse
from offline_kd.store.schema import (
    SCHEMA_VERSION,
    ArraySpec,
    LedgerEntry,
    StoreIdentity,
    StoreManifest,
    TablesEntry,
    array_specs,
    create_array,
    ledger_name,
    store_digest,
    table_specs,
    tables_ledger_name,
)

KEEP_BYTES = 2**28  # of decoded arrays, in each process

Arrays = dict[str, NDArray[np.generic]]
REDO = "delete ledger/{} and run the same `offline-kd cache-teacher` command again, or copy the store again."


class ChunkDecoder:
    """Decodes single objects of one array in memory, with the codecs that the schema prescribes."""

    def __init__(self, spec: ArraySpec) -> None:
        self.spec, self.store = spec, MemoryStore()
        self.array = create_array(self.store, spec)

    def decode(self, content: bytes, block: int, group: int) -> NDArray[np.generic]:
        """The chunk `[*spec.chunks]` encoded in `content`."""
        key = self.spec.object_key(block, group)
        sync(self.store.set(key, default_buffer_prototype().buffer.from_bytes(content)))
        try:
            return np.asarray(self.array[self.spec.region(block, group)])
        finally:
            sync(self.store.delete(key))


@dataclass(frozen=True)
class Store:
    """A store whose blocks are all committed; `manifest` is None only while it is being finished."""

    path: Path
    identity: StoreIdentity
    ledger: list[LedgerEntry]
    tables: list[TablesEntry]
    manifest: StoreManifest | None
    kept: dict[tuple[int, int, str], NDArray[np.generic]] = field(default_factory=dict, repr=False)

    @property
    def digest(self) -> str:
        return store_digest(self.identity, self.ledger, self.tables)

    @cached_property
    def entries(self) -> dict[tuple[int, int], LedgerEntry]:
        """Ledger entries by block and view group."""
        starts = {group.start: index for index, group in enumerate(self.identity.groups)}
        return {(entry.block, starts[entry.first_view]): entry for entry in self.ledger if entry.first_view in starts}

    @cached_property
    def decoders(self) -> dict[str, ChunkDecoder]:
        tables = [spec for name in self.identity.decisions for spec in table_specs(self.identity, name)]
        return {spec.name: ChunkDecoder(spec) for spec in [*array_specs(self.identity), *tables]}

    @cached_property
    def row_index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """All key hashes, sorted, and the row of each: where a sample is, whatever tar it came in.

        Raises StoreCorrupt when two rows have one key hash.
        """
        rows_per_block = self.identity.rows_per_block
        hashes, rows = [], []
        for block in range(self.identity.num_blocks):
            key_hash = self.read(block, 0, ["key_hash"])["key_hash"].astype(np.uint64)
            hashes.append(key_hash)
            rows.append(block * rows_per_block + np.arange(len(key_hash)))
        all_hashes, all_rows = np.concatenate(hashes), np.concatenate(rows)
        order = np.argsort(all_hashes, kind="stable")
        all_hashes, all_rows = all_hashes[order], all_rows[order]
        twice = np.flatnonzero(all_hashes[1:] == all_hashes[:-1])
        if len(twice):
            first, second = all_rows[twice[0]], all_rows[twice[0] + 1]
            raise StoreCorrupt(
                f"{self.path}: rows {first} and {second} have one key hash: a key is used twice in the dataset "
                f"(tars {self.identity.dataset.tars[first // rows_per_block].file} and "
                f"{self.identity.dataset.tars[second // rows_per_block].file}). Repack it and capture again."
            )
        return all_hashes, all_rows

    def read(self, block: int, group: int, names: Iterable[str]) -> Arrays:
        """Arrays of one block and view group, `[rows, ...]`; probes `[P, ...]`.

        Raises StoreIncomplete for a missing object and StoreCorrupt for one that is not what was committed.
        """
        return {name: self._read_one(self.entries[block, group], block, group, name) for name in names}

    def _read_one(self, entry: LedgerEntry, block: int, group: int, name: str) -> NDArray[np.generic]:
        if (block, group, name) in self.kept:
            return self.kept[block, group, name]
        decoder = self.decoders[name]
        content = self._verified(entry, decoder.spec.object_key(block, group))
        chunk = decoder.decode(content, block, group)
        array = chunk[0, 0] if name.startswith("probe/") else chunk[: entry.rows]
        # Small stores are read once: a later epoch takes what was verified then.
        if sum(one.nbytes for one in self.kept.values()) + array.nbytes <= KEEP_BYTES:
            self.kept[block, group, name] = array
        return array

    def read_tables(self, name: str) -> Arrays:
        """The templates (or LDA and sub-classes) behind decisions of that name, by the last part of their names."""
        entry = next((entry for entry in self.tables if entry.decisions == name), None)
        if entry is None:
            raise StoreIncomplete(
                f"{self.path}: the templates of '{name}' are missing: capture or copy the store again."
            )
        return {
            spec.name.rsplit("/", 1)[-1]: self.decoders[spec.name].decode(
                self._verified(entry, spec.object_key(0, 0)), 0, 0
            )
            for spec in table_specs(self.identity, name)
        }

    def check_sizes(self, block: int, group: int) -> None:
        """Make sure, without reading, that every object of a block and view group is there with its size."""
        if (block, group) not in self.entries:
            name = ledger_name(block, self.identity.groups[group])
            raise StoreIncomplete(f"{self.path}: manifest.json lacks the entry {name}: {REDO.format(name)}")
        entry = self.entries[block, group]
        for spec in array_specs(self.identity):
            key = spec.object_key(block, group)
            try:
                found = os.stat(self.path / "targets.zarr" / key).st_size
            except FileNotFoundError:
                found = None
            self._compare(entry, key, found)

    def _verified(self, entry: LedgerEntry | TablesEntry, key: str) -> bytes:
        try:
            content = (self.path / "targets.zarr" / key).read_bytes()
        except FileNotFoundError:
            self._compare(entry, key, None)
            raise
        self._compare(entry, key, len(content), hashlib.sha256(content).hexdigest())
        return content

    def _compare(
        self, entry: LedgerEntry | TablesEntry, key: str, found_bytes: int | None, found_sha256: str | None = None
    ) -> None:
        expected = entry.objects.get(key)
        where, redo = f"{self.path}/targets.zarr/{key}", REDO.format(entry.file_name)
        if expected is None:
            raise StoreCorrupt(f"{where}: the ledger entry {entry.file_name} does not vouch for it: {redo}")
        if found_bytes is None:
            raise StoreIncomplete(f"{where}: missing, though {entry.file_name} was committed: {redo}")
        if found_bytes != expected.bytes:
            raise StoreCorrupt(f"{where}: {found_bytes:,} bytes, committed were {expected.bytes:,}: {redo}")
        if found_sha256 not in (None, expected.sha256):
            raise StoreCorrupt(f"{where}: sha256 {found_sha256}, committed was {expected.sha256}: {redo}")


def open_store(path: Path) -> Store:
    """Open a finished store, making sure that every object it vouches for is there with its size.

    Raises StoreIncomplete when something is missing and StoreCorrupt when parts disagree.
    """
    identity = read_identity(path)
    if not (path / "manifest.json").is_file():
        missing = missing_entries(path, identity)
        total = identity.num_blocks * len(identity.groups)
        raise StoreIncomplete(
            f"{path}: not finished: {len(missing)} of {total} blocks are missing"
            f"{f', the first is ledger/{missing[0]}' if missing else ', only manifest.json'}. "
            "Run the same `offline-kd cache-teacher` command again: it resumes and finishes."
        )
    manifest = _parse_file(StoreManifest, path / "manifest.json")
    store = Store(path, identity, manifest.entries, manifest.tables, manifest)
    if store.digest != manifest.digest:
        raise StoreCorrupt(
            f"{path}: store.json and the ledger in manifest.json have digest {store.digest[:16]}..., manifest.json "
            f"says {manifest.digest[:16]}.... Something was changed after the store was finished: copy it again."
        )
    for block in range(identity.num_blocks):
        for group in range(len(identity.groups)):
            store.check_sizes(block, group)
    return store


def read_identity(path: Path) -> StoreIdentity:
    """`store.json`; raises StoreError when there is none or when a newer version of this package wrote it."""
    file = path / "store.json"
    if not file.is_file():
        raise StoreError(f"{path}: no teacher store there (no store.json). Make one with `offline-kd cache-teacher`.")
    content = _read_json(file)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise StoreError(
            f"{path}: schema version {version}, this offline-kd reads up to {SCHEMA_VERSION}. "
            "Upgrade: pip install --upgrade offline-kd."
        )
    return _parse_file(StoreIdentity, file)


def read_entry(file: Path, identity: StoreIdentity) -> LedgerEntry:
    entry = _parse_file(LedgerEntry, file)
    if entry.file_name != file.name or not 0 <= entry.block < identity.num_blocks:
        raise StoreCorrupt(f"{file}: speaks of block {entry.block}, {entry.file_name}. Restore or delete it.")
    return entry


def read_tables_entry(file: Path) -> TablesEntry:
    return _parse_file(TablesEntry, file)


def missing_entries(path: Path, identity: StoreIdentity) -> list[str]:
    """Names of the ledger entries that a complete store would have and this one has not."""
    names = [tables_ledger_name(name) for name in identity.decisions]
    names += [ledger_name(block, views) for block in range(identity.num_blocks) for views in identity.groups]
    present = set(os.listdir(path / "ledger")) if (path / "ledger").is_dir() else set()
    return [name for name in names if name not in present]


def _read_json(file: Path) -> object:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise StoreCorrupt(
            f"{file}: not readable as JSON ({error}). Restore the file, or copy the store again."
        ) from error


def _parse_file(model: type[M], file: Path) -> M:
    try:
        return parse(model, _read_json(file), where=str(file))
    except RecipeError as error:
        raise StoreCorrupt(f"{error}. Restore the file, or copy the store again.") from error
