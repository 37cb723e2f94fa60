"""Declare a store complete, after asking the teacher once more about rows that are read back as stage 2 will."""

from collections.abc import Callable, Iterable
from functools import partial

from offline_kd.cache.fidelity import measure_fidelity
from offline_kd.cache.job import Capture, current_manifest
from offline_kd.cache.unique_keys import prove_unique_keys
from offline_kd.store.card import write_card
from offline_kd.store.layout import entry_names, parts_of, small_files
from offline_kd.store.leases import Leases
from offline_kd.store.leftovers import sweep
from offline_kd.store.memory import Memory
from offline_kd.store.objects import read_metadata
from offline_kd.store.opening import read_addition, read_identity
from offline_kd.store.reader import Store, stored_object
from offline_kd.store.schema import (
    Fidelity,
    LedgerEntry,
    StoreManifest,
    TablesEntry,
    identity_of_targets,
    ledger_name,
    store_digest,
)
from offline_kd.store.writer import parse_entry, read_ledger, write_manifest
from offline_kd.support.console import say
from offline_kd.support.errors import StoreIncomplete
from offline_kd.support.places import Place
from offline_kd.views.epochs import view_groups


def finish_if_complete(capture: Capture, leases: Leases) -> StoreManifest | None:
    """Declare the store complete, unless other writers have blocks to do yet or one of them has declared it.

    Raises StoreCorrupt when teacher and store disagree.
    """
    place, own = capture.place, dict.fromkeys(capture.own_parts, capture.num_views)
    names = _expected(capture, own)
    present = place.sizes("ledger")
    missing = [name for name in names if f"ledger/{name}" not in present]
    missing = [name for name in missing if place.size(f"ledger/{name}") is None]  # listings have no checksum
    if missing:
        say(f"{place}: {len(missing)} blocks are left for other writers, such as {missing[0]}; the last one finishes")
        return None
    while (manifest := _finished(place, names)) is None:
        if leases.wait_for("finish", lambda: _finished(place, names) is not None):
            _finish(capture, own, partial(leases.is_mine, "finish"))
            leases.release("finish")
    sweep(place)
    return manifest


def _finished(place: Place, names: list[str]) -> StoreManifest | None:
    """The manifest, if it vouches for these ledger entries as they are, and the files that it lists are there."""
    manifest = current_manifest(place)
    if manifest is None or not manifest.entries.keys() >= set(names):
        return None
    contents = read_ledger(place, names)
    if any(manifest.entries[name] != stored_object(content).sha256 for name, content in contents.items()):
        return None
    return manifest if all(place.size(name) == stored.bytes for name, stored in manifest.files.items()) else None


def _expected(capture: Capture, views: dict[str, int]) -> list[str]:
    """The ledger entries of these parts with so many views each."""
    parts = parts_of(capture.created, [one for one in capture.additions if one.name in views])
    return entry_names(capture.created, {name: parts[name] for name in views}, views)


def _views_in_ledger(capture: Capture) -> dict[str, int]:
    """How many views of every part are committed: what a lost manifest said."""
    present = capture.place.sizes("ledger")
    created, views = capture.created, {}
    for part in parts_of(created, capture.additions):
        for group in view_groups(created.views.num_distinct, created.views_per_group):
            names = [ledger_name(block, group, part) for block in range(created.num_blocks)]
            if not all(f"ledger/{name}" in present for name in names):
                break
            views[part] = group.stop
    return views


def _finish(capture: Capture, own: dict[str, int], still_mine: Callable[[], bool]) -> None:
    """With the lease: nobody else changes the manifest, whose other parts, if it has any, are kept."""
    place, created = capture.place, capture.created
    old = current_manifest(place)
    views = dict(old.views) if old else _views_in_ledger(capture)
    for part, num_views in own.items():
        views[part] = max(views.get(part, 0), num_views)
    known = {one.name: one for one in capture.additions}
    additions = [known.get(name) or read_addition(place, name) for name in views if name]
    parts = parts_of(created, additions)
    contents = _read_entries(place, entry_names(created, parts, views))
    entries = {name: stored_object(content).sha256 for name, content in contents.items()}
    digest = store_digest(read_identity(place)[0], [one.model_dump(mode="json") for one in additions], entries)
    parsed = {name: parse_entry(name, content, name) for name, content in contents.items()}

    def store_with(targets: str) -> Store:
        num_views = min(count for part, count in views.items() if part == "" or parts[part].targets == targets)
        identity = identity_of_targets(created, additions, targets, num_views)
        memory = Memory(parsed={**parsed})
        return Store(place, created, additions, targets, identity, entries, digest, memory=memory)

    targets = parts[capture.own_parts[0]].targets
    prove_unique_keys(store_with(targets))
    fidelity = _measure(capture, store_with(targets))
    sizes = _bytes_by_array(parsed.values())
    manifest = StoreManifest(
        schema_version=created.schema_version,
        digest=digest,
        views=views,
        earlier=[*(old.earlier if old else []), *([old.views] if old and old.views != views else [])],
        entries=entries,
        files={},
        fidelity={**(old.fidelity if old else {}), targets: fidelity},
        left_out=_left_out(parsed.values()),
        total_bytes=sum(sizes.values()),
        bytes_by_array=sizes,
    )
    card = write_card({name: store_with(name) for name in sorted({part.targets for part in parts.values()})}, manifest)
    if not still_mine():
        return  # this writer slept while another one declared what may be more
    for name, content in card.items():
        place.put(name, content)
    files = {name: stored_object(read_metadata(place, name)) for name in small_files(additions, parts)}
    write_manifest(place, manifest.model_copy(update={"files": files}))


def _measure(capture: Capture, store: Store) -> Fidelity:
    """Ask the teacher about as many rows as the recipe says, and no block is believed unseen."""
    num_rows = max(capture.recipe.capture.fidelity_rows, len(store.blocks))
    images = capture.loader
    found = measure_fidelity(
        store, images.__getitem__, capture.teacher, num_rows, capture.device, fetch_ahead=images.fetch_ahead
    )
    say(f"{capture.place}: the teacher was asked again about {found.looked_at}")
    return found


def _read_entries(place: Place, names: list[str]) -> dict[str, bytes]:
    """The content of these ledger entries by file name; raises StoreIncomplete if one is missing."""
    present = place.sizes("ledger")
    if missing := [name for name in names if f"ledger/{name}" not in present]:
        raise StoreIncomplete(
            f"{place}: {len(missing)} blocks of other targets are missing, such as ledger/{missing[0]}. Run the recipe "
            "that they were added with."
        )
    return read_ledger(place, names)


def _bytes_by_array(entries: Iterable[LedgerEntry | TablesEntry]) -> dict[str, int]:
    """How large the objects of every array are, by its name."""
    by_array: dict[str, dict[str, int]] = {}
    for entry in entries:
        for key, stored in entry.objects.items():
            by_array.setdefault(key.split("/c/")[0].removesuffix("/c"), {})[key] = stored.bytes
    return {name: sum(sizes.values()) for name, sizes in sorted(by_array.items())}


def _left_out(entries: Iterable[LedgerEntry | TablesEntry]) -> int:
    """How many samples have no row: what the first view group of the first targets says."""
    return sum(
        len(one.left_out) for one in entries if isinstance(one, LedgerEntry) and not (one.addition or one.first_view)
    )
