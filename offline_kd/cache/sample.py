"""Which images speak for a dataset where not all are asked: some of every tar, by their keys.

Tars are often sorted by class, so the first of them say nothing of the others. Which images are taken follows from the
dataset alone: any writer takes the same ones, whenever it begins.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.blocks import BlockLoader, Decoder, ImageBlock
from offline_kd.models.teacher import Teacher
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import DataError
from offline_kd.views.choice import choose
from offline_kd.views.kind import ViewSpec, draw
from offline_kd.views.render import render_choice, render_some

SAMPLE_STREAM = 0x73616D706C65  # first counter of the draws made here


def spread(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` things over places of these sizes, in proportion and in whole numbers, none with more than its size."""
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    shares: list[int] = np.diff(min(total, int(ends[-1])) * ends // max(int(ends[-1]), 1)).tolist()
    return shares


def sampled_logits(
    teacher: Teacher,
    views: ViewSpec,
    loader: BlockLoader,
    num_rows: int,
    num_views: int,
    device: torch.device,
    most_tars: int | None = None,
) -> NDArray[np.float32]:
    """`[rows, views, C]` logits of the first views of images of all tars, in proportion to how many each has.

    Args:
        num_rows: how many images; what cannot be decoded is left out.
        num_views: of each image.
        most_tars: read no more than so many, evenly spaced, where not all are worth the time.

    Raises DataError when none of the images can be decoded.
    """
    found = sampled(teacher, teacher.logits, views.with_count(num_views), loader, num_rows, device, most_tars)
    return torch.cat(list(found)).numpy()


def sampled(
    teacher: Teacher,
    ask: Callable[[Tensor], Tensor],
    views: ViewSpec,
    loader: BlockLoader,
    num_rows: int,
    device: torch.device,
    most_tars: int | None = None,
) -> Iterator[Tensor]:
    """What a teacher says of all `views` of such images, tar by tar: `[rows, views, ...]` on the CPU.

    Args:
        ask: gives what is wanted `[B, ...]` of `[B, 3, H, W]` uint8 pixels.

    Raises DataError when none of the images can be decoded.
    """
    tars = loader.split.tars
    count = min(most_tars or len(tars), len(tars))
    chosen = [index * len(tars) // count for index in range(count)]
    found_any = False
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        shares = dict(zip(chosen, spread(num_rows, [tars[one].count for one in chosen]), strict=True))
        for number, block in loader.in_order(number for number, wanted in shares.items() if wanted):
            rows = np.sort(counter_hash(SAMPLE_STREAM, block.key_hash).argsort(kind="stable")[: shares[number]])
            for answers in _ask(teacher, ask, views, block, rows, device, threads):
                found_any = True
                yield answers
    if not found_any:
        raise DataError(f"{loader.files[0]} and others: none of {num_rows} images can be decoded. Pack them anew.")


def _ask(
    teacher: Teacher,
    ask: Callable[[Tensor], Tensor],
    views: ViewSpec,
    block: ImageBlock,
    rows: NDArray[np.int64],
    device: torch.device,
    threads: ThreadPoolExecutor,
) -> list[Tensor]:
    """`[m, v, ...]` of all views of some rows of a tar, without rows that cannot be rendered; [] if none can."""
    parameters = draw(views, block.key_hash, block.sizes())
    num_views = parameters["flip"].shape[1]
    size, decoder = teacher.crop.size if teacher.crop else 0, Decoder(block)
    row, view = np.repeat(rows, num_views), np.tile(np.arange(num_views), len(rows))
    answers, good = [], []
    for start in range(0, len(row), teacher.batch_size):
        part = slice(start, start + teacher.batch_size)
        choice = choose(parameters, row[part], view[part])
        if views.is_exact:
            pixels, rendered = torch.from_numpy(render_some(block, choice, views, size)), np.ones(len(choice.row), bool)
        else:
            pixels, rendered = render_choice(decoder, choice, views, size, threads)
            decoder.forget()
        answers.append(ask(pixels.to(device)).cpu())
        good.append(rendered)
    whole = torch.from_numpy(np.concatenate(good).reshape(len(rows), num_views).all(axis=1))
    if not whole.any():
        return []
    said = torch.cat(answers)
    return [said.view(len(rows), num_views, *said.shape[1:])[whole]]
