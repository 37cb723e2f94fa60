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
from offline_kd.data.label_sets import label_tensor, packed_bytes, unpack_sets
from offline_kd.data.manifest import EvaluationCrop
from offline_kd.models.average_precision import mean_average_precision
from offline_kd.support.console import progress
from offline_kd.support.errors import DataError, ModelError
from offline_kd.support.ranks import of_all, rank, total, world
from offline_kd.views.render import plain_images

ECE_BINS = 15


@dataclass(frozen=True)
class Answers:
    """What a network said of this rank's share of the images."""

    key_hash: NDArray[np.uint64]  # [n]
    labels: Tensor  # [n] int64; [n, bytes] uint8: packed sets
    logits: Tensor  # [n, C] float32, on the CPU


@dataclass(frozen=True)
class Evaluation:
    """`figures` are, by the names that they have in `metrics.jsonl`: `top1`, percent; `nll`, nats per sample; `ece`,
    expected calibration error over 15 bins of confidence, Guo et al. 2017, arXiv:1706.04599.

    Where labels are sets: `map`, percent; `bce`, nats per sample and class.
    """

    samples: int
    figures: dict[str, float]
    answers: Answers = field(repr=False, compare=False)

    @property
    def top1(self) -> float:
        """Percent, where an image has one label."""
        return self.figures["top1"]

    @property
    def nll(self) -> float:
        """Nats per sample, likewise."""
        return self.figures["nll"]

    @property
    def ece(self) -> float:
        """Expected calibration error, likewise."""
        return self.figures["ece"]


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

    Raises ModelError when there is not one finite logit for every class of the dataset, and DataError where labels are
    sets and no image is of any class.
    """
    classes = len(loader.dataset.classes)
    found = answers_of(predict, loader, batch_size, device, title, crop, classes)
    z, y = found.logits, found.labels
    if not z.isfinite().all():
        row, column = (~z.isfinite()).nonzero()[0].tolist()
        raise ModelError(f"{title}: logit {column} of image {row} is {z[row, column].item()}. Check the weights.")
    samples, figures = _of_sets(found, classes, title) if loader.labels.are_sets else _of_one_label(z, y)
    return Evaluation(samples, figures, found)


def _of_sets(answers: Answers, classes: int, title: str) -> tuple[int, dict[str, float]]:
    """Of all ranks together: precision depends on the order of all images."""
    parts = of_all((answers.logits, answers.labels))
    z, y = (torch.cat(one) for one in zip(*parts, strict=True))
    found = unpack_sets(y, classes)
    average = mean_average_precision(z.numpy(), found.numpy() > 0)
    if average is None:
        raise DataError(f"{title}: no image is of any class: there is no mean average precision. Name another split.")
    return len(z), {"map": 100 * average, "bce": F.binary_cross_entropy_with_logits(z.double(), found.double()).item()}


def _of_one_label(z: Tensor, y: Tensor) -> tuple[int, dict[str, float]]:
    """Of all ranks together: samples; accuracy, negative log-likelihood and calibration."""
    confidence, predicted = z.softmax(dim=1).max(dim=1)
    correct = (predicted == y).double()
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, correct - confidence.double())
    nll = F.cross_entropy(z, y, reduction="none").double().sum()
    sums = total(torch.stack([torch.tensor(len(y)).double(), correct.sum(), nll, *gaps]))
    samples = int(sums[0])
    return samples, {
        "top1": 100 * (sums[1].item() / samples),
        "nll": sums[2].item() / samples,
        "ece": sums[3:].abs().sum().item() / samples,
    }


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
    if loader.labels.are_sets:
        labels = [torch.empty(0, packed_bytes(len(loader.dataset.classes)), dtype=torch.uint8)]
    keys = [np.empty(0, dtype=np.uint64)]
    with progress(title, loader.split.count, "images") as meter, ThreadPoolExecutor(os.cpu_count()) as threads:
        own = own_batches([tar.count for tar in loader.split.tars], batch_size)
        for number, block in loader.in_order(own):
            for start in own[number]:
                images, rows = plain_images(block, crop, start, start + batch_size, threads)
                if not rows:
                    continue
                labels.append(label_tensor(block.labels[rows]))
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
