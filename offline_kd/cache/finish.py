"""Declare a store complete, after asking the teacher once more about rows that are read back as stage 2 will."""

from offline_kd.cache.fidelity import measure_fidelity
from offline_kd.cache.job import Capture, current_manifest
from offline_kd.store.card import write_card
from offline_kd.store.layout import entry_names, parts_of, small_files
from offline_kd.store.leases import Leases
from offline_kd.store.opening import read_addition, read_identity
from offline_kd.store.reader import Store, stored_object
from offline_kd.store.schema import (
    SCHEMA_VERSION,
    Fidelity,
    LedgerEntry,
    StoreManifest,
    identity_of_targets,
    ledger_name,
    store_digest,
)
from offline_kd.store.writer import parse_entry, read_ledger, write_manifest
from offline_kd.support.console import say
from offline_kd.support.errors import StoreIncomplete
from offline_kd.views.epochs import view_groups


def finish_if_complete(capture: Capture, leases: Leases) -> StoreManifest | None:
    """Declare the store complete, unless other writers have blocks to do yet or one of them has declared it.

    Raises StoreCorrupt when teacher and store disagree.
    """
    place, own = capture.place, dict.fromkeys(capture.own_parts, capture.num_views)
    names = _expected(capture, own)
    present = place.sizes("ledger")
    missing = [name for name in names if f"ledger/{name}" not in present]
    if missing:
        say(f"{place}: {len(missing)} blocks are left for other writers, such as {missing[0]}; the last one finishes")
        return None
    entries = {name: stored_object(content).sha256 for name, content in read_ledger(place, names).items()}

    def finished() -> StoreManifest | None:
        """The manifest, if it vouches for what this run is about and the files that it lists are there."""
        manifest = current_manifest(place)
        if manifest is None or any(manifest.entries.get(name) != sha256 for name, sha256 in entries.items()):
            return None
        whole = all(place.size(name) == stored.bytes for name, stored in manifest.files.items())
        return manifest if whole else None

    if leases.wait_for("finish", lambda: finished() is not None):
        _finish(capture, own)
        leases.release("finish")
    manifest = finished()
    assert manifest is not None
    return manifest


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


def _finish(capture: Capture, own: dict[str, int]) -> None:
    """With the lease: nobody else changes the manifest, whose other parts, if it has any, are kept."""
    place, created = capture.place, capture.created
    old = current_manifest(place)
    views = dict(old.views) if old else _views_in_ledger(capture)
    for part, num_views in own.items():
        views[part] = max(views.get(part, 0), num_views)
    known = {one.name: one for one in capture.additions}
    additions = [known.get(name) or read_addition(place, name) for name in views if name]
    raw, _ = read_identity(place)
    names = entry_names(created, parts_of(created, additions), views)
    present = place.sizes("ledger")
    if missing := [name for name in names if f"ledger/{name}" not in present]:
        raise StoreIncomplete(
            f"{place}: {len(missing)} blocks of other targets are missing, such as ledger/{missing[0]}. Run the recipe "
            "that they were added with."
        )
    contents = read_ledger(place, names)
    entries = {name: stored_object(content).sha256 for name, content in contents.items()}
    digest = store_digest(raw, [one.model_dump(mode="json") for one in additions], entries)
    parsed = {name: parse_entry(name, content, name) for name, content in contents.items()}
    fidelity = dict(old.fidelity) if old else {}
    parts = parts_of(created, additions)
    targets_of_run = parts[capture.own_parts[0]].targets

    def store_with(targets: str) -> Store:
        num_views = min(count for part, count in views.items() if part == "" or parts[part].targets == targets)
        identity = identity_of_targets(created, additions, targets, num_views)
        return Store(place, created, additions, targets, identity, entries, digest, parsed={**parsed})

    fidelity[targets_of_run] = _measure(capture, store_with(targets_of_run))
    by_array: dict[str, dict[str, int]] = {}
    for entry in parsed.values():
        for key, stored in entry.objects.items():
            by_array.setdefault(key.split("/c/")[0].removesuffix("/c"), {})[key] = stored.bytes
    first_group = [
        one for one in parsed.values() if isinstance(one, LedgerEntry) and not (one.addition or one.first_view)
    ]
    earlier = list(old.earlier) if old else []
    if old and old.views != views:
        earlier.append(old.views)
    manifest = StoreManifest(
        schema_version=SCHEMA_VERSION,
        digest=digest,
        views=views,
        earlier=earlier,
        entries=entries,
        files={},
        fidelity=fidelity,
        left_out=sum(len(one.left_out) for one in first_group),
        total_bytes=sum(sum(sizes.values()) for sizes in by_array.values()),
        bytes_by_array={name: sum(sizes.values()) for name, sizes in sorted(by_array.items())},
    )
    all_targets = sorted({part.targets for part in parts.values()})
    card = write_card({targets: store_with(targets) for targets in all_targets}, manifest)
    for name, content in card.items():
        place.put(name, content)
    files = {name: stored_object(place.read(name)) for name in small_files(additions, parts)}
    write_manifest(place, manifest.model_copy(update={"files": files}))


def _measure(capture: Capture, store: Store) -> Fidelity:
    """Ask the teacher about as many rows as the recipe says, and no block is believed unseen."""
    num_rows = max(capture.recipe.capture.fidelity_rows, len(store.blocks))
    found = measure_fidelity(store, capture.loader.__getitem__, capture.teacher, num_rows, capture.device)
    say(f"{capture.place}: the teacher was asked again about {found.looked_at}")
    return found
