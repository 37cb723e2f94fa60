"""STAGE 1, whole: images -> views -> teacher -> codec -> committed blocks -> a finished store.

Run again, it goes on where it stopped: what is committed is left alone, whatever was open is done again. Run by several
processes, on any machines, it is shared: a block belongs to whoever has its lease, and the last writer finishes.
"""

import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from offline_kd.data import BlockLoader, ImageBlock, dataset_fingerprint
from offline_kd.errors import DataError, StoreCorrupt, StoreMismatch, TeacherError
from offline_kd.fidelity import measure_fidelity
from offline_kd.manifest import Manifest, Split
from offline_kd.progress import progress, say
from offline_kd.recipe import Recipe
from offline_kd.store.card import write_card
from offline_kd.store.codec import encode
from offline_kd.store.leases import POLL_SECONDS, Leases, leases_at
from offline_kd.store.place import Folder, Place, place_at
from offline_kd.store.reader import Arrays, Store, parse_metadata, read_addition, read_identity, stored_object
from offline_kd.store.schema import (
    PROBES_PER_GROUP,
    SCHEMA_VERSION,
    Addition,
    DatasetIdentity,
    DecisionsIdentity,
    Part,
    StoreIdentity,
    StoreManifest,
    TeacherIdentity,
    entry_names,
    identity_of_targets,
    ledger_name,
    parts_of,
    plan_views_per_group,
    store_digest,
    tables_ledger_name,
    with_count,
    zarr_metadata,
)
from offline_kd.store.writer import (
    commit,
    commit_tables,
    committed_tables,
    create_addition,
    create_or_resume,
    manifest_bytes,
    parse_entry,
    read_ledger,
    write_manifest,
)
from offline_kd.stream import tables_on
from offline_kd.taps import TapPoint
from offline_kd.teacher import Teacher, gate, load_teacher
from offline_kd.template_fitting import fit_tables, identify_decisions
from offline_kd.templates import pack
from offline_kd.views import ViewParameters, counter_hash, draw, render, view_groups

PROBE_STREAM = 0x70726F6265  # first counter of the draws made here


@dataclass(frozen=True)
class Worker:
    """Which of `count` writers this one is."""

    index: int = 0
    count: int = 1
    own_blocks_only: bool = False  # as in a job array, where the others may run tomorrow

    def blocks(self, num_blocks: int) -> list[int]:
        """The blocks that this writer tries, in its order: its own, or all, beginning elsewhere than the others."""
        if self.own_blocks_only:
            return list(range(self.index, num_blocks, self.count))
        first = self.index * num_blocks // self.count
        return [*range(first, num_blocks), *range(first)]


@dataclass(frozen=True)
class Capture:
    """What one run of stage 1 works on."""

    recipe: Recipe
    loader: BlockLoader
    teacher: Teacher
    device: torch.device
    place: Place
    created: StoreIdentity  # as in store.json
    additions: list[Addition]  # all of the store, those of this run included
    own_parts: list[str]  # that this run commits
    num_views: int

    @property
    def groups(self) -> list[range]:
        return view_groups(self.num_views, self.created.views_per_group)

    def identity_of(self, part: str) -> StoreIdentity:
        """The store as this part sees it: what its teacher is asked for."""
        added = next((one for one in self.additions if one.name == part), None)
        update = {"views": with_count(self.created.views, self.num_views)}
        if added is None:
            return self.created.model_copy(update=update)
        about = {"teacher": added.teacher, "codec": added.codec, "decisions": added.decisions}
        return self.created.model_copy(update=update | about)


def cache_teacher(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Path],
    location: Place | str | Path,
    device: torch.device,
    *,
    worker: Worker | None = None,
    add: bool = False,
) -> StoreManifest | None:
    """Make, go on making, or add to the teacher store of a recipe.

    A store grows by itself when the recipe has more views, or more decisions of the same teacher.

    Args:
        worker: which of several writers this is; None: the only one, or one of several that share all blocks.
        add: another teacher's targets may be added to a store, under the recipe's name.

    Returns:
        The manifest of the finished store; None when other writers have blocks to do yet.
    """
    place = location if not isinstance(location, str | Path) else place_at(location)
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    loader = BlockLoader(dataset, split, roots, keep_bytes=0)
    teacher = load_teacher(recipe, manifest, roots, len(dataset.classes), device)
    wanted = _identify(recipe, manifest, roots, loader, teacher, place, device)
    created, additions, own_parts = _announce(place, wanted, recipe, add)
    num_views = recipe.views.num_views
    if num_views % created.views_per_group:
        raise StoreMismatch(
            f"{place}: stores views in groups of {created.views_per_group}, which does not divide the recipe's "
            f"{num_views}. Use a multiple: --set views.count=..."
        )
    capture = Capture(recipe, loader, teacher, device, place, created, additions, own_parts, num_views)
    with leases_at(place) as leases:
        for part in own_parts:
            _capture_part(capture, parts_of(created, additions)[part], worker or Worker(), leases)
        return _finish_if_complete(capture, leases)


def _announce(
    place: Place, wanted: StoreIdentity, recipe: Recipe, add: bool
) -> tuple[StoreIdentity, list[Addition], list[str]]:
    """Create the store, or find what of the recipe it lacks: identity, all additions, and the parts of this run."""
    if place.size("store.json") is None:
        return create_or_resume(place, wanted), [], [""]
    _, existing = read_identity(place)
    manifest = _current_manifest(place)
    if manifest and manifest.held:
        raise StoreMismatch(
            f"{place}: is a partial copy ({manifest.held.model_dump(mode='json')}), which cannot be added to. Pull all "
            "of the store, or capture into another --store."
        )
    additions = [
        read_addition(place, name.removeprefix("additions/").removesuffix(".json"))
        for name in sorted(place.sizes("additions"))
        if name.endswith(".json")
    ]
    same_teacher = (existing.teacher.weights_sha256, existing.codec) == (wanted.teacher.weights_sha256, wanted.codec)
    if same_teacher or not add:
        name, targets, first_decisions = "", "", existing.decisions
        first = {"name": existing.name, "decisions": _only(wanted.decisions, existing.decisions)}
        own_parts = [""]
    else:
        name = targets = recipe.name
        known = next((one for one in additions if one.name == name), None)
        first_decisions = known.decisions if known else wanted.decisions
        first = {field: getattr(existing, field) for field in ("name", "teacher", "codec", "decisions")}
        own_parts = [name]
    created = create_or_resume(place, wanted.model_copy(update=first))
    if name:
        decisions = _only(wanted.decisions, first_decisions)
        one = Addition(name=name, extends=None, teacher=wanted.teacher, codec=wanted.codec, decisions=decisions)
        additions = _with(additions, create_addition(place, created, one))
    more = {tap: about for tap, about in wanted.decisions.items() if tap not in first_decisions}
    for one in [one for one in additions if one.extends == targets]:
        if taken := {tap: more.pop(tap) for tap in one.decisions if tap in more}:
            create_addition(place, created, one.model_copy(update={"decisions": {**one.decisions, **taken}}))
            own_parts.append(one.name)
    if more:
        tap_name = "-".join([*([targets] if targets else []), *more])[:100]
        about = {"teacher": wanted.teacher, "codec": wanted.codec, "decisions": more}
        one = create_addition(place, created, Addition(name=tap_name, extends=targets, **about))
        additions = _with(additions, one)
        own_parts.append(one.name)
    return created, additions, own_parts


def _only(decisions: Mapping[str, DecisionsIdentity], names: Iterable[str]) -> dict[str, DecisionsIdentity]:
    return {name: about for name, about in decisions.items() if name in names}


def _with(additions: list[Addition], one: Addition) -> list[Addition]:
    return [*(other for other in additions if other.name != one.name), one]


def _capture_part(capture: Capture, part: Part, worker: Worker, leases: Leases) -> None:
    """Commit every block and view group of one part that is not committed yet, sharing the work with other writers."""
    place, loader, identity = capture.place, capture.loader, capture.identity_of(part.name)
    tables = _commit_missing_tables(capture, part, leases)
    mine = worker.blocks(identity.num_blocks)
    present = place.sizes("ledger")
    done = {
        (block, group)
        for block in mine
        for group, views in enumerate(capture.groups)
        if f"ledger/{ledger_name(block, views, part.name)}" in present
    }
    if done:
        say(f"{place}: resuming: {len(done)} of {len(mine) * len(capture.groups)} blocks are committed")
    key_owner = _keys_of_committed_blocks(capture, present) if part.name == "" else {}

    def open_groups(block: int) -> list[int]:
        for group, views in enumerate(capture.groups):
            if (block, group) not in done and place.size(f"ledger/{ledger_name(block, views, part.name)}") is not None:
                done.add((block, group))
        return [group for group in range(len(capture.groups)) if (block, group) not in done]

    def claimed() -> Iterator[int]:
        for block in mine:
            if all((block, group) in done for group in range(len(capture.groups))):
                continue
            if open_groups(block) and leases.claim(_lease(part, block)):
                if open_groups(block):
                    yield block
                else:
                    leases.release(_lease(part, block))

    views_of = [len(views) for views in capture.groups]
    open_views = sum(
        loader.split.tars[block].count * views_of[group]
        for block in mine
        for group in range(len(capture.groups))
        if (block, group) not in done
    )
    workers, waiting = capture.recipe.data.workers, False
    with progress("teacher", open_views, "views") as meter:
        while True:
            for number, images in _blocks(loader, claimed(), workers):
                if part.name == "":
                    _refuse_used_keys(images, number, key_owner, loader.split)
                parameters = draw(identity.views, images.key_hash, identity.dataset.height, identity.dataset.width)
                for group in open_groups(number):
                    of_group = slice(capture.groups[group].start, capture.groups[group].stop)
                    chosen = ViewParameters(parameters.box[:, of_group], parameters.flip[:, of_group])
                    arrays = ask_teacher(
                        capture.teacher, identity, tables, images, chosen, number, group, capture.device
                    )
                    if part.name:
                        _refuse_other_rows(capture, arrays, images, number, group)
                    commit(
                        place,
                        part,
                        number,
                        group,
                        capture.groups[group],
                        arrays,
                        tar=images.name,
                        tar_sha256=images.sha256,
                        still_mine=lambda: leases.is_mine(_lease(part, number)),  # noqa: B023
                    )
                    done.add((number, group))
                    meter.advance(len(images) * len(capture.groups[group]))
                leases.release(_lease(part, number))
            if not any(open_groups(block) for block in mine):
                return
            if not waiting:
                say(f"{place}: the blocks that are left are being done by other writers: waiting for them")
            workers, waiting = 0, True
            time.sleep(POLL_SECONDS)


def _lease(part: Part, block: int) -> str:
    return f"{part.name or 'block'}-{block:06d}"


def _refuse_other_rows(capture: Capture, arrays: Arrays, images: ImageBlock, block: int, group: int) -> None:
    """An addition must be about exactly the rows and views that the store has: raises StoreMismatch otherwise."""
    name = ledger_name(block, capture.groups[group])
    contents = read_ledger(capture.place, [name]) if capture.place.size(f"ledger/{name}") is not None else {}
    if not contents:
        raise StoreMismatch(
            f"{capture.place}: has no ledger/{name}, so nothing can be added to it. Capture these views of the first "
            "teacher before, or add fewer: --set views.count=..."
        )
    store = _store_of(capture, "", capture.created, contents)
    for array in ("key_hash", "image_crc", "label", "view/box", "view/flip"):
        if not np.array_equal(store.read(block, group, [array])[array], arrays[array]):
            raise StoreMismatch(
                f"{capture.place}: block {block} ({images.name}), {array} is not what this capture has: the images or "
                "views differ from those that the store was created with. Capture another store."
            )


def _store_of(capture: Capture, targets: str, identity: StoreIdentity, contents: Mapping[str, bytes]) -> Store:
    """The store as far as these ledger entries reach."""
    entries = {name: stored_object(content).sha256 for name, content in contents.items()}
    identity = identity.model_copy(update={"views": with_count(identity.views, capture.num_views)})
    return Store(capture.place, capture.created, capture.additions, targets, identity, entries, digest="")


def _identify(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Path],
    loader: BlockLoader,
    teacher: Teacher,
    place: Place,
    device: torch.device,
) -> StoreIdentity:
    """Everything the store will be about. The teacher passes its gate here, unless the store says it did."""
    existing = read_identity(place)[1] if place.size("store.json") is not None else None
    gated = [existing.teacher] if existing else []
    if existing and place.size(f"additions/{recipe.name}.json") is not None:
        gated.append(read_addition(place, recipe.name).teacher)
    known = next((one for one in gated if one.weights_sha256 == teacher.weights_sha256), None)
    if known:
        evaluated_on, measured = known.evaluated_on, known.measured_top1
    else:
        evaluated_on, measured = gate(teacher, recipe, manifest, roots, device)
        expected = f"expected {teacher.expected.top1:.2f}" if teacher.expected else "NO EXPECTED ACCURACY IS KNOWN"
        say(f"teacher '{teacher.name}': top-1 {measured:.2f} % on {evaluated_on}, {expected}")
    return describe_capture(recipe, loader, teacher, evaluated_on, measured, existing, device)


def describe_capture(
    recipe: Recipe,
    loader: BlockLoader,
    teacher: Teacher,
    evaluated_on: str,
    measured_top1: float,
    existing: StoreIdentity | None,
    device: torch.device,
) -> StoreIdentity:
    """The identity of the store that a recipe makes; one that exists already decides how views are grouped."""
    first = loader[0]
    rows_per_block = max(tar.count for tar in loader.split.tars)
    return StoreIdentity(
        schema_version=SCHEMA_VERSION,
        name=recipe.name,
        dataset=DatasetIdentity(
            name=recipe.data.dataset,
            split=recipe.data.train,
            fingerprint=dataset_fingerprint(loader.dataset, loader.split),
            classes=loader.dataset.classes,
            height=first.images.shape[2],
            width=first.images.shape[3],
            tars=loader.split.tars,
            licence=loader.dataset.licence,
        ),
        teacher=TeacherIdentity(
            name=teacher.name,
            model=teacher.model,
            model_args=teacher.model_args,
            weights_sha256=teacher.weights_sha256,
            normalisation=teacher.normalisation,
            dtype=teacher.dtype,
            evaluated_on=evaluated_on,
            measured_top1=measured_top1,
            licence=teacher.licence,
        ),
        views=recipe.views,
        codec=recipe.capture.codec,
        decisions=identify_decisions(teacher, recipe.capture.decisions, first.images[:1].to(device)),
        rows_per_block=rows_per_block,
        views_per_group=plan_views_per_group(
            recipe.views,
            rows_per_block=rows_per_block,
            num_classes=len(loader.dataset.classes),
            requested=recipe.capture.views_per_group or (existing.views_per_group if existing else None),
        ),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("offline-kd", "torch", "torchvision", "zarr", "numpy", "pillow")},
    )


def _blocks(loader: BlockLoader, numbers: Iterator[int], workers: int) -> Iterator[tuple[int, ImageBlock]]:
    """Decoded blocks in the given order, read ahead by worker processes if there are any."""
    if workers == 0:
        yield from ((number, loader[number]) for number in numbers)
        return
    order: list[int] = []

    def remembered() -> Iterator[int]:
        for number in numbers:
            order.append(number)
            yield number

    ahead = DataLoader(loader, batch_size=None, sampler=_Once(remembered()), num_workers=min(workers, len(loader)))  # type: ignore[arg-type, var-annotated]
    for index, images in enumerate(ahead):
        yield order[index], images


class _Once:
    """An iterator as a sampler."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return self.numbers


def ask_teacher(
    teacher: Teacher,
    identity: StoreIdentity,
    tables: Mapping[str, dict[str, Tensor]],
    block: ImageBlock,
    parameters: ViewParameters,
    number: int,
    group: int,
    device: torch.device,
) -> Arrays:
    """Every array of the store for one block and view group, by asking the teacher about every view."""
    count, num_views = parameters.flip.shape
    if block.images.shape[2:] != (identity.dataset.height, identity.dataset.width):
        raise DataError(
            f"tar {block.name}: images are {block.images.shape[3]}x{block.images.shape[2]}, the store is for "
            f"{identity.dataset.width}x{identity.dataset.height}. Images of one dataset must have one size."
        )
    images = block.images.to(device)
    box, flip = (torch.from_numpy(array).to(device) for array in (parameters.box, parameters.flip))
    total = count * num_views
    probes = np.sort(counter_hash(PROBE_STREAM, number, group, np.arange(PROBES_PER_GROUP, dtype=np.uint64)) % total)
    probes = probes.astype(np.int64)
    probe_pixels = np.zeros((PROBES_PER_GROUP, *block.images.shape[1:]), dtype=np.uint8)
    logits = np.empty((total, identity.num_classes), dtype=np.float32)
    labels = torch.from_numpy(block.labels).long().to(device)
    points: list[TapPoint] = [about.config for about in identity.decisions.values()]
    decided: dict[str, list[Tensor]] = {}
    for start in range(0, total, teacher.batch_size):
        flat = torch.arange(start, min(start + teacher.batch_size, total), device=device)
        sample, view = flat // num_views, flat % num_views
        pixels = render(images[sample], box[sample, view], flip[sample, view], identity.views.fill)
        answer, maps = teacher.logits_and_maps(pixels, points)
        if answer.shape[1] != identity.num_classes:
            raise TeacherError(
                f"teacher '{teacher.name}' gives {answer.shape[1]} logits, dataset '{identity.dataset.name}' has "
                f"{identity.num_classes} classes."
            )
        if not answer.isfinite().all():
            row, column = (~answer.isfinite()).nonzero()[0].tolist()
            raise TeacherError(
                f"teacher '{teacher.name}': logit {column} is {answer[row, column].item()} for sample "
                f"'{block.keys[sample[row]]}' of {block.name}, view {identity.groups[group][view[row]]}. "
                "The block was not committed. Check the weights, and the dtype if it is not float32."
            )
        stop = start + len(flat)
        logits[start:stop] = answer.cpu().numpy()
        for (name, about), features in zip(identity.decisions.items(), maps, strict=True):
            _check_map(about, features, block.name)
            for part, values in pack(about.config, features, labels[sample], tables[name]).items():
                decided.setdefault(f"decisions/{name}/{part}", []).append(values.cpu())
        seen = np.flatnonzero((probes >= start) & (probes < stop))
        probe_pixels[seen] = pixels[torch.from_numpy(probes[seen] - start).to(device)].cpu().numpy()
    arrays: Arrays = {
        "key_hash": block.key_hash,
        "image_crc": block.image_crc,
        "label": block.labels,
        "view/box": parameters.box,
        "view/flip": parameters.flip,
        "probe/row": (probes // num_views).astype(np.int32),
        "probe/view": (probes % num_views).astype(np.int32),
        "probe/pixels": probe_pixels,
    }
    encoded = encode(identity.codec, logits.reshape(count, num_views, -1))
    arrays |= {f"logits/{name}": array for name, array in encoded.items()}
    for name, parts in decided.items():
        whole = torch.cat(parts)
        arrays[name] = whole.view(count, num_views, *whole.shape[1:]).numpy()
    return arrays


def _check_map(about: DecisionsIdentity, features: Tensor, where: str) -> None:
    expected = (about.channels, about.height, about.width)
    if tuple(features.shape[1:]) != expected or not features.isfinite().all():
        raise TeacherError(
            f"tap '{about.config.module}': gave a map of {list(features.shape[1:])} for {where}, the store is for "
            f"{list(expected)}, or features that are not finite. The block was not committed. Check weights and images."
        )


def _commit_missing_tables(capture: Capture, part: Part, leases: Leases) -> dict[str, dict[str, Tensor]]:
    """Templates by decisions and array, on the device: those committed before, or fitted and committed now."""
    place, identity = capture.place, capture.identity_of(part.name)

    def missing() -> list[str]:
        return [name for name in part.tables if committed_tables(place, part.name, name) is None]

    lease = f"{part.name or 'first'}-templates"
    if missing() and leases.wait_for(lease, lambda: not missing()):
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=_scratch_folder(place)) as scratch:
            fitted = fit_tables(capture.teacher, identity, missing(), capture.loader, Path(scratch), capture.device)
        for name, (arrays, statistics) in fitted.items():
            commit_tables(place, part, name, arrays, statistics)
        leases.release(lease)
    contents = read_ledger(place, [tables_ledger_name(name, part.name) for name in part.tables])
    targets = part.targets
    store = _store_of(capture, targets, identity_of_targets(capture.created, capture.additions, targets, 1), contents)
    return {name: tables_on(store, name, capture.device) for name in part.tables}


def _scratch_folder(place: Place) -> Path | None:
    """Features may be large: beside the store, where there is room for it, rather than in /tmp."""
    return place.path if isinstance(place, Folder) else None


def _keys_of_committed_blocks(capture: Capture, present: Mapping[str, int]) -> dict[int, int]:
    """Block by key hash, of what was committed before."""
    of_block = {
        block: (group, ledger_name(block, views))
        for block in range(capture.created.num_blocks)
        for group, views in enumerate(capture.groups)
        if f"ledger/{ledger_name(block, views)}" in present
    }
    store = _store_of(capture, "", capture.created, read_ledger(capture.place, [name for _, name in of_block.values()]))
    return {
        key: block
        for block, (group, _) in of_block.items()
        for key in store.read(block, group, ["key_hash"])["key_hash"].tolist()
    }


def _refuse_used_keys(block: ImageBlock, number: int, key_owner: dict[int, int], split: Split) -> None:
    for key, key_hash in zip(block.keys, block.key_hash.tolist(), strict=True):
        owner = key_owner.setdefault(key_hash, number)
        if owner != number:
            raise DataError(
                f"{block.name}: key '{key}' was used before, in {split.tars[owner].file}. "
                "Keys of a split must be unique: pack the dataset again."
            )


# ---- finishing -----------------------------------------------------------------------------------------------------


def _finish_if_complete(capture: Capture, leases: Leases) -> StoreManifest | None:
    """Declare the store complete, after asking the teacher once more about rows that are read back as stage 2 will.

    Raises StoreCorrupt when teacher and store disagree.
    """
    place, created = capture.place, capture.created
    old = _current_manifest(place)
    views = dict(old.views) if old else _views_in_ledger(capture)
    for part in capture.own_parts:
        views[part] = max(views.get(part, 0), capture.num_views)
    additions = [one for one in capture.additions if one.name in views]
    names = entry_names(created, parts_of(created, additions), views)
    present = place.sizes("ledger")
    missing = [name for name in names if f"ledger/{name}" not in present]
    if missing:
        say(f"{place}: {len(missing)} blocks are left for other writers, such as {missing[0]}; the last one finishes")
        return None
    contents = read_ledger(place, names)
    entries = {name: stored_object(content).sha256 for name, content in contents.items()}

    def finished() -> StoreManifest | None:
        manifest = _current_manifest(place)
        if manifest is None or manifest.views != views or manifest.entries != entries:
            return None
        whole = all(place.size(name) == stored.bytes for name, stored in manifest.files.items())
        return manifest if whole else None

    if leases.wait_for("finish", lambda: finished() is not None):
        _finish(capture, views, additions, contents, entries, old)
    manifest = finished()
    assert manifest is not None
    return manifest


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


def _current_manifest(place: Place) -> StoreManifest | None:
    """The manifest of an earlier finish, unless there is none that can be read."""
    try:
        content = place.read("manifest.json")
        manifest = parse_metadata(StoreManifest, content, f"{place}/manifest.json")
    except (FileNotFoundError, StoreCorrupt):
        return None
    return manifest if manifest_bytes(manifest) == content else None


def _finish(
    capture: Capture,
    views: dict[str, int],
    additions: list[Addition],
    contents: dict[str, bytes],
    entries: dict[str, str],
    old: StoreManifest | None,
) -> None:
    place, created = capture.place, capture.created
    raw, _ = read_identity(place)
    digest = store_digest(raw, [one.model_dump(mode="json") for one in additions], entries)
    parsed = {name: parse_entry(name, content, name) for name, content in contents.items()}
    fidelity = dict(old.fidelity) if old else {}
    parts = parts_of(created, additions)
    targets_of_run = parts[capture.own_parts[0]].targets

    def store_with(targets: str) -> Store:
        num_views = min(count for part, count in views.items() if part == "" or parts[part].targets == targets)
        identity = identity_of_targets(created, additions, targets, num_views)
        return Store(place, created, additions, targets, identity, entries, digest, parsed={**parsed})

    store = store_with(targets_of_run)
    fidelity[targets_of_run] = measure_fidelity(
        store, capture.loader, capture.teacher, capture.recipe.capture.fidelity_rows, capture.device
    )
    by_array: dict[str, dict[str, int]] = {}
    for entry in parsed.values():
        for key, stored in entry.objects.items():
            by_array.setdefault(key.split("/c/")[0].removesuffix("/c"), {})[key] = stored.bytes
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
        total_bytes=sum(sum(sizes.values()) for sizes in by_array.values()),
        bytes_by_array={name: sum(sizes.values()) for name, sizes in sorted(by_array.items())},
    )
    all_targets = sorted({part.targets for part in parts.values()})
    card = write_card({targets: store_with(targets) for targets in all_targets}, manifest)
    for name, content in card.items():
        place.put(name, content)
    names = ["store.json", *(f"additions/{one.name}.json" for one in additions), *zarr_metadata(parts), *card]
    files = {name: stored_object(place.read(name)) for name in names}
    write_manifest(place, manifest.model_copy(update={"files": files}))
