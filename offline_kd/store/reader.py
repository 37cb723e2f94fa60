"""Open a store, wherever it lies, and read blocks from it.

Nothing is handed out that was not checked: every ledger entry against the manifest, every object's size and sha256
against its entry, each time it is read, and the bytes that were hashed are the bytes that are decoded.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline_kd.errors import RecipeError, StoreCorrupt, StoreError, StoreIncomplete, StoreMismatch, did_you_mean
from offline_kd.manifest import M, fingerprint, parse
from offline_kd.progress import progress
from offline_kd.store.chunks import decode_chunk
from offline_kd.store.downloads import DEFAULT_BYTES, Downloads, cache_folder
from offline_kd.store.place import Place, can_list, place_at
from offline_kd.store.schema import (
    SCHEMA_VERSION,
    Addition,
    ArraySpec,
    Held,
    LedgerEntry,
    Part,
    StoredObject,
    StoreIdentity,
    StoreManifest,
    TablesEntry,
    check_bounds,
    entry_names,
    identity_of_targets,
    kind_of,
    ledger_name,
    parts_of,
    store_digest,
    tables_ledger_name,
)
from offline_kd.views import view_groups

KEEP_BYTES = 2**28  # of decoded arrays, in each process
MAX_METADATA_BYTES = 2**28
IN_PART = 100  # blocks whose objects are looked for between two updates of the progress bar

Arrays = dict[str, NDArray[np.generic]]
REPAIR = "run `offline-kd store repair`, or copy the store again."


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
    entries: dict[str, str]  # sha256 by file name
    digest: str
    manifest: StoreManifest | None = None
    downloads: Downloads | None = field(default=None, repr=False)
    parsed: dict[str, LedgerEntry | TablesEntry] = field(default_factory=dict, repr=False)
    kept: dict[tuple[int, int, str], NDArray[np.generic]] = field(default_factory=dict, repr=False)
    coming: dict[tuple[int, int, str], Future[bytes]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: without what was read, and without threads."""
        names = self.__dataclass_fields__
        return {name: value for name, value in self.__dict__.items() if name in names} | {
            "parsed": {},
            "kept": {},
            "coming": {},
        }

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
            if part.targets == self.targets or (part.name == "" and kind_of(spec.name) not in ("logits", "decisions"))
        }

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.place.parallel, thread_name_prefix="store")

    @cached_property
    def block_of_tar(self) -> dict[str | None, int]:
        """The block of a tar's sha256, where the store knows it."""
        tars = self.created.dataset.tars
        return {tars[block].sha256: block for block in self.blocks if tars[block].sha256 is not None}

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
        rows_per_block = self.identity.rows_per_block
        by_block = self._map(lambda block: self._read_one(block, 0, "key_hash").astype(np.uint64), self.blocks)
        rows = [
            block * rows_per_block + np.arange(len(hashes)) for block, hashes in zip(self.blocks, by_block, strict=True)
        ]
        all_hashes, all_rows = np.concatenate(by_block), np.concatenate(rows)
        order = np.argsort(all_hashes, kind="stable")
        all_hashes, all_rows = all_hashes[order], all_rows[order]
        twice = np.flatnonzero(all_hashes[1:] == all_hashes[:-1])
        if len(twice):
            first, second = all_rows[twice[0]], all_rows[twice[0] + 1]
            raise StoreCorrupt(
                f"{self.place}: rows {first} and {second} have one key hash: a key is used twice in the dataset "
                f"(tars {self.identity.dataset.tars[first // rows_per_block].file} and "
                f"{self.identity.dataset.tars[second // rows_per_block].file}). Repack it and capture again."
            )
        return all_hashes, all_rows

    def _map(self, work: Any, items: Iterable[Any]) -> list[Any]:
        """`work` on every item, side by side where a request takes long."""
        return list(self._threads.map(work, items) if self.place.is_remote else map(work, items))

    def read(self, block: int, group: int, names: Iterable[str]) -> Arrays:
        """Arrays of one block and view group, `[rows, ...]`; probes `[P, ...]`.

        Raises StoreIncomplete for a missing object and StoreCorrupt for one that is not what was committed.
        """
        wanted = list(names)
        return dict(zip(wanted, self._map(lambda name: self._read_one(block, group, name), wanted), strict=True))

    def _read_one(self, block: int, group: int, name: str) -> NDArray[np.generic]:
        part, spec = self.arrays[name]
        place = (block, -1 if spec.extent == "block" else group, name)
        if place in self.kept:
            return self.kept[place]
        future = self.coming.pop(place, None)
        content = future.result() if future else self._content(block, group, name)
        entry = self.entry(part.name, block, group)
        chunk = decode_chunk(spec, content, f"{self.place}/targets.zarr/{spec.object_key(block, group)}")
        array = chunk[0, 0] if name.startswith("probe/") else chunk[: entry.rows]
        # Small stores are read once: a later epoch takes what was verified then.
        if sum(one.nbytes for one in list(self.kept.values())) + array.nbytes <= KEEP_BYTES:
            self.kept[place] = array
        return array

    def _content(self, block: int, group: int, name: str) -> bytes:
        part, spec = self.arrays[name]
        return self.verified(self.entry(part.name, block, group), spec.object_key(block, group), name)

    def fetch_ahead(self, block: int, group: int, names: Iterable[str]) -> None:
        """Begin to fetch what `read` with the same arguments will want; errors come out there.

        Bytes only: a second thread that runs torch operations makes those of the first slower by a third on two cores,
        because OpenMP's threads then sleep, instead of waiting for the next operation.
        """
        for name in names:
            place = (block, -1 if self.arrays[name][1].extent == "block" else group, name)
            if place not in self.kept and place not in self.coming:
                self.coming[place] = self._threads.submit(self._content, block, group, name)

    def read_tables(self, name: str) -> Arrays:
        """The templates (or LDA and sub-classes) behind decisions of that name, by the last part of their names."""
        part = next(
            (part for part in self.parts.values() if part.targets == self.targets and name in part.tables), None
        )
        if part is None:
            raise StoreIncomplete(f"{self.place}: there are no templates of '{name}': capture or copy the store again.")
        entry = self.tables_entry(part.name, name)
        arrays: Arrays = {}
        for spec in part.tables[name]:
            key = spec.object_key(0, 0)
            content = self.verified(entry, key, spec.name)
            arrays[spec.name.rsplit("/", 1)[-1]] = decode_chunk(spec, content, f"{self.place}/targets.zarr/{key}")
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
        return self.ledger_entry(ledger_name(block, self.identity.groups[group], part))

    def ledger_entry(self, name: str) -> LedgerEntry:
        entry = self._entry(name, LedgerEntry)
        if not 0 < entry.rows <= self.created.rows_per_block:
            raise StoreCorrupt(
                f"{self.place}/ledger/{name}: says {entry.rows} rows, a block has 1 to "
                f"{self.created.rows_per_block}: {REPAIR}"
            )
        return entry

    def tables_entry(self, part: str, name: str) -> TablesEntry:
        return self._entry(tables_ledger_name(name, part), TablesEntry)

    def _entry(self, name: str, model: type[M]) -> M:
        if name not in self.parsed:
            if name not in self.entries:
                raise StoreIncomplete(f"{self.place}: manifest.json lacks the entry {name}: {REPAIR}")
            file, expected = f"ledger/{name}", self.entries[name]
            content = self._fetch(file, expected)
            if content is None:
                raise StoreIncomplete(f"{self.place}/{file}: missing, though manifest.json lists it: {REPAIR}")
            found = hashlib.sha256(content).hexdigest()
            if found != expected:
                raise StoreCorrupt(f"{self.place}/{file}: sha256 {found}, manifest.json says {expected}: {REPAIR}")
            entry: Any = parse_metadata(model, content, f"{self.place}/{file}")
            if entry.file_name != name:
                raise StoreCorrupt(f"{self.place}/{file}: speaks of {entry.file_name}: {REPAIR}")
            self.parsed[name] = entry
        found_entry = self.parsed[name]
        assert isinstance(found_entry, model)
        return found_entry

    def verified(self, entry: LedgerEntry | TablesEntry, key: str, array: str) -> bytes:
        """The content of an object that an entry vouches for, after checking that it is what was committed."""
        held = self.manifest.held if self.manifest else None
        if held and not held.has(array):
            raise StoreIncomplete(f"{self.place}: this copy holds {held.arrays} only, not {array}. Pull that too.")
        expected = entry.objects.get(key)
        content = self._fetch(f"targets.zarr/{key}", expected.sha256 if expected else "")
        self.compare(entry, key, None if content is None else len(content), content)
        assert content is not None
        return content

    def _fetch(self, name: str, sha256: str) -> bytes | None:
        """A file from the store, or from the downloads of a remote one; None if it is missing."""
        if self.downloads is not None and sha256:
            content = self.downloads.get(sha256)
            if content is not None and hashlib.sha256(content).hexdigest() == sha256:
                return content
        try:
            content = self.place.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if self.downloads is not None and hashlib.sha256(content).hexdigest() == sha256:
            self.downloads.put(sha256, content)
        return content

    def compare(
        self, entry: LedgerEntry | TablesEntry, key: str, found_bytes: int | None, content: bytes | None = None
    ) -> None:
        """Raise StoreIncomplete or StoreCorrupt when an object is not what the ledger vouches for."""
        expected = entry.objects.get(key)
        where = f"{self.place}/targets.zarr/{key}"
        if expected is None:
            raise StoreCorrupt(f"{where}: the ledger entry {entry.file_name} does not vouch for it: {REPAIR}")
        if found_bytes is None:
            raise StoreIncomplete(f"{where}: missing, though {entry.file_name} was committed: {REPAIR}")
        if found_bytes != expected.bytes:
            raise StoreCorrupt(f"{where}: {found_bytes:,} bytes, committed were {expected.bytes:,}: {REPAIR}")
        if content is not None and (found := hashlib.sha256(content).hexdigest()) != expected.sha256:
            raise StoreCorrupt(f"{where}: sha256 {found}, committed was {expected.sha256}: {REPAIR}")

    def check_sizes(self) -> None:
        """Make sure, by listing and without reading, that every object of these targets is there with its size.

        Plain web servers cannot list: there, what is missing is found when it is read.
        """
        if not can_list(self.place):
            return
        held = self.manifest.held if self.manifest else None
        sizes = self.place.sizes("targets.zarr")
        specs = [(part, spec) for part, spec in self.arrays.values() if held is None or held.has(spec.name)]
        parts = {part.name for part, _ in specs}
        groups = range(len(self.identity.groups))
        with progress("looking for every object", len(self.blocks), "blocks") as meter:
            for start in range(0, len(self.blocks), IN_PART):
                some = self.blocks[start : start + IN_PART]
                wanted = [(part, block, group) for part in parts for block in some for group in groups]
                entries = dict(zip(wanted, self._map(lambda one: self.entry(*one), wanted), strict=True))
                for (name, block, group), entry in entries.items():
                    for part, spec in specs:
                        if part.name == name:
                            key = spec.object_key(block, group)
                            self.compare(entry, key, sizes.get(f"targets.zarr/{key}"))
                meter.advance(len(some))


@dataclass(frozen=True)
class PromisedEntry:
    """A ledger entry that a store, or a part of it, must have, and the arrays whose objects it vouches for."""

    name: str
    part: str
    decisions: str  # whose templates these are; '' for a block
    block: int
    group: int
    specs: list[ArraySpec]

    @property
    def keys(self) -> list[str]:
        return [spec.object_key(self.block, self.group) for spec in self.specs]


def promised_entries(store: Store, held: Held | None) -> list[PromisedEntry]:
    """The ledger entries of every part, as far as a copy that holds so much (None: all) has them."""
    assert store.manifest is not None
    created, promised = store.created, []
    blocks = range(held.first_block, held.end_block) if held else range(created.num_blocks)
    for part in store.parts.values():
        if held is None or held.has("decisions/"):
            promised += [
                PromisedEntry(tables_ledger_name(name, part.name), part.name, name, 0, 0, specs)
                for name, specs in part.tables.items()
            ]
        specs = [spec for spec in part.specs if held is None or held.has(spec.name)]
        num_views = store.manifest.views[part.name]
        wanted = min(num_views, held.views) if held else num_views
        groups = [group for group in view_groups(num_views, created.views_per_group) if group.start < wanted]
        promised += [
            PromisedEntry(ledger_name(block, views, part.name), part.name, "", block, index, specs)
            for block in blocks
            for index, views in enumerate(groups)
            if specs
        ]
    return promised


# ---- opening -------------------------------------------------------------------------------------------------------


def open_store(
    location: Place | str | Path,
    *,
    targets: str = "",
    digest: str | None = None,
    download_bytes: int = DEFAULT_BYTES,
) -> Store:
    """Open a finished store. Nothing but metadata is read; `Store.check_sizes` looks for every object.

    Args:
        targets: whose, if the store holds those of several teachers; by default of the first.
        digest: what the store must be, or must have been before it grew.
        download_bytes: how much of a remote store is kept on the local disk.

    Raises StoreIncomplete when something is missing, StoreCorrupt when parts disagree and StoreMismatch when it has
    another digest or lacks these targets.
    """
    place = location if not isinstance(location, str | Path) else place_at(location)
    raw, created = read_identity(place)
    check_bounds(f"{place}/store.json", parts_of(created))
    try:
        content = place.read("manifest.json", MAX_METADATA_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreIncomplete(f"{place}: not finished: {_what_is_missing(place, created)}") from None
    if raw["schema_version"] == 1:
        manifest, additions, found = _upgrade_manifest_1(raw, created, content, f"{place}/manifest.json")
        parsed = manifest.entries
    else:
        manifest = parse_metadata(StoreManifest, content, f"{place}/manifest.json")
        additions = [read_addition(place, name) for name in manifest.views if name]
        _check_counts(created, manifest, f"{place}/manifest.json")
        parsed = manifest.entries
        found = store_digest(raw, [one.model_dump(mode="json") for one in additions], manifest.entries)
    if found != manifest.digest:
        raise StoreCorrupt(
            f"{place}: identity and ledger have digest {found[:16]}..., manifest.json says {manifest.digest[:16]}.... "
            "Something was changed after the store was finished: copy it again."
        )
    views = manifest.views
    if digest not in (None, manifest.digest):
        assert digest is not None
        views, additions, parsed = _as_it_was(raw, created, additions, manifest, digest, str(place))
    names = {created.name: "", "": ""} | {one.name: one.name for one in additions if one.extends is None}
    if targets not in names:
        raise StoreMismatch(f"{place}: holds no targets '{targets}'.{did_you_mean(targets, [n for n in names if n])}")
    chosen = names[targets]
    num_views = min(views[part] for part in views if _belongs(part, chosen, additions))
    if manifest.held:
        num_views = min(num_views, manifest.held.views)
    effective = identity_of_targets(created, additions, chosen, num_views)
    downloads = Downloads(cache_folder(), download_bytes) if place.is_remote else None
    store = Store(place, created, additions, chosen, effective, parsed, digest or manifest.digest, manifest, downloads)
    check_bounds(f"{place}/store.json", store.parts)
    missing = set(entry_names(created, store.parts, views)) - set(parsed)
    if missing:
        raise StoreCorrupt(
            f"{place}: manifest.json lacks {len(missing)} entries, the first is {min(missing)}: {REPAIR}"
        )
    return store


def _check_counts(created: StoreIdentity, manifest: StoreManifest, where: str) -> None:
    """Counts that cannot be true must not cost memory or time."""
    held = manifest.held
    most, blocks = created.views.num_distinct, created.num_blocks
    views_are_wrong = any(
        not 0 < count <= most for counts in (manifest.views, *manifest.earlier) for count in counts.values()
    )
    if "" not in manifest.views or views_are_wrong:
        raise StoreCorrupt(f"{where}: says {manifest.views} views, an image has 1 to {most}: {REPAIR}")
    promised = sum(blocks * -(-count // created.views_per_group) for count in manifest.views.values())
    if promised > len(manifest.entries):
        raise StoreCorrupt(
            f"{where}: lists {len(manifest.entries):,} entries, {promised:,} blocks are promised: {REPAIR}"
        )
    if held and not (held.first_block < held.end_block <= blocks and 0 < held.views <= most):
        raise StoreCorrupt(
            f"{where}: holds blocks {held.first_block} to {held.end_block} of {blocks}, {held.views} views of {most}: "
            f"{REPAIR}"
        )


def group_digests(store: Store) -> dict[str, str]:
    """The digest of every view group alone, by its views: they stay as they are when a store grows."""
    raw, _ = read_identity(store.place)
    digests = {}
    for views in store.identity.groups:
        names = [ledger_name(block, views) for block in range(store.created.num_blocks)]
        digests[f"{views.start}:{views.stop}"] = store_digest(raw, [], {name: store.entries[name] for name in names})
    return digests


def _belongs(part: str, targets: str, additions: list[Addition]) -> bool:
    return (
        part == targets
        if part in ("", targets)
        else any(one.name == part and one.targets == targets for one in additions)
    )


def _as_it_was(
    raw: dict[str, Any],
    created: StoreIdentity,
    additions: list[Addition],
    manifest: StoreManifest,
    digest: str,
    where: str,
) -> tuple[dict[str, int], list[Addition], dict[str, str]]:
    """Views, additions and entries of a grown store when it had that digest."""
    for views in reversed(manifest.earlier):
        then = [one for one in additions if one.name in views]
        names = entry_names(created, parts_of(created, then), views)
        entries = {name: manifest.entries[name] for name in names if name in manifest.entries}
        if store_digest(raw, [one.model_dump(mode="json") for one in then], entries) == digest:
            return views, then, entries
    raise StoreMismatch(
        f"{where}: its digest is sha256:{manifest.digest}, wanted is sha256:{digest}. It is another store, or was "
        "captured anew: correct the digest after looking at `offline-kd store info`, or get the right store."
    )


def _what_is_missing(place: Place, created: StoreIdentity) -> str:
    missing = missing_entries(place, created, [], {"": created.views.num_views})
    total = created.num_blocks * len(created.groups)
    return (
        f"{len(missing)} of {total} blocks are missing"
        f"{f', the first is ledger/{missing[0]}' if missing else ', only manifest.json'}. "
        "Run the same `offline-kd cache-teacher` command again: it resumes and finishes."
    )


def read_identity(place: Place) -> tuple[dict[str, Any], StoreIdentity]:
    """`store.json`, as JSON and checked; raises StoreError when there is none or when a newer version wrote it."""
    where = f"{place}/store.json"
    try:
        content = place.read("store.json", MAX_METADATA_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{place}: no teacher store there (no store.json). Make one with `offline-kd cache-teacher`."
        ) from None
    raw = _read_json(content, where)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise StoreError(
            f"{place}: schema version {version}, this offline-kd reads up to {SCHEMA_VERSION}. "
            "Upgrade: pip install --upgrade offline-kd."
        )
    identity = _checked(StoreIdentity, raw, where)
    assert isinstance(raw, dict)
    return raw, identity


def read_addition(place: Place, name: str) -> Addition:
    file = f"additions/{name}.json"
    # The name comes from manifest.json: it must not lead elsewhere.
    if not name.replace("_", "").replace("-", "").isalnum():
        raise StoreCorrupt(f"{place}/manifest.json: '{name[:100]}' is no name of an addition. Copy the store again.")
    try:
        addition = parse_metadata(Addition, place.read(file, MAX_METADATA_BYTES), f"{place}/{file}")
    except FileNotFoundError:
        raise StoreIncomplete(
            f"{place}/{file}: missing, though manifest.json lists it: copy the store again."
        ) from None
    if addition.name != name:
        raise StoreCorrupt(f"{place}/{file}: speaks of '{addition.name}': copy the store again.")
    return addition


def missing_entries(
    place: Place, created: StoreIdentity, additions: list[Addition], views: dict[str, int]
) -> list[str]:
    """Names of the ledger entries that a store with so many views would have and this one has not."""
    present = set(place.sizes("ledger")) if can_list(place) else set()
    names = entry_names(created, parts_of(created, additions), views)
    return [name for name in names if f"ledger/{name}" not in present]


def parse_metadata(model: type[M], content: bytes, where: str) -> M:
    """Checked metadata from JSON; raises StoreCorrupt naming the field that is wrong."""
    return _checked(model, _read_json(content, where), where)


def _read_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise StoreCorrupt(
            f"{where}: not readable as JSON ({error}). Restore the file, or copy the store again."
        ) from error


def _checked(model: type[M], content: object, where: str) -> M:
    try:
        return parse(model, content, where=where)
    except RecipeError as error:
        raise StoreCorrupt(f"{error}. Restore the file, or copy the store again.") from error


def _upgrade_manifest_1(
    raw: dict[str, Any], created: StoreIdentity, content: bytes, where: str
) -> tuple[StoreManifest, list[Addition], str]:
    """The manifest of a store of version 1 (which held whole ledger entries), and the digest by that version's rule."""
    old = _read_json(content, where)
    try:
        entries = {**{_checked(LedgerEntry, one, where).file_name: one for one in old["entries"]}}
        tables = {_checked(TablesEntry, one, where).file_name: one for one in old["tables"]}
        identity_digest = fingerprint({name: value for name, value in raw.items() if name != "versions"})
        ordered = [entries[name] for name in sorted(entries)] + [tables[name] for name in sorted(tables)]
        digest = fingerprint([identity_digest, ordered])
        by_array: dict[str, int] = {}
        for one in ordered:
            for key, stored in one["objects"].items():
                by_array[key.split("/c/")[0]] = by_array.get(key.split("/c/")[0], 0) + stored["bytes"]
        manifest = _checked(
            StoreManifest,
            {
                "schema_version": 1,
                "digest": old["digest"],
                "views": {"": created.views.num_views},
                "entries": {name: _sha256_of_entry_1(one) for name, one in {**entries, **tables}.items()},
                "files": {},
                "fidelity": {"": old["fidelity"]},
                "total_bytes": old["total_bytes"],
                "bytes_by_array": by_array,
            },
            where,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreCorrupt(f"{where}: no manifest of schema version 1 ({error!r}). Copy the store again.") from error
    return manifest, [], digest


def _sha256_of_entry_1(entry: dict[str, Any]) -> str:
    """Of the ledger file that version 1 wrote beside the manifest."""
    return hashlib.sha256((json.dumps(entry, indent=1, ensure_ascii=False) + "\n").encode()).hexdigest()


def stored_object(content: bytes) -> StoredObject:
    return StoredObject(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
