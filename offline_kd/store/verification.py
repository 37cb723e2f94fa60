"""Prove a store, and name every place where it is not what was committed."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline_kd.data.blocks import ImageBlock
from offline_kd.data.label_sets import problem_of_sets
from offline_kd.data.tars import unpack_keys
from offline_kd.store.card import CARD_FILES, is_whole_card
from offline_kd.store.chunks import decode_chunk
from offline_kd.store.comparison import compare_block, view_problem
from offline_kd.store.decisions import PROB_LEVELS, SubclassDecisions, TemplateDecisions
from offline_kd.store.features import Features, legal_codes
from offline_kd.store.inventory import Listing, PromisedEntry, few_files, num_promised, promised_entries, promised_pages
from offline_kd.store.layout import NO_KEY, NO_LABEL, RECIPE_FILE, ArraySpec, small_files
from offline_kd.store.leftovers import is_leftover
from offline_kd.store.lookup import problem_of_keys
from offline_kd.store.objects import metadata_limit, read_metadata
from offline_kd.store.opening import all_digests, open_store
from offline_kd.store.reader import Arrays, Store
from offline_kd.store.schema import Held, LedgerEntry, StoredObject, TablesEntry, kind_of
from offline_kd.store.signing import damage, signature_names
from offline_kd.store.writer import manifest_bytes
from offline_kd.support.console import progress
from offline_kd.support.errors import OfflineKDError, StoreCorrupt, StoreIncomplete, StoreUnreachable
from offline_kd.support.places import Place, can_list
from offline_kd.support.proven import read_proven

AT_ONCE = 64  # ledger entries that are looked at together
FINISHED_FILES = ("manifest.json", *CARD_FILES)


@dataclass(frozen=True)
class Fault:
    """One place where a store is wrong."""

    file: str
    problem: str
    entry: str | None = None  # the ledger entry whose block has to be done again
    is_extra: bool = False  # a file that does not belong there: it may be removed


@dataclass
class Verification:
    """What was looked at and what was found."""

    mode: str
    objects: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    leftovers: int = 0  # files of writers that are at work or were ended: no fault
    notes: list[str] = field(default_factory=list)  # what is no fault, but should be known


def verify(
    place: Place,
    *,
    quick: bool = False,
    images: Callable[[int], ImageBlock] | None = None,
    targets: str = "",
    digest: str | None = None,
) -> Verification:
    """Check a store against its own manifest and ledger.

    Quick: digest, ledger, and by listing presence and size of every object. Otherwise every file is read: sha256,
    unpacking, sentinels where there are rows and nothing else where there are none, ranges, keys used once, and view
    parameters are drawn again from their keys.

    Args:
        images: gives the image block of a number, to compare keys, image bytes, labels, views and probe pixels with.
        targets: whose targets must be there; those of all teachers are verified.
        digest: what the store must be, or must have been before it grew.

    Never raises for a damaged store: what cannot be opened is a fault of its own. Raises StoreUnreachable when a
    network does not let it be seen, which is no fault of the store.
    """
    result = Verification("quick" if quick else "full")
    try:
        if targets or digest:
            open_store(place, targets=targets, digest=digest, download_bytes=0)
        store = open_store(place, download_bytes=0)
    except StoreUnreachable:
        raise
    except OfflineKDError as error:
        result.faults.append(Fault("manifest.json", str(error)))
        return result
    store = replace(store, downloads=None)  # what is verified is what lies there
    _check_files(store, result)
    digests = list(all_digests(store))
    result.faults += [Fault(f"signatures/{one}", problem) for one in digests if (problem := damage(place, one))]
    held = store.manifest.held if store.manifest else None
    there = Listing(store, place.files()) if can_list(place) else None
    bad_pages = _check_pages(store, held, result)
    tasks = (one for one in promised_entries(store, held) if one.decisions or one.page not in bad_pages)
    _check_entries(store, tasks, num_promised(store, held), there, result, quick)
    if images is not None and not result.faults:
        result.faults += _compare_with(store, images)
    if there is not None:
        known = few_files(store, held) | {name for one in digests for name in signature_names(one)}
        strange = [name for name in there.beyond(store, held, known) if not is_leftover(name)]
        result.faults += [
            Fault(
                name, "does not belong to the store; perhaps it is being added to, or that was stopped", is_extra=True
            )
            for name in strange
            if not place.is_remote or place.size(name) is not None  # listings have no checksum
        ]
        result.leftovers = sum(is_leftover(name) for name in there.others)
    return result


def _check_entries(
    store: Store,
    tasks: Iterator[PromisedEntry],
    total: int,
    there: Listing | None,
    result: Verification,
    quick: bool,
) -> None:
    """Every ledger entry with its objects, side by side, and that no two rows have one key."""
    keys: dict[int, NDArray[np.uint64]] = {}  # by block

    def look(task: PromisedEntry) -> tuple[Verification, NDArray[np.uint64] | None]:
        return _check_entry(store, task, there, quick)

    with (
        progress("verifying", total, "blocks") as meter,
        ThreadPoolExecutor(store.at_once(store.place.parallel)) as threads,
    ):
        while some := list(islice(tasks, AT_ONCE)):
            for task, (found, key_hash) in zip(some, threads.map(look, some), strict=True):
                result.faults += found.faults
                result.objects += found.objects
                result.bytes += found.bytes
                if key_hash is not None:
                    keys[task.block] = key_hash
                meter.advance()
    result.faults += _used_twice(keys)


def _check_pages(store: Store, held: Held | None, result: Verification) -> set[str]:
    """The pages of hashes themselves; returns the names of those that are wrong."""
    wrong = set()
    for name, size in promised_pages(store, held).items():
        expected = StoredObject(bytes=size, sha256=store.sha256_listed(name))
        result.bytes += size
        if problem := _problem_of_file(store.place, f"hashes/{name}", expected):
            result.faults.append(Fault(f"hashes/{name}", f"{problem} (what it vouches for was not looked at)"))
            wrong.add(name)
    return wrong


def _check_files(store: Store, result: Verification) -> None:
    """manifest.json itself, and the small files that it lists."""
    manifest, place = store.manifest, store.place
    assert manifest is not None
    if manifest.schema_version == 1:
        return  # that version listed none
    content = read_metadata(place, "manifest.json")
    if manifest_bytes(manifest) != content:
        result.faults.append(Fault("manifest.json", "is not what `finish` wrote: a byte of it was changed"))
    small = small_files(store.additions, store.parts)
    result.faults += [Fault("manifest.json", f"does not list {name}") for name in small if name not in manifest.files]
    expected = [name for name in (*small, RECIPE_FILE) if name in manifest.files]
    # A store of an earlier version has no recipe; a copy of it may.
    unlisted = [RECIPE_FILE] if RECIPE_FILE not in manifest.files and place.size(RECIPE_FILE) is not None else []
    for name in [*expected, *unlisted]:
        problem = "is not vouched for" if name in unlisted else _problem_of_file(place, name, manifest.files[name])
        if problem and name in CARD_FILES and _is_card_of_a_copy(place, name):
            result.notes.append(
                f"{name}: was made by a copy, from checked metadata; manifest.json does not vouch for it"
            )
        elif problem:
            result.faults.append(Fault(name, problem))
    result.bytes += sum(manifest.files[name].bytes for name in expected) + len(content)


def _problem_of_file(place: Place, name: str, expected: StoredObject) -> str:
    """How a file is not what was committed; '' if it is."""
    try:
        read_proven(place, name, expected.sha256, size=expected.bytes, limit=metadata_limit(name))
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except StoreCorrupt as error:
        return str(error)
    return ""


def _is_card_of_a_copy(place: Place, name: str) -> bool:
    try:
        return is_whole_card(read_metadata(place, name))
    except (FileNotFoundError, NotADirectoryError, StoreCorrupt):
        return False


def _check_entry(
    store: Store, task: PromisedEntry, there: Listing | None, quick: bool
) -> tuple[Verification, NDArray[np.uint64] | None]:
    """One ledger entry and its objects; and the key hashes of its rows, if it has them."""
    found = Verification("entry")
    key_hash: NDArray[np.uint64] | None = None
    keys: list[str] = []
    views: Arrays = {}
    try:
        entry: LedgerEntry | TablesEntry = (
            store.tables_entry(task.part, task.decisions) if task.decisions else _block_entry(store, task)
        )
    except (StoreCorrupt, StoreIncomplete) as error:
        found.faults.append(Fault(f"ledger/{task.name}", str(error), task.name))
        return found, key_hash
    for spec in task.specs:
        key = spec.object_key(task.block, task.group)
        name = f"targets.zarr/{key}"
        found.objects += 1
        try:
            expected = store.vouched(entry, spec, key)
            found.bytes += expected.bytes
            if quick and there is not None:
                store.check_size(entry, expected, key, there.get(name))
                continue
            content = store.verified(entry, spec, task.block, task.group)
            if quick:
                continue
            chunk = decode_chunk(spec, content, name)
        except (StoreCorrupt, StoreIncomplete) as error:
            found.faults.append(Fault(name, str(error), task.name))
            continue
        if isinstance(entry, TablesEntry):
            continue
        if problem := _content_problem(store, task, spec, chunk, entry.rows):
            found.faults.append(Fault(name, problem, task.name))
        used = chunk[: entry.rows]
        if spec.name == "key_hash":
            key_hash = used.astype(np.uint64)
        if spec.name == "key" and task.group == 0:  # all groups have the same
            keys = unpack_keys(used.astype(np.uint8))
        if spec.name == "key_hash" or kind_of(spec.name) == "view":
            views[spec.name] = used
    if isinstance(entry, LedgerEntry) and not found.faults:
        found.faults += _of_keys_and_views(store, task, entry, key_hash, keys, views)
    return found, key_hash


def _of_keys_and_views(
    store: Store,
    task: PromisedEntry,
    entry: LedgerEntry,
    key_hash: NDArray[np.uint64] | None,
    keys: list[str],
    views: Arrays,
) -> list[Fault]:
    """Whether hashes follow from keys, and view parameters from hashes."""
    if keys and key_hash is not None and (problem := problem_of_keys(keys, key_hash)):
        return [Fault(f"block {task.block}", problem, task.name)]
    if views and (wrong := view_problem(store, views, range(entry.first_view, entry.end_view), len(entry.left_out))):
        name = f"targets.zarr/{store.arrays[wrong[0]][1].object_key(task.block, task.group)}"
        return [Fault(name, wrong[1], task.name)]
    return []


def _block_entry(store: Store, task: PromisedEntry) -> LedgerEntry:
    entry = store.block_entry(task.part, task.block, task.views)
    tar = store.created.dataset.tars[task.block]
    if entry.rows + len(entry.left_out) != tar.count or tar.sha256 not in (None, entry.tar_sha256):
        raise StoreCorrupt(
            f"{store.place}/ledger/{task.name}: is about {entry.rows} rows and {len(entry.left_out)} bad images of a "
            f"tar with sha256 {entry.tar_sha256}, store.json says {tar.count} of {tar.sha256}"
        )
    return entry


def _content_problem(store: Store, task: PromisedEntry, spec: ArraySpec, chunk: np.ndarray[Any, Any], rows: int) -> str:
    """What is wrong with the values of a chunk, whose bytes are those that were committed."""
    fill = np.asarray(spec.fill, dtype=spec.dtype)
    if not spec.name.startswith("probe/"):
        used, unused = chunk[:rows], chunk[rows:]
        empty = np.isnan(unused) if np.isnan(fill) else unused == fill
        if not empty.all():
            return f"{np.count_nonzero(~empty):,} values behind the last of {rows} rows, where there must be none"
    else:
        used = chunk
    if spec.name == "label" and store.created.dataset.has_sets:
        return problem_of_sets(np.asarray(used, dtype=np.uint8), store.created.num_classes)
    low, high = _range(store, task, spec)
    if used.dtype.kind == "f":
        if not _any_not_finite(used):
            return ""
        bad = ~np.isfinite(used)
    else:
        if spec.name == "key_hash":
            high = NO_KEY - 1
        if not used.size or ((low is None or used.min() >= low) and (high is None or used.max() <= high)):
            return ""
        bad = np.zeros(used.shape, dtype=bool) if low is None else (used < low)
        bad |= False if high is None else (used > high)
    place = [int(index) for index in np.argwhere(bad)[0]]
    return f"{np.count_nonzero(bad):,} values that cannot be, the first at {place}: {used[tuple(place)]}" + (
        f" (must be {low} to {high})" if low is not None else ""
    )


def _any_not_finite(values: NDArray[Any]) -> bool:
    """By the bits: an exponent of ones, or more. Several times as fast as `np.isfinite`, above all for float16."""
    bits = values.view(f"<u{values.itemsize}")
    sign = bits.dtype.type(1 << (8 * values.itemsize - 1))
    infinity = np.array(np.inf, dtype=values.dtype).view(bits.dtype)
    return bool(np.bitwise_and(bits, sign - bits.dtype.type(1)).max(initial=0) >= infinity)


def _range(store: Store, task: PromisedEntry, spec: ArraySpec) -> tuple[float | None, float | None]:
    """The smallest and largest legal value of an integer array; None where every value is legal."""
    created = store.created
    known: dict[str, tuple[float, float]] = {
        "label": (NO_LABEL, NO_LABEL) if created.dataset.labels == "none" else (0, created.num_classes - 1),
        **{f"view/{name}": array.legal for name, array in created.views.arrays().items()},
        "probe/row": (0, created.rows_per_block - 1),
        "probe/view": (0, created.views_per_group - 1),
    }
    if spec.name in known:
        return known[spec.name]
    part = store.parts[task.part]
    if spec.name.startswith("logits/"):
        return part.codec.legal_range(spec.name.removeprefix("logits/")) or (None, None)
    if spec.name.startswith(("decisions/", "features/")):
        _, name, array = spec.name.split("/")
        config = part.tapped[name].config
        if isinstance(config, SubclassDecisions):
            return 0, config.per_class - 1
        if isinstance(config, TemplateDecisions) and array in ("id", "prob"):
            return 0, config.templates - 1 if array == "id" else PROB_LEVELS
        if isinstance(config, Features) and array == "codes":
            return legal_codes(config)
    return None, None


def _used_twice(keys: dict[int, NDArray[np.uint64]]) -> list[Fault]:
    """Blocks with a key that another row has."""
    if not keys:
        return []
    hashes = np.concatenate(list(keys.values()))
    blocks = np.repeat(list(keys), [len(one) for one in keys.values()])
    order = hashes.argsort(kind="stable")
    twice = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    pairs = sorted({(int(blocks[order[index]]), int(blocks[order[index + 1]])) for index in twice})
    return [Fault(f"block {one}", f"shares a key with block {other}: pack the dataset anew") for one, other in pairs]


def _compare_with(store: Store, images: Callable[[int], ImageBlock]) -> list[Fault]:
    """Every block beside its images."""
    faults = []
    with progress("comparing with the dataset", len(store.blocks), "blocks") as meter:
        for number in store.blocks:
            try:
                problem = compare_block(store, number, images(number))
            except StoreUnreachable:
                raise
            except OfflineKDError as error:
                problem = str(error)
            faults += [Fault(f"block {number}", problem)] if problem else []
            meter.advance()
    return faults


# ---- repairing -----------------------------------------------------------------------------------------------------


def take_back(place: Place, faults: Sequence[Fault], remove_extra: bool) -> list[str]:
    """Take back the proof of every faulty block, so that `cache-teacher` does exactly those again.

    The card, zarr's metadata and the manifest are written anew by `finish`; extra files are removed only if asked for.
    Returns the ledger entries whose blocks have to be done.
    """
    entries = sorted({fault.entry for fault in faults if fault.entry is not None})
    for fault in faults:
        made_again = fault.file.startswith(("targets.zarr/", "ledger/", "hashes/")) or fault.file in FINISHED_FILES
        if remove_extra if fault.is_extra else made_again:
            place.delete(fault.file)
    for name in entries:
        place.delete(f"ledger/{name}")
    return entries


def faults_as_json(result: Verification) -> str:
    faults = [{"file": one.file, "problem": one.problem, "block": one.entry} for one in result.faults]
    about = {
        "mode": result.mode,
        "objects": result.objects,
        "bytes": result.bytes,
        "leftovers": result.leftovers,
        "faults": faults,
        "notes": result.notes,
    }
    return json.dumps(about, indent=2)
