"""The open blocks of a capture, and how they are done: render -> ask -> encode -> refuse or commit, all at once.

Every step has a thread of its own, the teacher that of the caller, and between two of them there is a bounded queue. Of
a block and view group nothing is committed before all answers about it have come and were found to be finite.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from offline_kd.cache.asking import Answer, Batch, Inquiry, Portion, answer, ask_teacher, rendered
from offline_kd.cache.job import Capture, store_of
from offline_kd.cache.unique_keys import KnownKeys
from offline_kd.data.blocks import BadImage, BlockLoader, ImageBlock
from offline_kd.store.inventory import committed
from offline_kd.store.join import row_arrays, tables_on
from offline_kd.store.layout import Part, parts_of
from offline_kd.store.reader import Arrays
from offline_kd.store.schema import LedgerEntry, identity_of_targets, ledger_name, tables_ledger_name
from offline_kd.store.writer import commit
from offline_kd.support.console import say
from offline_kd.support.errors import DataError, LeaseLost, StoreMismatch
from offline_kd.support.overlap import ahead, behind
from offline_kd.views.kind import draw

BATCHES_AHEAD = 4  # rendered before the teacher is asked about them: pixels in memory, pinned for a GPU
ANSWERS_BEHIND = 4  # batches that were asked about and are not encoded yet; a GPU may be so far behind, too
PORTIONS_ENCODED = 1  # blocks and view groups that are encoded while another is committed


@dataclass(frozen=True)
class Work:
    """Blocks of one addition that a process shall see committed, by itself or by others."""

    capture: Capture
    part: Part
    inquiry: Inquiry
    blocks: Sequence[int]  # in the order in which they are tried
    done: NDArray[np.bool_]  # [blocks of the store, view groups] what is committed: grows
    known_keys: KnownKeys  # of what this process read: grows

    def open_groups(self, block: int) -> list[int]:
        """The view groups of a block that nobody has committed, by what the store says now."""
        place, groups = self.capture.place, self.capture.groups
        for group, views in enumerate(groups):
            name = f"ledger/{ledger_name(block, views, self.part.name)}"
            if not self.done[block, group] and place.size(name) is not None:
                self.done[block, group] = True
        return [group for group in range(len(groups)) if not self.done[block, group]]

    def known_done(self, block: int) -> bool:
        """Whether all of a block was committed when it was last looked at."""
        return bool(self.done[block].all())

    @property
    def open_views(self) -> int:
        """How many views of how many images are not committed, as far as is known."""
        counts = np.array([tar.count for tar in self.capture.loader.split.tars], dtype=np.int64)
        blocks = np.array(self.blocks, dtype=np.int64)
        views = np.array([len(group) for group in self.capture.groups], dtype=np.int64)
        return int((counts[blocks, None] * views * ~self.done[blocks]).sum())


def open_work(capture: Capture, addition: str, blocks: Sequence[int]) -> Work:
    """What of these blocks is committed already; tables must be.

    Args:
        addition: its name; "" for what the store was created with.
    """
    part = parts_of(capture.created, capture.additions)[addition]
    identity = capture.identity_of(addition)
    inquiry = Inquiry(capture.asked, identity, _tables(capture, part), capture.device)
    done = committed(capture.place, capture.created, {addition: capture.num_views})[addition]
    count = int(done[list(blocks)].sum())
    if count:
        say(f"{capture.place}: resuming: {count} of {len(blocks) * len(capture.groups)} blocks are committed")
    return Work(capture, part, inquiry, blocks, done, KnownKeys())


def _tables(capture: Capture, part: Part) -> dict[str, dict[str, Tensor]]:
    """Tables by decisions and array, on the device, as they are committed."""
    identity = identity_of_targets(capture.created, capture.additions, part.targets, 1)
    names = [tables_ledger_name(name, part.name) for name in part.tables]
    store = store_of(capture, part.targets, identity, names)
    return {name: tables_on(store, name, capture.device) for name in part.tables}


# ---- blocks --------------------------------------------------------------------------------------------------------


def capture_blocks(
    work: Work,
    blocks: Iterator[tuple[int, ImageBlock]],
    still_mine: Callable[[int], bool],
    step: Callable[[int], None],
    done: Callable[[int], None],
) -> None:
    """Commit every view group of blocks that is open; what another writer took over meanwhile is left to it.

    While this thread asks the teacher, others render up to `BATCHES_AHEAD` batches, encode answers, and commit.

    Args:
        blocks: with their numbers, as they are read.
        still_mine: whether nobody else has begun the block of that number meanwhile.
        step: is told how many views of how many images the teacher was asked about, batch by batch.
        done: is told the number of a block of which nothing is open any more, or which was lost.
    """
    lost: set[int] = set()
    failed = threading.Event()
    finish = partial(_commit_all, work, lost, failed, (still_mine, done))
    own_threads, asked = torch.get_num_threads(), 0
    try:
        with (
            ahead(_rendered(work, blocks, lost, done), BATCHES_AHEAD) as batches,
            behind(finish, ANSWERS_BEHIND) as put,
        ):
            for portion, batch in batches:
                if failed.is_set():
                    break  # `behind` raises it
                put((portion, None if batch is None else answer(work.inquiry, portion, batch)))
                views = (
                    portion.parameters["flip"].size - asked if batch is None else len(batch.row)
                )  # bad images have none
                asked = 0 if batch is None else asked + views
                step(views)
    finally:
        torch.set_num_threads(own_threads)  # of this thread, and of those to come


def _leave_cores_to_the_teacher() -> None:
    """What torch does in this thread, it does in this thread alone.

    A second team of OpenMP threads would have both wait for each other at the end of every operation.
    """
    torch.set_num_threads(1)


def capture_block(
    work: Work, number: int, images: ImageBlock, still_mine: Callable[[], bool], step: Callable[[int], None]
) -> None:
    """The same with one block."""
    capture_blocks(work, iter([(number, images)]), lambda _: still_mine(), step, lambda _: None)


def _rendered(
    work: Work, blocks: Iterator[tuple[int, ImageBlock]], lost: Collection[int], done: Callable[[int], None]
) -> Iterator[tuple[Portion, Batch | None]]:
    """The views of every open view group in batches, and None behind the last batch of each."""
    _leave_cores_to_the_teacher()
    for number, images in blocks:
        if work.part.name == "":
            _refuse_used_keys(work, images, number)
        parameters = draw(work.inquiry.identity.views, images.key_hash, images.sizes())
        groups = work.open_groups(number)
        if not groups:
            done(number)
        for group in groups:
            if number in lost:
                break
            views = work.capture.groups[group]
            of_group = {name: array[:, views.start : views.stop] for name, array in parameters.items()}
            portion = Portion(images, of_group, number, group, is_last=group == groups[-1])
            for batch in rendered(work.inquiry, portion):
                yield portion, batch
            yield portion, None


def _encoded(
    work: Work, answers: Iterator[tuple[Portion, Answer | None]]
) -> Iterator[tuple[Portion, Arrays, list[BadImage]]]:
    """Every array of every portion, as soon as the last answer about it has come."""
    _leave_cores_to_the_teacher()
    of_images: tuple[int, Arrays] = -1, {}
    for portion, first in answers:
        asked = portion.decoder, _up_to_none(first, answers)
        kept = of_images[1] if of_images[0] == portion.number else _kept_of_images(work, portion.number)
        arrays, left_out = ask_teacher(
            work.inquiry, portion.block, portion.parameters, portion.number, portion.group, asked, kept or None
        )
        of_images = portion.number, {name: arrays[name] for name in _image_arrays(work)}
        yield portion, arrays, left_out


def _image_arrays(work: Work) -> list[str]:
    """What the codec keeps of images, once for all their view groups, and which images these are.

    An addition has no keys of its own: it is compared with the rows of the store before it is committed.
    """
    names = [spec.name for spec in work.part.specs if spec.name.startswith("logits/") and spec.extent == "block"]
    return ["key_hash", *names] if names and not work.part.name else names


def _kept_of_images(work: Work, number: int) -> Arrays:
    """What the view groups of a block that are committed were coded with: the others must be, too; {} if none is."""
    names, groups = _image_arrays(work), np.flatnonzero(work.done[number])
    if not names or not len(groups):
        return {}
    ledger = ledger_name(number, work.capture.groups[int(groups[0])], work.part.name)
    identity = work.capture.identity_of(work.part.name)
    store = store_of(work.capture, work.part.targets, identity, [ledger])
    entry = store.entry(work.part.name, number, int(groups[0]))
    return {name: array[: entry.rows] for name, array in store.read(number, int(groups[0]), names).items()}


def _up_to_none(one: Answer | None, answers: Iterator[tuple[Portion, Answer | None]]) -> Iterator[Answer]:
    while one is not None:
        yield one
        _, one = next(answers)


def _commit_all(
    work: Work,
    lost: set[int],
    failed: threading.Event,
    tell: tuple[Callable[[int], bool], Callable[[int], None]],
    answers: Iterator[tuple[Portion, Answer | None]],
) -> None:
    """Encode and commit everything; what fails is known to the others at once, not at the end of a portion."""
    still_mine, done = tell
    with ahead(_encoded(work, answers), PORTIONS_ENCODED) as encoded:
        try:
            for portion, arrays, left_out in encoded:
                if portion.number in lost:
                    continue
                try:
                    _commit(work, portion, arrays, left_out, partial(still_mine, portion.number))
                except LeaseLost as error:
                    say(f"{error}")
                    lost.add(portion.number)
                else:
                    work.done[portion.number, portion.group] = True
                if portion.is_last or portion.number in lost:
                    done(portion.number)
        except BaseException:
            failed.set()
            raise


def _commit(
    work: Work, portion: Portion, arrays: Arrays, left_out: Sequence[BadImage], still_mine: Callable[[], bool]
) -> None:
    """Raises LeaseLost when another writer took the block over."""
    images, number, group = portion.block, portion.number, portion.group
    views = work.capture.groups[group]
    if work.part.name:
        _refuse_other_rows(work.capture, arrays, images, number, group)
    elif group == 0:
        for bad in left_out:
            say(f"{images.where}: sample '{bad.key}' is left out: {bad.problem}")
    entry = LedgerEntry(
        addition=work.part.name,
        block=number,
        first_view=views.start,
        end_view=views.stop,
        rows=len(arrays["key_hash"]),
        tar=images.name,
        tar_sha256=images.sha256,
        left_out={bad.key: bad.problem for bad in left_out},
        objects={},
    )
    commit(work.capture.place, work.part, group, entry, arrays, still_mine)


def _refuse_used_keys(work: Work, images: ImageBlock, number: int) -> None:
    """As early as this process can know; `finish` proves it for what several writers did."""
    used, owner = work.known_keys.add(number, images.key_hash)
    if len(used):
        raise DataError(
            f"{images.name}: key '{images.keys[used[0]]}' was used before, in "
            f"{work.capture.loader.split.tars[owner[0]].file}. Keys of a split must be unique: pack the dataset again."
        )


def _refuse_other_rows(capture: Capture, arrays: Arrays, images: ImageBlock, number: int, group: int) -> None:
    """An addition must be about exactly the rows and views that the store has: raises StoreMismatch otherwise."""
    name = ledger_name(number, capture.groups[group])
    if capture.place.size(f"ledger/{name}") is None:
        raise StoreMismatch(
            f"{capture.place}: has no ledger/{name}, so nothing can be added to it. Capture these views of the first "
            "teacher before, or add fewer: --set views.count=..."
        )
    store = store_of(capture, "", capture.created, [name])
    names = [*row_arrays(capture.created, images), *(f"view/{name}" for name in capture.created.views.arrays())]
    for array in names:
        if not np.array_equal(store.read(number, group, [array])[array], arrays[array]):
            raise StoreMismatch(
                f"{capture.place}: block {number} ({images.name}), {array} is not what this capture has: the images or "
                "views differ from those that the store was created with. Capture another store."
            )


# ---- reading ahead -------------------------------------------------------------------------------------------------


def read_blocks(loader: BlockLoader, numbers: Iterator[int], workers: int) -> Iterator[tuple[int, ImageBlock]]:
    """Blocks with their numbers, in the given order, read ahead by so many worker processes if there are any."""
    if workers == 0:
        return loader.in_order(numbers)
    return iter(
        DataLoader(
            _Numbered(loader),
            batch_size=None,
            sampler=_Once(numbers),
            num_workers=min(workers, len(loader)),
            # Clients of object stores have threads of their own, which do not survive a fork: children would hang.
            multiprocessing_context="spawn" if loader.is_remote else None,
        )
    )


class _Numbered(Dataset[tuple[int, ImageBlock]]):
    """Blocks that bring their numbers along."""

    def __init__(self, loader: BlockLoader) -> None:
        self.loader = loader

    def __getitem__(self, number: int) -> tuple[int, ImageBlock]:
        return number, self.loader[number]


class _Once(Sampler[int]):
    """An iterator as a sampler."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return self.numbers
