"""Open a finished store: from its manifest to a `Store`, whatever version wrote it.

Nothing but metadata is read: identity, additions and one manifest, from whose digest every ledger entry hangs.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offline_kd.store.layout import check_bounds, entry_names, listed_names, num_entries, num_pages, parts_of
from offline_kd.store.objects import read_metadata
from offline_kd.store.reader import Store, checked, parse_metadata, read_json
from offline_kd.store.schema import (
    SCHEMA_VERSION,
    Addition,
    LedgerEntry,
    StoreIdentity,
    StoreManifest,
    TablesEntry,
    identity_of_targets,
    store_digest,
)
from offline_kd.support.downloads import DEFAULT_BYTES, shared_downloads
from offline_kd.support.errors import StoreCorrupt, StoreError, StoreIncomplete, StoreMismatch, did_you_mean
from offline_kd.support.files import cache_folder
from offline_kd.support.places import Place, can_list, place_at
from offline_kd.support.proven import REPAIR
from offline_kd.support.strict import fingerprint

MAX_LISTED = 2**20  # blocks of an unfinished store that are looked for, to say what is missing
MAX_ENTRIES = 2**24  # of one store: 10 bytes each is what listing it takes
MAX_PARTS = 100  # additions of one store


def open_store(
    location: Place | str | Path,
    *,
    targets: str = "",
    digest: str | None = None,
    download_bytes: int = DEFAULT_BYTES,
) -> Store:
    """Open a finished store. Nothing but metadata is read, and what is missing is found when it is wanted.

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
        content = read_metadata(place, "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise StoreIncomplete(f"{place}: not finished: {_what_is_missing(place, created)}") from None
    if raw["schema_version"] == 1:
        manifest, additions, found = _upgrade_manifest_1(raw, created, content, f"{place}/manifest.json")
    else:
        manifest = parse_metadata(StoreManifest, content, f"{place}/manifest.json")
        additions = _read_additions(place, manifest)
        _check_counts(created, manifest, f"{place}/manifest.json")
        found = store_digest(raw, [one.model_dump(mode="json") for one in additions], manifest.listed)
    if found != manifest.digest:
        raise StoreCorrupt(
            f"{place}: identity and ledger have digest {found[:16]}..., manifest.json says {manifest.digest[:16]}.... "
            "Something was changed after the store was finished: copy it again."
        )
    views, listed = manifest.views, manifest.listed
    if digest not in (None, manifest.digest):
        assert digest is not None
        views, additions, listed = _as_it_was(raw, created, additions, manifest, digest, str(place))
    names = {created.name: "", "": ""} | {one.name: one.name for one in additions if one.extends is None}
    if targets not in names:
        raise StoreMismatch(f"{place}: holds no targets '{targets}'.{did_you_mean(targets, [n for n in names if n])}")
    chosen = names[targets]
    num_views = min(views[part] for part in views if _belongs(part, chosen, additions))
    if manifest.held:
        num_views = min(num_views, manifest.held.views)
    effective = identity_of_targets(created, additions, chosen, num_views)
    downloads = shared_downloads(cache_folder(), download_bytes) if place.is_remote else None
    store = Store(place, created, additions, chosen, effective, listed, digest or manifest.digest, manifest, downloads)
    check_bounds(f"{place}/store.json", store.parts)
    missing = set(listed_names(created, store.parts, views)) - set(listed)
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
    promised, pages = num_entries(created, manifest.views), num_pages(created, manifest.views)
    listed, lists = (pages, manifest.pages) if created.has_pages else (promised, manifest.entries)
    if promised > MAX_ENTRIES or listed > len(lists):
        raise StoreCorrupt(
            f"{where}: lists {len(lists):,} {'pages' if created.has_pages else 'entries'}, {listed:,} are promised for "
            f"{promised:,} blocks, of which there may be {MAX_ENTRIES:,}: {REPAIR}"
        )
    if held and not (held.first_block < held.end_block <= blocks and 0 < held.views <= most):
        raise StoreCorrupt(
            f"{where}: holds blocks {held.first_block} to {held.end_block} of {blocks}, {held.views} views of {most}: "
            f"{REPAIR}"
        )


def group_digests(store: Store) -> dict[str, str]:
    """The digest of every view group alone, by its views: they stay as they are when a store grows."""
    raw, _ = read_identity(store.place)
    digests, groups = {}, store.identity.groups
    names = listed_names(store.created, {}, {"": groups[-1].stop})
    per_group = len(names) // len(groups)
    for index, views in enumerate(groups):
        some = names[index * per_group : (index + 1) * per_group]
        digests[f"{views.start}:{views.stop}"] = store_digest(raw, [], {name: store.listed[name] for name in some})
    return digests


def all_digests(store: Store) -> dict[str, dict[str, int]]:
    """The digest of a store and those it had before it grew, the latest first; each with its views by addition."""
    manifest = store.manifest
    assert manifest is not None
    raw, created = read_identity(store.place)
    additions = [read_addition(store.place, name) for name in manifest.views if name]
    earlier = _before_it_grew(raw, created, additions, manifest)
    return {manifest.digest: manifest.views} | {digest: views for digest, views, _, _ in earlier}


def _belongs(part: str, targets: str, additions: list[Addition]) -> bool:
    return (
        part == targets
        if part in ("", targets)
        else any(one.name == part and one.targets == targets for one in additions)
    )


def _as_it_was(
    raw: dict[str, object],
    created: StoreIdentity,
    additions: list[Addition],
    manifest: StoreManifest,
    digest: str,
    where: str,
) -> tuple[dict[str, int], list[Addition], dict[str, str]]:
    """Views, additions and what the manifest listed of a grown store when it had that digest."""
    for found, views, then, listed in _before_it_grew(raw, created, additions, manifest):
        if found == digest:
            return views, then, listed
    raise StoreMismatch(
        f"{where}: its digest is sha256:{manifest.digest}, wanted is sha256:{digest}. It is another store, or was "
        "captured anew: correct the digest after looking at `offline-kd store info`, or get the right store."
    )


def _before_it_grew(
    raw: dict[str, object], created: StoreIdentity, additions: list[Addition], manifest: StoreManifest
) -> Iterator[tuple[str, dict[str, int], list[Addition], dict[str, str]]]:
    """Digest, views, additions and what was listed, that a store had each time before it grew, the latest first."""
    for views in reversed(manifest.earlier):
        then = [one for one in additions if one.name in views]
        names, now = listed_names(created, parts_of(created, then), views), manifest.listed
        listed = {name: now[name] for name in names if name in now}
        yield store_digest(raw, [one.model_dump(mode="json") for one in then], listed), views, then, listed


def _what_is_missing(place: Place, created: StoreIdentity) -> str:
    total = created.num_blocks * -(-created.views.num_views // created.views_per_group)
    if total > MAX_LISTED:
        return (
            f"there is no manifest.json, and {total:,} blocks are planned. Run the same `cache-teacher` command again."
        )
    present = set(place.names("ledger")) if can_list(place) else set()
    names = entry_names(created, {"": created.views.num_views})
    missing = [name for name in names if f"ledger/{name}" not in present]
    return (
        f"{len(missing)} of {total} blocks are missing"
        f"{f', the first is ledger/{missing[0]}' if missing else ', only manifest.json'}. "
        "Run the same `offline-kd cache-teacher` command again: it resumes and finishes."
    )


def read_identity(place: Place) -> tuple[dict[str, object], StoreIdentity]:
    """`store.json`, as JSON and checked; raises StoreError when there is none or when a newer version wrote it."""
    where = f"{place}/store.json"
    try:
        content = read_metadata(place, "store.json")
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{place}: no teacher store there (no store.json). Make one with `offline-kd cache-teacher`."
        ) from None
    raw = read_json(content, where)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise StoreError(
            f"{place}: schema version {version}, this offline-kd reads up to {SCHEMA_VERSION}. "
            "Upgrade: pip install --upgrade offline-kd."
        )
    identity = checked(StoreIdentity, raw, where)
    assert isinstance(raw, dict)
    return raw, identity


def read_addition(place: Place, name: str) -> Addition:
    file = f"additions/{name}.json"
    # The name comes from manifest.json: it must not lead elsewhere.
    if not name.replace("_", "").replace("-", "").isalnum():
        raise StoreCorrupt(f"{place}/manifest.json: '{name[:100]}' is no name of an addition. Copy the store again.")
    try:
        addition = parse_metadata(Addition, read_metadata(place, file), f"{place}/{file}")
    except FileNotFoundError:
        raise StoreIncomplete(
            f"{place}/{file}: missing, though manifest.json lists it: copy the store again."
        ) from None
    if addition.name != name:
        raise StoreCorrupt(f"{place}/{file}: speaks of '{addition.name}': copy the store again.")
    return addition


def _read_additions(place: Place, manifest: StoreManifest) -> list[Addition]:
    if len(manifest.views) > MAX_PARTS:
        raise StoreCorrupt(
            f"{place}/manifest.json: lists {len(manifest.views):,} additions, more than {MAX_PARTS}: {REPAIR}"
        )
    return [read_addition(place, name) for name in manifest.views if name]


def _upgrade_manifest_1(
    raw: dict[str, object], created: StoreIdentity, content: bytes, where: str
) -> tuple[StoreManifest, list[Addition], str]:
    """The manifest of a store of version 1 (which held whole ledger entries), and the digest by that version's rule."""
    old: Any = read_json(content, where)
    try:
        entries = {**{checked(LedgerEntry, one, where).file_name: one for one in old["entries"]}}
        tables = {checked(TablesEntry, one, where).file_name: one for one in old["tables"]}
        identity_digest = fingerprint({name: value for name, value in raw.items() if name != "versions"})
        ordered = [entries[name] for name in sorted(entries)] + [tables[name] for name in sorted(tables)]
        digest = fingerprint([identity_digest, ordered])
        by_array: dict[str, int] = {}
        for one in ordered:
            for key, stored in one["objects"].items():
                by_array[key.split("/c/")[0]] = by_array.get(key.split("/c/")[0], 0) + stored["bytes"]
        manifest = checked(
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


def _sha256_of_entry_1(entry: dict[str, object]) -> str:
    """Of the ledger file that version 1 wrote beside the manifest."""
    return hashlib.sha256((json.dumps(entry, indent=1, ensure_ascii=False) + "\n").encode()).hexdigest()
