"""What every objective is: a weighted term of a recipe, which says what it needs and computes its bare value."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor, nn

from offline_kd.objectives.needs import Needs
from offline_kd.support.strict import Strict

Positive = Annotated[float, Field(gt=0)]
ShareOfEpochs = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(ge=0)]


class Signal(Protocol):
    """What a teacher says of a batch."""

    @property
    def logits(self) -> Tensor | None:
        """`[B, C]` float32, constant; None where no teacher is asked."""

    @property
    def decisions(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By name in the recipe, then by array: `id` and `prob`, or `subclass` and `table` (see `decisions.py`)."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """By name in the recipe: `[B, D]` or `[B, D, H, W]` float32, constant."""


@dataclass(frozen=True)
class DatasetRows:
    """The rows that a run trains on, which are numbered from 0: what a term may remember something of."""

    key_hash: NDArray[np.uint64]  # [n] rising, so that a row's number follows from its key
    labels: Tensor  # [n] int64, on the CPU; -1: hidden, or there is none
    seed: int  # of the run

    @property
    def fingerprint(self) -> str:
        """Of which row is which image, and of what label."""
        content = self.key_hash.astype("<u8").tobytes() + self.labels.numpy().astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()


class Head(nn.Module):
    """What a term trains beside the student, or remembers from step to step; the student is used without it."""

    def begin_step(self) -> None:
        """Before the first forward pass of a step."""

    def end_step(self) -> None:
        """After the optimizer has changed the weights; not where it left a step out."""

    def counts(self) -> dict[str, int]:
        """By name in `metrics.jsonl`: what was counted since the last call, which ends a pass."""
        return {}


@dataclass(frozen=True)
class LossBatch:
    """What a term may know of a batch beside what student and teacher say of it.

    `mixing` has the labels `[B]` of the images that are mixed in, and the share `[B]` of each image itself. Labels that
    are sets are mixed before: then there is no `mixing`.
    """

    labels: Tensor  # [B] int64; -1: hidden. Of sets [B, C] float32, 1 for a class of the set, else 0; -1: hidden
    mixing: tuple[Tensor, Tensor] | None = None
    label_smoothing: float = 0.0
    scores: Mapping[str, Tensor] = field(default_factory=dict)  # [B, K, H, W] of the KD layer behind each module
    # [B, D] float32 of the student by `student_module`, with gradient: maps are averaged over their places.
    features: Mapping[str | None, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None  # [B] int64: number of each sample in the training split; None: no term asked
    head: Head | None = None  # of the term that is asked


class Term(Strict):
    """One term of an objective, as a recipe writes it: `term`, the fields of its class, and how much it counts.

    The first line of the class's docstring is what `offline-kd distill --help` says of it.
    """

    paper: ClassVar[str] = ""
    example: ClassVar[Mapping[str, object]] = {}  # a usual setting of the fields, which `bench codecs` measures

    weight: float = Field(1.0, ge=0, description="what its value is multiplied by")
    warmup_epochs: int = Field(0, ge=0, description="weight grows as epoch / warmup_epochs, epochs counted from 1")
    schedule: dict[ShareOfEpochs, Factor] = Field(
        {},
        exclude_if=lambda schedule: not schedule,
        description="what the weight is multiplied by from a share of all epochs on, until the next one: "
        "`{0: 1, 0.4: 0, 0.8: 1}`",
        json_schema_extra={"propertyNames": {"title": "SHARE", "pattern": r"^(0|0?\.[0-9]+)$"}},
    )
    term: str

    @field_validator("schedule")
    @classmethod
    def _begins_with_the_first_epoch(cls, schedule: dict[float, float]) -> dict[float, float]:
        if schedule and 0 not in schedule:
            raise ValueError(
                f"what counts before {min(schedule):g} of the epochs? Add a factor from 0 on, as in {{0: 1}}"
            )
        return dict(sorted(schedule.items()))

    def weight_in(self, epoch: int, epochs: int) -> float:
        """What its value is multiplied by in an epoch, counted from 0, of so many.

        Warm-up counts epochs from 1, as the published code does. A factor of the schedule holds from the first epoch
        of which epoch / epochs is at least its share; weight, warm-up and schedule multiply.
        """
        warm = min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        factors = [factor for share, factor in self.schedule.items() if epoch / epochs >= share]
        return self.weight * warm * (factors[-1] if factors else 1.0)

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What a store must have kept of the teacher for this setting."""

    @abstractmethod
    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """The bare value, a scalar; weight and warm-up are the caller's.

        Args:
            student_logits: `[B, C]` float32, with gradient.
        """

    def count(self, batch: LossBatch) -> Tensor | int:
        """Of how many items the value is the mean: so much a rank's value counts among those of all ranks.

        A term that couples rows computes its value from `whole_batch`, the same on every rank, and counts 1.
        """
        return len(batch.labels)

    def head(self, student_width: int, teacher_width: int, rows: Callable[[], DatasetRows]) -> Head | None:
        """What it trains or remembers, for features of these widths; made once for a run, under the run's seed.

        Args:
            rows: reads labels of the whole training split: to be called only where they are needed.
        """
        return None

    def memory(self, batch_size: int, num_rows: int) -> int:
        """Bytes on the device for its head, and what a step of it takes; 0 where that is little."""
        return 0

    def fallbacks(self, student_logits: Tensor, signal: Signal) -> Tensor | int:
        """For how many samples of a batch the term is undefined, so that it takes another's value for them."""
        return 0


def logits_of(signal: Signal) -> Tensor:
    """`[B, C]`: the teacher's."""
    assert signal.logits is not None, "distill() refuses terms without a teacher"
    return signal.logits


def label_beside_teacher(signal: Signal, batch: LossBatch) -> Tensor:
    """`[B]` int64 for a term that knows one label: the teacher's first choice where it is hidden.

    Of a mixture, the label of the larger share.
    """
    labels = batch.labels
    if batch.mixing:
        other, share = batch.mixing
        labels = torch.where(share >= 0.5, labels, other)
    return torch.where(labels >= 0, labels, logits_of(signal).argmax(dim=1))
