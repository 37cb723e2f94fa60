"""Create a store, commit blocks to it, finish it.

A block (of a view group) is committed by its ledger entry, which is created exclusively and last, after the objects it
vouches for were written, read back, hashed and flushed to disk. A writer that dies leaves no entry, and whoever comes
next does the block again.
"""

import contextlib
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from offline_kd.errors import StoreCorrupt, StoreMismatch
from offline_kd.files import create_exclusively, flush_to_disk, write_atomically
from offline_kd.store.reader import Arrays, ChunkDecoder, read_entry, read_identity, read_tables_entry
from offline_kd.store.schema import (
    ArraySpec,
    LedgerEntry,
    StoredObject,
    StoreIdentity,
    StoreManifest,
    TablesEntry,
    array_specs,
    create_array,
    ledger_name,
    table_specs,
    tables_ledger_name,
)

ABANDONED_SECONDS = 3600


def create_or_resume(path: Path, identity: StoreIdentity) -> StoreIdentity:
    """Create the store, or make sure that the one at `path` has this identity; returns the one on disk.

    Raises StoreMismatch naming the first field that differs.
    """
    (path / "ledger").mkdir(parents=True, exist_ok=True)
    content = json.dumps(identity.model_dump(mode="json"), indent=2) + "\n"
    if not create_exclusively(path / "store.json", content):
        existing = read_identity(path)
        difference = _first_difference(existing.model_dump(mode="json"), identity.model_dump(mode="json"))
        if difference:
            raise StoreMismatch(
                f"{path}: holds another capture: {difference}. "
                "Give another --store folder, or repeat the recipe and data that this store was begun with."
            )
        identity = existing
    targets = LocalStore(path / "targets.zarr")
    zarr.open_group(targets, mode="a", zarr_format=3)
    tables = [spec for name in identity.decisions for spec in table_specs(identity, name)]
    for spec in [*array_specs(identity), *tables]:
        if not (path / "targets.zarr" / spec.name / "zarr.json").is_file():
            create_array(targets, spec)
    for partial in path.rglob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # another writer swept it first
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                partial.unlink()
    return identity


def _first_difference(existing: object, wanted: object, where: str = "") -> str:
    if isinstance(existing, dict) and isinstance(wanted, dict):
        for name in sorted({*existing, *wanted}):
            if not where and name == "versions":
                continue
            difference = _first_difference(existing.get(name), wanted.get(name), f"{where}.{name}".lstrip("."))
            if difference:
                return difference
        return ""
    if where == "teacher.measured_top1" and isinstance(existing, float) and isinstance(wanted, float):
        return ""  # rounding differs between machines; weights_sha256 says which teacher it is
    return "" if existing == wanted else f"its {where} is {existing!r:.200}, this run's is {wanted!r:.200}"


def committed(path: Path, identity: StoreIdentity, block: int, views: range) -> LedgerEntry | None:
    """The ledger entry of a block and view group, if it was committed."""
    file = path / "ledger" / ledger_name(block, views)
    return read_entry(file, identity) if file.is_file() else None


def committed_tables(path: Path, name: str) -> TablesEntry | None:
    file = path / "ledger" / tables_ledger_name(name)
    return read_tables_entry(file) if file.is_file() else None


def commit(
    path: Path, identity: StoreIdentity, block: int, group: int, arrays: Arrays, *, tar: str, tar_sha256: str
) -> LedgerEntry:
    """Write every array of one block and view group, prove that disk holds them, then vouch for them in the ledger.

    Args:
        arrays: by array name, rows of the block first (`[rows, ...]` or `[rows, views, ...]`; probes `[P, ...]`).

    Raises:
        StoreCorrupt: when what was read back differs from what was written.
    """
    views, rows = identity.groups[group], len(arrays["key_hash"])
    objects = _write_objects(path / "targets.zarr", array_specs(identity), arrays, block, group)
    entry = LedgerEntry(
        block=block,
        first_view=views.start,
        end_view=views.stop,
        rows=rows,
        tar=tar,
        tar_sha256=tar_sha256,
        objects=objects,
    )
    create_exclusively(path / "ledger" / entry.file_name, entry.model_dump_json(indent=1) + "\n")
    return entry


def commit_tables(
    path: Path, identity: StoreIdentity, name: str, arrays: Arrays, statistics: dict[str, float]
) -> TablesEntry:
    """The same for the templates that decisions of that name refer to; `arrays` by full array name."""
    objects = _write_objects(path / "targets.zarr", table_specs(identity, name), arrays, 0, 0)
    entry = TablesEntry(decisions=name, objects=objects, statistics=statistics)
    create_exclusively(path / "ledger" / entry.file_name, entry.model_dump_json(indent=1) + "\n")
    return entry


def _write_objects(
    root: Path, specs: list[ArraySpec], arrays: Arrays, block: int, group: int
) -> dict[str, StoredObject]:
    """Write one object of every array, read each back, compare, hash and flush it."""
    targets = LocalStore(root)
    objects: dict[str, StoredObject] = {}
    for spec in specs:
        chunk = np.full(spec.chunks, spec.fill, dtype=spec.dtype)
        values = arrays[spec.name]
        chunk_view = chunk[0, 0] if spec.name.startswith("probe/") else chunk
        chunk_view[tuple(slice(size) for size in values.shape)] = values
        array = zarr.open_array(targets, path=spec.name, mode="r+").with_config({"write_empty_chunks": True})
        array[spec.region(block, group)] = chunk
        key = spec.object_key(block, group)
        content = (root / key).read_bytes()
        if not _same(ChunkDecoder(spec).decode(content, block, group), chunk):
            raise StoreCorrupt(
                f"{root / key}: what was read back is not what was written. "
                "Check the disk and run the same command again: the block was not committed."
            )
        objects[key] = StoredObject(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        flush_to_disk(root / key)
    return objects


def _same(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def write_manifest(path: Path, manifest: StoreManifest, card: str) -> None:
    """Declare the store complete: the card first, the manifest last. An earlier manifest is replaced."""
    write_atomically(path / "README.md", card)
    write_atomically(path / "manifest.json", manifest.model_dump_json(indent=1) + "\n")
