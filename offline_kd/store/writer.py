"""Create a store, commit blocks to it, add to it, finish it: on a disk or in a bucket, from any number of writers.

A block (of a view group) is committed by its ledger entry, which is created exclusively and last, after the objects it
vouches for were written, read back and compared. A writer that dies leaves no entry, and whoever comes next does the
block again. Objects are created exclusively too: what another attempt left is taken if it is the same, and replaced by
the holder of the block's lease only.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from offline_kd.store.chunks import decode_chunk, encode_chunk
from offline_kd.store.layout import ArraySpec, Part, check_bounds, parts_of, zarr_metadata
from offline_kd.store.leftovers import sweep_few
from offline_kd.store.objects import read_metadata
from offline_kd.store.opening import read_identity
from offline_kd.store.reader import Arrays, parse_metadata, stored_object
from offline_kd.store.schema import (
    SCHEMA_VERSION,
    Addition,
    LedgerEntry,
    StoredObject,
    StoreIdentity,
    StoreManifest,
    TablesEntry,
    tables_ledger_name,
)
from offline_kd.support.errors import LeaseLost, StoreCorrupt, StoreMismatch
from offline_kd.support.places import Place
from offline_kd.support.proven import read_proven
from offline_kd.support.strict import differences

IN_PART = 256  # ledger entries that are asked for before the first of them is looked at
GROWS_SINCE = 2  # the schema version from which a store may be added to

E = TypeVar("E", LedgerEntry, TablesEntry)


def create_or_resume(place: Place, identity: StoreIdentity) -> StoreIdentity:
    """Create the store, or make sure that the one at `place` has this identity; returns the one that is there.

    The number of views may differ: which of them a capture makes is its own business. So may the schema version: what
    an earlier offline-kd began stays what it is.

    Raises StoreMismatch naming the first field that differs.
    """
    check_bounds(f"{place}/store.json", parts_of(identity))
    if not place.create("store.json", _json(identity.model_dump(mode="json"))):
        _, existing = read_identity(place)
        if existing.schema_version < GROWS_SINCE:
            raise StoreMismatch(
                f"{place}: is of schema version {existing.schema_version}, which can be read but not added to; this "
                f"offline-kd writes {SCHEMA_VERSION}. Capture it anew into another --store."
            )
        difference = first_difference(existing, identity)
        if difference:
            raise StoreMismatch(
                f"{place}: holds another capture: {difference}. Repeat the recipe and data that this store was begun "
                "with, give another --store, or add another teacher's targets to it with --add."
            )
        identity = existing
    write_zarr_metadata(place, parts_of(identity))
    sweep_few(place)
    return identity


def write_zarr_metadata(place: Place, parts: Mapping[str, Part]) -> None:
    """What zarr needs to read the arrays; files that are there already and right are left alone."""

    def write(name: str, content: bytes) -> None:
        if place.size(name) != len(content):
            place.put(name, content)

    files = zarr_metadata(parts)
    with ThreadPoolExecutor(place.parallel if place.is_remote else 1) as threads:
        list(threads.map(write, files, files.values()))


def first_difference(existing: StoreIdentity | Addition, wanted: StoreIdentity | Addition) -> str:
    """The first field that differs, with both values; '' if only versions, number of views or rounding do."""
    for field, here, this in differences(existing.model_dump(mode="json"), wanted.model_dump(mode="json")):
        if field in ("schema_version", "views.count") or field.startswith("versions."):
            continue
        if field in ("teacher.measured_top1", "teacher.measured_map", "teacher.measured_neighbours.top1"):
            continue  # rounding differs between machines; weights_sha256 says which teacher it is
        return f"its {field} is {here!r:.200}, this run's is {this!r:.200}"
    return ""


def create_addition(place: Place, identity: StoreIdentity, addition: Addition) -> Addition:
    """Announce an addition, or make sure that the one of that name is the same; returns the one that is there."""
    name = f"additions/{addition.name}.json"
    if not place.create(name, _json(addition.model_dump(mode="json"))):
        existing = parse_metadata(Addition, read_metadata(place, name), f"{place}/{name}")
        if difference := first_difference(existing, addition):
            raise StoreMismatch(
                f"{place}: has another addition '{addition.name}': {difference}. Give the recipe another name."
            )
        addition = existing
    write_zarr_metadata(place, parts_of(identity, [addition]))
    return addition


def committed_tables(place: Place, part: str, name: str) -> TablesEntry | None:
    """The ledger entry of the templates behind decisions, if they were committed."""
    file = f"ledger/{tables_ledger_name(name, part)}"
    try:
        return parse_metadata(TablesEntry, read_metadata(place, file), f"{place}/{file}")
    except FileNotFoundError:
        return None


def commit(
    place: Place,
    part: Part,
    group: int,
    entry: LedgerEntry,
    arrays: Arrays,
    still_mine: Callable[[], bool] = lambda: True,
) -> LedgerEntry:
    """Write every array of one block and view group, prove that the store holds them, then vouch for them.

    Args:
        entry: what the ledger shall say, without `objects`.
        arrays: by array name, rows of the block first (`[rows, ...]` or `[rows, views, ...]`; probes `[P, ...]`).
        still_mine: whether this writer still has the block's lease.

    Returns:
        The entry that stands: another writer's, if it was first.

    Raises:
        LeaseLost: when another writer took the block over; nothing of it is vouched for here.
        StoreCorrupt: when what was read back differs from what was written.
    """
    objects = _write_objects(place, part.specs, arrays, entry.block, group, still_mine)
    return _vouch(place, entry.model_copy(update={"objects": objects}), still_mine)


def commit_tables(
    place: Place,
    part: Part,
    name: str,
    arrays: Arrays,
    statistics: dict[str, float],
    still_mine: Callable[[], bool] = lambda: True,
) -> TablesEntry:
    """Write the tables of decisions of that name, prove that the store holds them, then vouch for them.

    Args:
        arrays: by full array name, whole.
        statistics: of the fit, kept in the ledger entry.
        still_mine: whether this writer still has the lease of these tables.

    Returns:
        The entry that stands: another writer's, if it was first.

    Raises:
        LeaseLost: when another writer took the tables over; nothing of them is vouched for here.
        StoreCorrupt: when what was read back differs from what was written.
    """
    objects = _write_objects(place, part.tables[name], arrays, 0, 0, still_mine)
    entry = TablesEntry(addition=part.name, decisions=name, objects=objects, statistics=statistics)
    return _vouch(place, entry, still_mine)


def _vouch(place: Place, entry: E, still_mine: Callable[[], bool]) -> E:
    """Create the ledger file of an entry; returns the one that stands."""
    file = f"ledger/{entry.file_name}"
    _refuse_lost(place, file, still_mine)
    if place.create(file, _entry_bytes(entry)):
        return entry
    standing = parse_metadata(type(entry), read_metadata(place, file), f"{place}/{file}")
    if standing.objects == entry.objects:
        return standing
    # A slow writer vouched for its objects in the very moment in which this one replaced them.
    _refuse_lost(place, file, still_mine)
    place.put(file, _entry_bytes(entry))
    return entry


def _refuse_lost(place: Place, name: str, still_mine: Callable[[], bool]) -> None:
    if not still_mine():
        raise LeaseLost(
            f"{place}/{name}: another writer took this over, because this one showed no sign of life in time. "
            "Nothing is lost: it is done there, and the same command goes on."
        )


def _entry_bytes(entry: LedgerEntry | TablesEntry) -> bytes:
    # Older software reads stores in which nothing was left out.
    nothing = {"left_out"} if not (isinstance(entry, LedgerEntry) and entry.left_out) else None
    return (entry.model_dump_json(indent=1, exclude=nothing) + "\n").encode()


def _write_objects(
    place: Place,
    specs: Sequence[ArraySpec],
    arrays: Arrays,
    block: int,
    group: int,
    still_mine: Callable[[], bool],
) -> dict[str, StoredObject]:
    """Write one object of every array, read each back and compare."""
    objects: dict[str, StoredObject] = {}
    for spec in specs:
        chunk = np.full(spec.chunks, spec.fill, dtype=spec.dtype)
        values = arrays[spec.name]
        inside = chunk[0, 0] if spec.name.startswith("probe/") else chunk
        inside[tuple(slice(size) for size in values.shape)] = values
        content = encode_chunk(spec, chunk)
        key, written = spec.object_key(block, group), stored_object(content)
        name = f"targets.zarr/{key}"
        if not place.create(name, content) and not holds(place, name, written):
            # Left by a writer that died, or being written by one that is slow.
            _refuse_lost(place, name, still_mine)
            place.put(name, content)
        if not holds(place, name, written) or not _same(decode_chunk(spec, content, f"{place}/{name}"), chunk):
            raise StoreCorrupt(
                f"{place}/{name}: what was read back is not what was written. "
                "Check the disk and run the same command again: the block was not committed."
            )
        objects[key] = written
    return objects


def holds(place: Place, name: str, written: StoredObject) -> bool:
    """Whether this is what lies there; raises StoreUnreachable when a network does not let it be seen."""
    try:
        read_proven(place, name, written.sha256, size=written.bytes, limit=written.bytes)
    except (StoreCorrupt, FileNotFoundError):
        return False
    return True


def _same(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def read_ledger(place: Place, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of ledger entries, one after the other; several are asked for at once where that takes long.

    Raises FileNotFoundError for one that is not there.
    """
    names = iter(names)
    with ThreadPoolExecutor(place.parallel if place.is_remote else 1) as threads:
        while some := list(islice(names, IN_PART)):
            read = threads.map if place.is_remote else map
            yield from zip(some, read(lambda name: read_metadata(place, f"ledger/{name}"), some), strict=True)


def read_entries(place: Place, names: Iterable[str]) -> Iterator[tuple[str, bytes, LedgerEntry | TablesEntry]]:
    """As `read_ledger`, and parsed; raises StoreCorrupt for one that is not readable."""
    for name, content in read_ledger(place, names):
        entry = parse_entry(name, content, f"{place}/ledger/{name}")
        if entry.file_name != name:
            raise StoreCorrupt(f"{place}/ledger/{name}: speaks of {entry.file_name}. Restore or delete it.")
        yield name, content, entry


def parse_entry(name: str, content: bytes, where: str) -> LedgerEntry | TablesEntry:
    if name.startswith("templates-"):
        return parse_metadata(TablesEntry, content, where)
    return parse_metadata(LedgerEntry, content, where)


def write_page(place: Place, name: str, content: bytes) -> str:
    """Write a page of hashes, unless it is there; returns its sha256. Raises StoreCorrupt when it is not there then."""
    page = stored_object(content)
    if not holds(place, f"hashes/{name}", page):
        place.put(f"hashes/{name}", content)
        if not holds(place, f"hashes/{name}", page):
            raise StoreCorrupt(f"{place}/hashes/{name}: what was read back is not what was written. Check the disk.")
    return page.sha256


def write_manifest(place: Place, manifest: StoreManifest) -> None:
    """Declare the store complete. An earlier manifest is replaced."""
    place.put("manifest.json", manifest_bytes(manifest))


def manifest_bytes(manifest: StoreManifest) -> bytes:
    """The only way of writing this manifest, so that any flipped bit shows: its last field is a sum of the rest."""
    content = manifest.model_copy(update={"checksum": ""}).model_dump_json()
    checksum = hashlib.sha256(content.encode()).hexdigest()
    return (manifest.model_copy(update={"checksum": checksum}).model_dump_json(indent=1) + "\n").encode()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
