"""Declare a store complete, after asking the teacher once more about rows that are read back as stage 2 will.

The ledger is gone through entry by entry, so that memory does not grow with it; what is kept are pages of hashes.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from offline_kd.cache.fidelity import measure_fidelity
from offline_kd.cache.job import Capture, current_manifest
from offline_kd.cache.unique_keys import prove_unique_keys
from offline_kd.data.blocks import ImageBlock
from offline_kd.store.card import write_card
from offline_kd.store.inventory import committed, whole_views
from offline_kd.store.layout import RECIPE_FILE, ArraySpec, Part, entry_names, num_entries, parts_of, small_files
from offline_kd.store.leases import Leases
from offline_kd.store.leftovers import sweep
from offline_kd.store.objects import read_metadata
from offline_kd.store.opening import read_addition, read_identity
from offline_kd.store.reader import Store, page_bytes, stored_object
from offline_kd.store.schema import (
    Fidelity,
    ImageSizes,
    LedgerEntry,
    StoreManifest,
    TablesEntry,
    identity_of_targets,
    ledger_name,
    page_name,
    store_digest,
    tables_ledger_name,
)
from offline_kd.store.writer import holds, read_entries, write_manifest, write_page
from offline_kd.support.console import progress, say
from offline_kd.support.errors import StoreIncomplete

MOST_LOOKED_FOR = 1000  # of the blocks that a listing lacks


def finish_if_complete(capture: Capture, leases: Leases) -> StoreManifest | None:
    """Declare the store complete, unless other writers have blocks to do yet or one of them has declared it.

    Raises StoreCorrupt when teacher and store disagree.
    """
    place, own = capture.place, dict.fromkeys(capture.own_parts, capture.num_views)
    if missing := _missing(capture, own):
        say(f"{place}: {missing[0]} blocks are left for other writers, such as {missing[1]}; the last one finishes")
        return None
    manifest = None
    while manifest is None:
        if leases.wait_for("finish", lambda: _finished(capture, own) is not None):
            manifest = _finish(capture, own, partial(leases.is_mine, "finish"))
            leases.release("finish")
        else:
            manifest = current_manifest(place)
    sweep(place)
    return manifest


def _missing(capture: Capture, views: dict[str, int]) -> tuple[int, str] | None:
    """How many ledger entries of so many views of some parts are missing, and one of them; None if none is."""
    place, groups = capture.place, capture.groups
    tables = [
        tables_ledger_name(table, part)
        for part in views
        for table in parts_of(capture.created, capture.additions)[part].tables
    ]
    names = [name for name in tables if place.size(f"ledger/{name}") is None]
    there = committed(place, capture.created, views)
    count = len(names) + sum(int((~one).sum()) for one in there.values())
    names += [
        ledger_name(int(block), groups[group], part)
        for part, one in there.items()
        for block, group in np.argwhere(~one)[:MOST_LOOKED_FOR]
    ]
    # Listings have no checksum.
    return next(((count, name) for name in names if place.size(f"ledger/{name}") is None), None)


@dataclass
class Found:
    """What the ledger says as a whole."""

    pages: dict[str, str] = field(default_factory=dict)  # sha256 of the pages of hashes, by name
    entries: dict[str, str] = field(default_factory=dict)  # sha256 of ledger entries that are in no page
    bytes_by_array: Counter[str] = field(default_factory=Counter)
    left_out: int = 0  # samples without a row, as the first view group of the first targets says

    def add(self, entry: LedgerEntry | TablesEntry, specs: Iterable[ArraySpec]) -> None:
        """Count the objects of an entry; those that all view groups share with the first one."""
        is_first = isinstance(entry, TablesEntry) or entry.first_view == 0
        extents = {spec.path: spec.extent for spec in specs}
        for key, stored in entry.objects.items():
            path = key.split("/c/")[0].removesuffix("/c")
            if is_first or extents.get(path) != "block":
                self.bytes_by_array[path] += stored.bytes
        if isinstance(entry, LedgerEntry) and is_first and not entry.addition:
            self.left_out += len(entry.left_out)


def _read_ledger(
    capture: Capture, parts: Mapping[str, Part], views: dict[str, int], keep: Callable[[str, bytes], None]
) -> Found:
    """Go through the ledger of some parts with so many views, entry by entry.

    Args:
        keep: is given name and content of every page of hashes.

    Raises StoreIncomplete if an entry is missing.
    """
    place, created, found = capture.place, capture.created, Found()
    total = num_entries(created, views)
    try:
        for part in parts.values():
            names = (tables_ledger_name(name, part.name) for name in part.tables)
            for name, content, entry in read_entries(place, names):
                found.entries[name] = stored_object(content).sha256
                found.add(entry, ())
        with progress("reading the ledger", total, "blocks") as meter:
            page, hashes = "", bytearray()
            entries = read_entries(place, entry_names(created, views))
            for name, content, entry in entries:
                assert isinstance(entry, LedgerEntry)
                found.add(entry, parts[entry.addition].specs)
                meter.advance()
                digest = hashlib.sha256(content).digest()
                if not created.has_pages:
                    found.entries[name] = digest.hex()
                    continue
                page = page_name(entry.block, range(entry.first_view, entry.end_view), entry.addition)
                hashes += digest
                if len(hashes) == page_bytes(created, entry.block):
                    found.pages[page] = hashlib.sha256(hashes).hexdigest()
                    keep(page, bytes(hashes))
                    hashes.clear()
    except FileNotFoundError as error:
        raise StoreIncomplete(
            f"{place}: blocks of other targets are missing ({error}). Run the recipe that they were added with."
        ) from None
    return found


def _finished(capture: Capture, own: dict[str, int]) -> StoreManifest | None:
    """The manifest, if it vouches for these ledger entries as they are, and the files that it lists are there."""
    place, manifest = capture.place, current_manifest(capture.place)
    if manifest is None or any(manifest.views.get(part, 0) < num_views for part, num_views in own.items()):
        return None
    if any(place.size(name) != stored.bytes for name, stored in manifest.files.items()):
        return None
    sound: list[bool] = []

    def compare(page: str, content: bytes) -> None:
        sound.append(holds(place, f"hashes/{page}", stored_object(content)))

    parts = parts_of(capture.created, [one for one in capture.additions if one.name in own])
    found = _read_ledger(capture, {name: parts[name] for name in own}, own, compare)
    listed = manifest.listed
    same = all(listed.get(name) == sha256 for name, sha256 in {**found.pages, **found.entries}.items())
    return manifest if same and all(sound) else None


def _finish(capture: Capture, own: dict[str, int], still_mine: Callable[[], bool]) -> StoreManifest | None:
    """With the lease: nobody else changes the manifest, whose other parts, if it has any, are kept.

    Returns None when another writer took the lease over.
    """
    place, created = capture.place, capture.created
    old = current_manifest(place)
    views = dict(old.views) if old else whole_views(place, created, parts_of(created, capture.additions))
    for part, num_views in own.items():
        views[part] = max(views.get(part, 0), num_views)
    known = {one.name: one for one in capture.additions}
    additions = [known.get(name) or read_addition(place, name) for name in views if name]
    parts = parts_of(created, additions)

    def keep(page: str, content: bytes) -> None:
        if still_mine():
            write_page(place, page, content)

    found = _read_ledger(capture, parts, views, keep)
    if not still_mine():
        return None
    listed = {**found.pages, **found.entries}
    digest = store_digest(read_identity(place)[0], [one.model_dump(mode="json") for one in additions], listed)

    def store_with(targets: str) -> Store:
        num_views = min(count for part, count in views.items() if part == "" or parts[part].targets == targets)
        identity = identity_of_targets(created, additions, targets, num_views)
        return Store(place, created, additions, targets, identity, listed, digest)

    targets = parts[capture.own_parts[0]].targets
    prove_unique_keys(store_with(targets))
    fidelity, sizes = _measure(capture, store_with(targets))
    manifest = StoreManifest(
        schema_version=created.schema_version,
        digest=digest,
        views=views,
        earlier=[*(old.earlier if old else []), *([old.views] if old and old.views != views else [])],
        pages=found.pages,
        entries=found.entries,
        files={},
        fidelity={**(old.fidelity if old else {}), **({targets: fidelity} if fidelity else {})},
        left_out=found.left_out,
        image_sizes=sizes,
        total_bytes=found.bytes_by_array.total(),
        bytes_by_array=dict(sorted(found.bytes_by_array.items())),
    )
    card = write_card({name: store_with(name) for name in sorted({part.targets for part in parts.values()})}, manifest)
    if not still_mine():
        return None  # this writer slept while another one declared what may be more
    for name, content in card.items():
        place.put(name, content)
    files = {name: stored_object(read_metadata(place, name)) for name in (*small_files(additions, parts), RECIPE_FILE)}
    manifest = manifest.model_copy(update={"files": files})
    write_manifest(place, manifest)
    return current_manifest(place)


def _measure(capture: Capture, store: Store) -> tuple[Fidelity | None, ImageSizes | None]:
    """Ask the teacher about as many rows as the recipe says, and no block is believed unseen.

    And between which sizes the images of those blocks lie, where they differ. Nothing, where nobody can be asked.
    """
    if capture.teacher is None:
        return None, None
    num_rows = max(capture.recipe.capture.fidelity_rows, len(store.blocks))
    images = capture.loader
    seen: list[NDArray[np.int64]] = []  # the smallest and the largest height and width so far, `[2, 2]`

    def look_at(number: int) -> ImageBlock:
        block = images[number]
        if capture.created.dataset.height is None:
            sides = np.concatenate([*seen, block.sizes()])
            sides = sides[sides.max(axis=1) > 1]  # the others are no images
            seen[:] = [np.stack([sides.min(axis=0), sides.max(axis=0)])] if len(sides) else []
        return block

    found = measure_fidelity(store, look_at, capture.teacher, num_rows, capture.device, fetch_ahead=images.fetch_ahead)
    say(f"{capture.place}: the teacher was asked again about {found.looked_at}")
    if not seen:
        return found, None
    (low, narrow), (high, wide) = seen[0].tolist()
    return found, ImageSizes(width=(narrow, wide), height=(low, high))
