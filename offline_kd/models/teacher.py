"""The frozen network that stage 1 asks: found, checked, gated."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offline_kd.data.expected import ExpectedAccuracy, Kind
from offline_kd.data.manifest import EvaluationCrop, Normalisation
from offline_kd.models.class_map import select
from offline_kd.models.networks import normalise, refuse_no_logits
from offline_kd.models.taps import TapPoint, put_taps, tapped
from offline_kd.support.errors import ModelError

Ask = Callable[[Tensor], tuple[Tensor, list[Tensor | None]]]  # a network's input -> logits, and a map of every tap
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_compiled: WeakKeyDictionary[nn.Module, dict[tuple[TapPoint, ...], Ask]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Teacher:
    """A network, and how it computes: that decides what it says, so that stores record it.

    `dtype` other than float32 is autocast: weights stay what was loaded and proven, and what needs more digits
    (normalisation layers, softmax) keeps them, which weights in that dtype would not.
    """

    name: str
    model: str
    model_args: dict[str, int | float | str | bool]
    weights_sha256: str
    normalisation: Normalisation
    crop: EvaluationCrop | None  # where images have different sizes: its `size` is that of views, too
    dtype: str  # "float32", "bfloat16" or "float16"
    expected: ExpectedAccuracy | None
    licence: str
    network: nn.Module
    batch_size: int
    compile: bool = False  # by torch.compile, when it is first asked
    tf32: bool = False  # on GPUs that have it: float32 products of 10 bits
    classes: list[list[int]] | None = None  # of the network's, that each class of the dataset is; None: it is its own
    weights_part: str = ""  # of their file, where it is another one than the weights themselves
    kind: Kind = "classifier"  # embedding: it has no classes, and gives no logits; multilabel: a sigmoid for each

    def logits(self, images: Tensor) -> Tensor:
        """`[B, C]` float32 raw logits of `[B, 3, H, W]` uint8 images; C classes of the dataset, 0 where there are
        none."""
        return self._ask(images, ())[0]

    def logits_and_maps(self, images: Tensor, points: Sequence[TapPoint]) -> tuple[Tensor, list[Tensor]]:
        """The same, and the maps `[B, D, H, W]` float32 of the taps. Raises ModelError for a tap that never ran."""
        logits, maps = self._ask(images, points)
        for point, features in zip(points, maps, strict=True):
            if features is None:
                raise ModelError(f"{point.named}: the network never runs this module.")
        return logits, [features for features in maps if features is not None]

    @torch.no_grad()  # not inference_mode: DTKD keeps what it needs of these logits for its backward pass
    def _ask(self, images: Tensor, points: Sequence[TapPoint]) -> tuple[Tensor, list[Tensor | None]]:
        ask = _compiled_for(self.network, tuple(points)) if self.compile else _as_it_is(self.network, points)
        with (
            _tf32(self.tf32),
            torch.autocast(images.device.type, AUTOCAST.get(self.dtype), enabled=self.dtype in AUTOCAST),
        ):
            logits, maps = ask(normalise(images, self.normalisation))
        if self.kind == "embedding":
            return torch.empty(len(images), 0, device=images.device), maps
        refuse_no_logits(logits, self.model)
        return logits.float() if self.classes is None else select(logits.float(), self.classes), maps


def _as_it_is(network: nn.Module, points: Sequence[TapPoint]) -> Ask:
    def ask(images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        with tapped(network, points) as maps:
            return network(images), maps

    return ask


def _compiled_for(network: nn.Module, points: tuple[TapPoint, ...]) -> Ask:
    """One compiled function of logits and maps, made once.

    Compiled code does not notice taps that come and go: those of a copy, which shares the weights, are there for good.
    """
    known = _compiled.setdefault(network, {})
    if points not in known:
        shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
        with_taps = copy.deepcopy(network, shared)
        maps, _ = put_taps(with_taps, points)

        def ask(images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            return with_taps(images), list(maps)

        known[points] = torch.compile(ask)
    return known[points]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round the factors of float32 products to 10 bits; afterwards it is as before."""
    cudnn: Any = torch.backends.cudnn  # a module of its own kind, whose attributes type checkers do not know
    settings = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
    before = [one.fp32_precision for one in settings]
    for one in settings:
        one.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for one, was in zip(settings, before, strict=True):
            one.fp32_precision = was
