"""How good a classifier is on a dataset split."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import EvaluationCrop
from offline_kd.support.console import progress
from offline_kd.support.errors import ModelError
from offline_kd.support.ranks import rank, total, world
from offline_kd.views.render import plain_images

ECE_BINS = 15


@dataclass(frozen=True)
class Answers:
    """What a network said of this rank's share of the images."""

    key_hash: NDArray[np.uint64]  # [n]
    labels: Tensor  # [n] int64
    logits: Tensor  # [n, C] float32, on the CPU


@dataclass(frozen=True)
class Evaluation:
    samples: int
    top1: float  # percent
    nll: float  # nats per sample
    ece: float  # expected calibration error over 15 bins of confidence, Guo et al. 2017, arXiv:1706.04599
    answers: Answers = field(repr=False, compare=False)


@torch.inference_mode()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    loader: BlockLoader,
    batch_size: int,
    device: torch.device,
    title: str,
    crop: EvaluationCrop | None = None,
) -> Evaluation:
    """Run `predict` (`[B, 3, H, W]` uint8 -> `[B, C]` logits) over every image of a split, un-augmented.

    Several ranks share the batches, and all of them get the figures of the whole split.

    Args:
        crop: of images of different sizes; None: they are taken as they are.

    Raises ModelError when there is not one finite logit for every class of the dataset.
    """
    found = answers_of(predict, loader, batch_size, device, title, crop, len(loader.dataset.classes))
    z, y = found.logits, found.labels
    if not z.isfinite().all():
        row, column = (~z.isfinite()).nonzero()[0].tolist()
        raise ModelError(f"{title}: logit {column} of image {row} is {z[row, column].item()}. Check the weights.")
    confidence, predicted = z.softmax(dim=1).max(dim=1)
    correct = (predicted == y).double()
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, correct - confidence.double())
    nll = F.cross_entropy(z, y, reduction="none").double().sum()
    sums = total(torch.stack([torch.tensor(len(y)).double(), correct.sum(), nll, *gaps]))
    samples = int(sums[0])
    return Evaluation(
        samples=samples,
        top1=100 * (sums[1].item() / samples),
        nll=sums[2].item() / samples,
        ece=sums[3:].abs().sum().item() / samples,
        answers=found,
    )


def answers_of(
    predict: Callable[[Tensor], Tensor],
    loader: BlockLoader,
    batch_size: int,
    device: torch.device,
    title: str,
    crop: EvaluationCrop | None,
    classes: int | None = None,
) -> Answers:
    """What a network says of this rank's share of the images of a split, un-augmented; the arguments of `evaluate`.

    Args:
        classes: so many logits it must give of every image; None: vectors of any width stand in their place.
    """
    logits, labels = [torch.empty(0, classes or 0)], [torch.empty(0, dtype=torch.int64)]
    keys = [np.empty(0, dtype=np.uint64)]
    with progress(title, loader.split.count, "images") as meter, ThreadPoolExecutor(os.cpu_count()) as threads:
        own = own_batches([tar.count for tar in loader.split.tars], batch_size)
        for number, block in loader.in_order(own):
            for start in own[number]:
                images, rows = plain_images(block, crop, start, start + batch_size, threads)
                if not rows:
                    continue
                labels.append(torch.from_numpy(block.labels[rows]).long())
                keys.append(block.key_hash[rows])
                logits.append(predict(images.to(device)).float().cpu())
                meter.advance(len(images))
                if classes is not None and logits[-1].shape[1] != classes:
                    raise ModelError(
                        f"{title}: the network gives {logits[-1].shape[1]} logits, the dataset has {classes} classes."
                    )
    there = logits if classes is not None or len(logits) == 1 else logits[1:]
    return Answers(np.concatenate(keys), torch.cat(labels), torch.cat(there))


@dataclass(frozen=True)
class ClassAccuracy:
    """How good a classifier is on the images of one class. Of a class without images there are no figures."""

    name: str
    images: int
    top1: float | None  # percent
    top5: float | None  # percent
    predicted: int  # how many images of the split are said to be of it
    mistaken_for: str | None  # the class that its wrongly classified images are most often said to be of


def top_k(z: Tensor, y: Tensor, k: int = 5) -> Tensor:
    """`[N]` bool: whether the label is among the k largest logits; k is at most the number of classes."""
    return (z.topk(min(k, z.shape[1]), dim=1).indices == y[:, None]).any(dim=1)


def by_class(z: Tensor, y: Tensor, classes: Sequence[str]) -> list[ClassAccuracy]:
    """The accuracy on the images of every class, of logits `[N, C]` and labels `[N]`."""
    predicted, among5 = z.argmax(dim=1), top_k(z, y)
    said = torch.bincount(predicted, minlength=len(classes)).tolist()
    found = []
    for index, name in enumerate(classes):
        own = y == index
        images, wrong = int(own.sum()), torch.bincount(predicted[own & (predicted != index)], minlength=len(classes))
        found.append(
            ClassAccuracy(
                name=name,
                images=images,
                top1=100 * (predicted[own] == index).sum().item() / images if images else None,
                top5=100 * among5[own].sum().item() / images if images else None,
                predicted=said[index],
                mistaken_for=classes[int(wrong.argmax())] if wrong.any() else None,
            )
        )
    return found


def own_batches(counts: Sequence[int], batch_size: int) -> dict[int, list[int]]:
    """This rank's share of the batches: their first rows by block, of blocks of so many rows."""
    batches = [(number, start) for number, count in enumerate(counts) for start in range(0, count, batch_size)]
    own: dict[int, list[int]] = {}
    for number, start in batches[rank() :: world()]:
        own.setdefault(number, []).append(start)
    return own
