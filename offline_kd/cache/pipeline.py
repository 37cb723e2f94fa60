"""STAGE 1, whole: images -> views -> teacher -> codec -> committed blocks -> a finished store.

Run again, it goes on where it stopped: what is committed is left alone, whatever was open is done again. Run by several
processes, on any machines, it is shared: a block belongs to whoever has its lease, and the last writer finishes.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from offline_kd.cache.finish import finish_if_complete
from offline_kd.cache.job import Capture, announce, identify, refuse_uneven_views, store_of
from offline_kd.cache.tables import fit_tables
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import BadImage, BlockLoader, Decoder, ImageBlock
from offline_kd.data.manifest import Manifest, Split
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import Recipe
from offline_kd.store.codecs import CODEC_TABLES
from offline_kd.store.decisions import pack
from offline_kd.store.join import tables_on
from offline_kd.store.leases import POLL_SECONDS, Leases, leases_at
from offline_kd.store.places import Folder, Place, place_at
from offline_kd.store.reader import Arrays
from offline_kd.store.schema import (
    PROBES_PER_GROUP,
    DecisionsIdentity,
    Part,
    StoreIdentity,
    StoreManifest,
    identity_of_targets,
    ledger_name,
    parts_of,
    tables_ledger_name,
)
from offline_kd.store.writer import commit, commit_tables, committed_tables, read_ledger
from offline_kd.support.console import progress, say
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import DataError, StoreMismatch, TeacherError
from offline_kd.views.choice import choose
from offline_kd.views.kind import Parameters, draw
from offline_kd.views.render import render_some, view_batches

ENCODE_BYTES = 2**24
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


class CaptureOptions(TypedDict, total=False):
    """What a capture may be told besides what it is about."""

    teacher: Teacher | None  # one that is in memory, on the device; None: the one that the recipe names
    worker: Worker | None  # which of several writers this is; None: the only one, or one that shares all blocks
    add: bool  # another teacher's targets may be added to a store, under the recipe's name


def cache_teacher(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Path],
    location: Place | str | Path,
    device: torch.device,
    **options: Unpack[CaptureOptions],
) -> StoreManifest | None:
    """Make, go on making, or add to the teacher store of a recipe.

    A store grows by itself when the recipe has more views, or more decisions of the same teacher.

    Returns:
        The manifest of the finished store; None when other writers have blocks to do yet.
    """
    place = location if not isinstance(location, str | Path) else place_at(location)
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    loader = BlockLoader(
        dataset, split, roots, keep_bytes=0, decode=recipe.views.is_exact, on_bad=recipe.data.bad_images
    )
    teacher = options.get("teacher") or load_teacher(recipe, manifest, roots, len(dataset.classes), device)
    wanted = identify(recipe, manifest, roots, loader, teacher, place, device)
    created, additions, own_parts = announce(place, wanted, recipe, options.get("add", False))
    capture = Capture(recipe, loader, teacher, device, place, created, additions, own_parts, recipe.views.num_views)
    refuse_uneven_views(capture)
    with leases_at(place) as leases:
        for part in own_parts:
            _capture_part(capture, parts_of(created, additions)[part], options.get("worker") or Worker(), leases)
        return finish_if_complete(capture, leases)


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
                parameters = draw(identity.views, images.key_hash, images.sizes())
                for group in open_groups(number):
                    of_group = slice(capture.groups[group].start, capture.groups[group].stop)
                    chosen = {name: array[:, of_group] for name, array in parameters.items()}
                    arrays, left_out = ask_teacher(
                        capture.teacher, identity, tables, images, chosen, number, group, capture.device
                    )
                    if group == 0 and part.name == "":
                        for bad in left_out:
                            say(f"{images.path}: sample '{bad.key}' is left out: {bad.problem}")
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
                        left_out={bad.key: bad.problem for bad in left_out},
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
    store = store_of(capture, "", capture.created, contents)
    for array in ("key_hash", "image_crc", "label", *(f"view/{name}" for name in capture.created.views.arrays())):
        if not np.array_equal(store.read(block, group, [array])[array], arrays[array]):
            raise StoreMismatch(
                f"{capture.place}: block {block} ({images.name}), {array} is not what this capture has: the images or "
                "views differ from those that the store was created with. Capture another store."
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
    parameters: Parameters,
    number: int,
    group: int,
    device: torch.device,
) -> tuple[Arrays, list[BadImage]]:
    """Every array of the store for one block and view group, by asking the teacher about every view.

    And the samples of the tar that have no row, because their images cannot be decoded.
    """
    dataset = identity.dataset
    if dataset.height is not None and block.images.shape[2:] != (dataset.height, dataset.width):
        raise DataError(
            f"tar {block.name}: images are {block.images.shape[3]}x{block.images.shape[2]}, the store is for "
            f"{dataset.width}x{dataset.height}. Images of one dataset must have one size, or views that resize them."
        )
    size = identity.seen_size[0]  # of resampled views, which are square
    labels = torch.from_numpy(block.labels).long().to(device)
    points: list[TapPoint] = [about.config for about in identity.decisions.values()]
    decided: dict[str, list[Tensor]] = {}
    encoded: dict[str, list[NDArray[np.generic]]] = {}
    waiting: list[NDArray[np.float32]] = []  # logits that are encoded together: never those of a whole block

    def encode_waiting() -> None:
        if waiting:
            for name, array in identity.codec.encode(np.concatenate(waiting), codec_tables).items():
                encoded.setdefault(f"logits/{name}", []).append(array)
        waiting.clear()

    codec_tables = {name: table.cpu().numpy() for name, table in tables.get(CODEC_TABLES, {}).items()}
    decoder = Decoder(block)
    for row, view, pixels in view_batches(block, decoder, parameters, identity.views, size, teacher.batch_size, device):
        answer, maps = teacher.logits_and_maps(pixels, points)
        if answer.shape[1] != identity.num_classes:
            raise TeacherError(
                f"teacher '{teacher.name}' gives {answer.shape[1]} logits, dataset '{dataset.name}' has "
                f"{identity.num_classes} classes."
            )
        if not answer.isfinite().all():
            at, column = (~answer.isfinite()).nonzero()[0].tolist()
            raise TeacherError(
                f"teacher '{teacher.name}': logit {column} is {answer[at, column].item()} for sample "
                f"'{block.keys[row[at]]}' of {block.name}, view {identity.groups[group][view[at]]}. "
                "The block was not committed. Check the weights, and the dtype if it is not float32."
            )
        waiting.append(answer.cpu().numpy())
        if sum(one.nbytes for one in waiting) >= ENCODE_BYTES:
            encode_waiting()
        of_rows = labels[torch.from_numpy(row).to(device)]
        for (name, about), features in zip(identity.decisions.items(), maps, strict=True):
            _check_map(about, features, block.name)
            for part, values in pack(about.config, features, of_rows, tables[name]).items():
                decided.setdefault(f"decisions/{name}/{part}", []).append(values.cpu())
    encode_waiting()
    kept, parameters = _without_bad_rows(block, decoder, parameters)
    count, num_views = parameters["flip"].shape
    probes = counter_hash(PROBE_STREAM, number, group, np.arange(PROBES_PER_GROUP, dtype=np.uint64))
    probes = np.sort(probes % (count * num_views)).astype(np.int64)
    arrays: Arrays = {
        "key_hash": kept.key_hash,
        "image_crc": kept.image_crc,
        "label": kept.labels,
        **{f"view/{name}": array for name, array in parameters.items()},
        "probe/row": (probes // num_views).astype(np.int32),
        "probe/view": (probes % num_views).astype(np.int32),
        "probe/pixels": render_some(
            kept, choose(parameters, probes // num_views, probes % num_views), identity.views, size
        ),
    }
    for name, pieces in encoded.items():
        together = np.concatenate(pieces)
        arrays[name] = together.reshape(count, num_views, *together.shape[1:])
    for name, parts in decided.items():
        whole = torch.cat(parts)
        arrays[name] = whole.view(count, num_views, *whole.shape[1:]).numpy()
    return arrays, kept.left_out


def _without_bad_rows(block: ImageBlock, decoder: Decoder, parameters: Parameters) -> tuple[ImageBlock, Parameters]:
    """Block and parameters without the rows that could not be decoded; partners are numbered anew."""
    if len(decoder.bad) == len(block):
        raise DataError(f"{block.path}: none of its {len(block)} images can be decoded. Fetch or pack the file again.")
    if not decoder.bad:
        return block, parameters
    good = ~np.isin(np.arange(len(block)), list(decoder.bad))
    kept = {name: array[good] for name, array in parameters.items()}
    if "partner" in kept:
        partner = kept["partner"]
        kept["partner"] = np.where(partner < 0, partner, (np.cumsum(good) - 1)[partner]).astype(partner.dtype)
    return block.without(decoder.bad), kept


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
    store = store_of(capture, targets, identity_of_targets(capture.created, capture.additions, targets, 1), contents)
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
    store = store_of(capture, "", capture.created, read_ledger(capture.place, [name for _, name in of_block.values()]))
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
