"""STAGE 1, whole: images -> views -> teacher -> codec -> committed blocks -> a finished store.

Run again, it goes on where it stopped: what is committed is left alone, whatever was open is done again.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from offline_kd.data import BlockLoader, ImageBlock, dataset_fingerprint
from offline_kd.errors import DataError, StoreIncomplete, TeacherError
from offline_kd.fidelity import measure_fidelity
from offline_kd.manifest import Manifest, Split
from offline_kd.progress import progress, say
from offline_kd.recipe import Recipe
from offline_kd.store.card import write_card
from offline_kd.store.codec import encode
from offline_kd.store.reader import Arrays, Store, missing_entries, read_identity
from offline_kd.store.schema import (
    PROBES_PER_GROUP,
    SCHEMA_VERSION,
    DatasetIdentity,
    DecisionsIdentity,
    LedgerEntry,
    StoreIdentity,
    StoreManifest,
    TeacherIdentity,
    plan_views_per_group,
)
from offline_kd.store.writer import (
    commit,
    commit_tables,
    committed,
    committed_tables,
    create_or_resume,
    write_manifest,
)
from offline_kd.stream import tables_on
from offline_kd.taps import TapPoint
from offline_kd.teacher import Teacher, gate, load_teacher
from offline_kd.template_fitting import fit_tables, identify_decisions
from offline_kd.templates import pack
from offline_kd.views import ViewParameters, counter_hash, draw, render

PROBE_STREAM = 0x70726F6265  # first counter of the draws made here


def cache_teacher(
    recipe: Recipe, manifest: Manifest, roots: Sequence[Path], path: Path, device: torch.device
) -> StoreManifest:
    """Make, or go on making, the teacher store of a recipe at `path`; returns the manifest of the finished store."""
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    loader = BlockLoader(dataset, split, roots, keep_bytes=0)
    teacher = load_teacher(recipe, manifest, roots, len(dataset.classes), device)
    identity = _identify(recipe, manifest, roots, loader, teacher, path, device)
    identity = create_or_resume(path, identity)

    tables = commit_missing_tables(recipe, identity, loader, teacher, path, device)
    entries: dict[tuple[int, int], LedgerEntry] = {}
    for block in range(identity.num_blocks):
        for group, views in enumerate(identity.groups):
            if entry := committed(path, identity, block, views):
                entries[block, group] = entry
    todo = [
        block
        for block in range(identity.num_blocks)
        if any((block, group) not in entries for group in range(len(identity.groups)))
    ]
    if entries:
        say(f"{path}: resuming: {len(entries)} of {identity.num_blocks * len(identity.groups)} blocks are committed")
    key_owner = _keys_of_committed_blocks(path, identity, entries)

    open_views = sum(
        split.tars[block].count * len(identity.groups[group])
        for block in todo
        for group in range(len(identity.groups))
        if (block, group) not in entries
    )
    with progress("teacher", open_views, "views") as meter:
        for number, images in _blocks(loader, todo, recipe.data.workers):
            _refuse_used_keys(images, number, key_owner, split)
            parameters = draw(recipe.views, images.key_hash, identity.dataset.height, identity.dataset.width)
            for group, views in enumerate(identity.groups):
                if (number, group) in entries:
                    continue
                of_group = slice(views.start, views.stop)
                chosen = ViewParameters(parameters.box[:, of_group], parameters.flip[:, of_group])
                arrays = ask_teacher(teacher, recipe, identity, tables, images, chosen, number, group, device)
                entries[number, group] = commit(
                    path, identity, number, group, arrays, tar=images.name, tar_sha256=images.sha256
                )
                meter.advance(len(images) * len(views))
    return finish(path, recipe, loader, teacher, device)


def _identify(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Path],
    loader: BlockLoader,
    teacher: Teacher,
    path: Path,
    device: torch.device,
) -> StoreIdentity:
    """Everything the store will be about. The teacher passes its gate here, unless the store says it did."""
    first = loader[0]
    rows_per_block = max(tar.count for tar in loader.split.tars)
    existing = read_identity(path) if (path / "store.json").is_file() else None
    if existing and existing.teacher.weights_sha256 == teacher.weights_sha256:
        evaluated_on, measured = existing.teacher.evaluated_on, existing.teacher.measured_top1
    else:
        evaluated_on, measured = gate(teacher, recipe, manifest, roots, device)
        expected = f"expected {teacher.expected.top1:.2f}" if teacher.expected else "NO EXPECTED ACCURACY IS KNOWN"
        say(f"teacher '{teacher.name}': top-1 {measured:.2f} % on {evaluated_on}, {expected}")
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
            measured_top1=measured,
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
            requested=recipe.capture.views_per_group,
        ),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("offline-kd", "torch", "torchvision", "zarr", "numpy", "pillow")},
    )


def _blocks(loader: BlockLoader, numbers: list[int], workers: int) -> Iterator[tuple[int, ImageBlock]]:
    """Decoded blocks in the given order, read ahead by worker processes if there are any."""
    if workers == 0:
        yield from ((number, loader[number]) for number in numbers)
        return
    ahead = DataLoader(loader, batch_size=None, sampler=numbers, num_workers=min(workers, max(len(numbers), 1)))  # type: ignore[arg-type, var-annotated]
    yield from zip(numbers, ahead, strict=True)


def ask_teacher(
    teacher: Teacher,
    recipe: Recipe,
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


def commit_missing_tables(
    recipe: Recipe, identity: StoreIdentity, loader: BlockLoader, teacher: Teacher, path: Path, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Templates by decisions and array, on the device: those committed before, or fitted and committed now."""
    missing = [name for name in identity.decisions if committed_tables(path, name) is None]
    if missing:
        scratch = path / f"scratch-{os.getpid()}"
        fitted = fit_tables(teacher, identity, missing, loader, scratch, device)
        for name, (arrays, statistics) in fitted.items():
            commit_tables(path, identity, name, arrays, statistics)
    entries = [entry for name in identity.decisions if (entry := committed_tables(path, name))]
    store = Store(path, identity, [], entries, None)
    return {name: tables_on(store, name, device) for name in identity.decisions}


def _keys_of_committed_blocks(
    path: Path, identity: StoreIdentity, entries: dict[tuple[int, int], LedgerEntry]
) -> dict[int, int]:
    """Block by key hash, of what earlier runs committed."""
    store = Store(path, identity, list(entries.values()), [], None)
    group_of_block = dict(entries.keys())
    return {
        key: block
        for block, group in group_of_block.items()
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


def finish(path: Path, recipe: Recipe, loader: BlockLoader, teacher: Teacher, device: torch.device) -> StoreManifest:
    """Declare a store complete, after asking the teacher once more about rows that are read back as stage 2 will.

    Raises StoreIncomplete when blocks are missing and StoreCorrupt when teacher and store disagree.
    """
    identity = read_identity(path)
    missing = missing_entries(path, identity)
    if missing:
        raise StoreIncomplete(f"{path}: {len(missing)} blocks are missing, the first is ledger/{missing[0]}.")
    ledger = [
        entry
        for block in range(identity.num_blocks)
        for views in identity.groups
        if (entry := committed(path, identity, block, views))
    ]
    tables = [one for name in identity.decisions if (one := committed_tables(path, name))]
    store = Store(path, identity, ledger, tables, None)
    fidelity = measure_fidelity(store, loader, teacher, recipe.capture.fidelity_rows, device)
    vouched = [entry.objects for entry in ledger] + [entry.objects for entry in tables]
    objects = {key: stored.bytes for part in vouched for key, stored in part.items()}
    manifest = StoreManifest(
        schema_version=SCHEMA_VERSION,
        digest=store.digest,
        fidelity=fidelity,
        total_bytes=sum(objects.values()),
        entries=ledger,
        tables=tables,
    )
    write_manifest(path, manifest, write_card(identity, manifest))
    return manifest
