"""Contrastive representation distillation (CRD): Tian et al., ICLR 2020, arXiv:1910.10699.

Everything stays in the log domain: exp(1 / T) is 1.6e6 at the published temperature.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from offline_kd.objectives.features import FeatureTerm, unit
from offline_kd.objectives.needs import Needs
from offline_kd.objectives.negatives import Mode, Negatives
from offline_kd.objectives.term import DatasetRows, Head, LossBatch, Positive, Signal
from offline_kd.support.errors import TrainingError
from offline_kd.support.ranks import whole_batch
from offline_kd.support.strict import Count

EPS = 1e-7  # added to the noise's share, as in the published code


def crd(scores: Tensor, log_z: Tensor, *, num_rows: int) -> Tensor:
    """Tell the other network's vector of the same image from those of other images: one half of CRD.

        - mean over the batch of  log P_0 / (P_0 + h)  +  sum over k > 0 of  log c / (P_k + h)

    P = exp(scores) / Z, c = K / n, h = c + 1e-7, for K negatives of n rows. CRD is the half with the student's vectors
    as anchors and the teacher's memory, and the half with both exchanged: equation 17 of the paper, with the negatives
    summed. Always above 0.

    Args:
        scores: `[B, 1 + K]` of `crd_scores`; the first column is the positive.
        log_z: `[]`, constant; of `crd_normaliser`, from the first batch of a run.
        num_rows: n, of the training split.

    Returns:
        The loss in nats, a scalar.
    """
    share = (scores.shape[1] - 1) / num_rows
    odds = scores - log_z - math.log(share + EPS)  # log P / h
    zero = odds.new_zeros(())
    negatives = torch.logaddexp(odds[:, 1:], zero) + math.log1p(EPS / share)
    return (torch.logaddexp(-odds[:, 0], zero) + negatives.sum(dim=1)).mean()


def crd_scores(anchors: Tensor, memory: Tensor, contrast: Tensor, *, temperature: float) -> Tensor:
    """`[B, 1 + K]`: <anchor, row of the memory> / temperature.

    Args:
        anchors: `[B, d]` of length 1, with gradient.
        memory: `[n, d]` of the other network, constant.
        contrast: `[B, 1 + K]` int64, rows of the memory; the first column is the positive.
    """
    # The fewer numbers of the two: all scores, or the rows of those that are wanted. Both differ by rounding alone.
    score = _of_all if len(memory) <= contrast.shape[1] * memory.shape[1] else _of_wanted
    return score(anchors, memory, contrast) / temperature


def _of_all(anchors: Tensor, memory: Tensor, contrast: Tensor) -> Tensor:
    return (anchors @ memory.T).gather(1, contrast)


def _of_wanted(anchors: Tensor, memory: Tensor, contrast: Tensor) -> Tensor:
    return (memory[contrast] @ anchors[:, :, None]).squeeze(2)


def crd_normaliser(scores: Tensor, *, num_rows: int) -> Tensor:
    """`[]`: log Z = log( n mean exp(scores) ), over all entries, those of the positives too; constant."""
    return scores.detach().flatten().logsumexp(dim=0) + math.log(num_rows / scores.numel())


class ContrastiveMemory(Head):
    """What CRD trains and remembers: two projections, a vector of each network for every training row, and two Zs.

    `loss = memory(student, teacher, rows)`; after every step of the optimizer, which has its parameters too, call
    `end_step()`: only then the rows that were shown are remembered. In evaluation nothing is.

    Args:
        rows: of the training split.
        width: d, of the projections.
        negatives: K, rows of other classes that each image is contrasted with.
        temperature: scores are divided by it.
        momentum: weight of the old row when the memory of an image is renewed.
        mode: as of `Negatives`.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        rows: DatasetRows,
        *,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        mode: Mode = "exact",
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.fingerprint, self.seed, self.updates = rows.fingerprint, rows.seed, 0  # updates: the draws' counter
        self.num_rows = len(rows.labels)
        self.embed_s, self.embed_t = nn.Linear(student_width, width), nn.Linear(teacher_width, width)
        self.negatives = Negatives(rows.labels, negatives, mode)
        self.memory_s: Tensor
        self.memory_t: Tensor
        self.log_z: Tensor
        # Squared length 1 on average; rows are of length 1 once they have been visited.
        bound = math.sqrt(3 / width)
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, torch.empty(self.num_rows, width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), torch.nan))  # NaN: unset
        self._shown: list[tuple[Tensor, Tensor, Tensor]] = []
        self._log_z: Tensor | None = None

    def forward(self, student: Tensor, teacher: Tensor, rows: Tensor, contrast: Tensor | None = None) -> Tensor:
        """The loss in nats, a scalar.

        The student's gradient does not depend on `teacher`: the memory is what it is compared with.

        Args:
            student: `[B, student_width]` float32, with gradient.
            teacher: `[B, teacher_width]` float32, constant.
            rows: `[B]` int64, of the training split. Where one is there twice, the last of them is remembered.
            contrast: `[B, 1 + K]` int64 rows to compare with, those of the samples themselves first; drawn if absent.
        """
        e_s, e_t = unit(self.embed_s(student)), unit(self.embed_t(teacher))
        if contrast is None:
            contrast = self.negatives(rows, self.seed, self.updates)
        scores_s = crd_scores(e_s, self.memory_t, contrast, temperature=self.temperature)
        scores_t = crd_scores(e_t, self.memory_s, contrast, temperature=self.temperature)
        log_z = self._normalisers(scores_s, scores_t)
        if torch.is_grad_enabled():
            self._shown.append((rows, e_s.detach(), e_t.detach()))
            self._log_z = log_z
        return crd(scores_s, log_z[0], num_rows=self.num_rows) + crd(scores_t, log_z[1], num_rows=self.num_rows)

    def _normalisers(self, scores_s: Tensor, scores_t: Tensor) -> Tensor:
        """`[2]`: set by the first batch of a run, or by the first part of it."""
        if self._log_z is not None:
            return self._log_z
        now = torch.stack([crd_normaliser(one, num_rows=self.num_rows) for one in (scores_s, scores_t)])
        return torch.where(self.log_z.isfinite(), self.log_z, now)

    def begin_step(self) -> None:
        """Forget what was shown since the last step: the optimizer has left that one out."""
        self._shown.clear()
        self._log_z = None

    @torch.no_grad()
    def end_step(self) -> None:
        """Remember what was shown since the last step."""
        if self._log_z is None:
            return
        self.log_z.copy_(self._log_z)
        rows, e_s, e_t = (torch.cat(parts) for parts in zip(*self._shown, strict=True))
        # Of a row that is there several times, all write what the last one does: which write wins is not decided.
        numbers = torch.arange(len(rows), device=rows.device)
        last = torch.where(rows[:, None] == rows, numbers, -1).amax(dim=1)
        for memory, vectors in ((self.memory_s, e_s), (self.memory_t, e_t)):
            old = memory[rows]
            new = unit(self.momentum * old + (1 - self.momentum) * vectors)
            # A row without numbers would spread to all that are contrasted with it.
            memory.index_copy_(0, rows, torch.where(new.isfinite().all(dim=1, keepdim=True), new, old)[last])
        self.updates += 1
        self.begin_step()

    def get_extra_state(self) -> dict[str, int | str]:
        return {"rows": self.num_rows, "fingerprint": self.fingerprint, "updates": self.updates}

    def set_extra_state(self, state: dict[str, int | str]) -> None:
        """Raises TrainingError for the memory of other rows."""
        here = {"rows": self.num_rows, "fingerprint": self.fingerprint}
        if {name: state[name] for name in here} != here:
            raise TrainingError(
                f"term 'crd': its memory is of {state['rows']} training rows with fingerprint "
                f"{str(state['fingerprint'])[:12]}, here are {self.num_rows} with {self.fingerprint[:12]}: images or "
                "labels of the training split have changed. Restore them, or give another --out folder."
            )
        self.updates = int(state["updates"])


class CRD(FeatureTerm):
    """Tell the teacher's features of the same image from its features of other images, which a memory keeps."""

    paper: ClassVar[str] = "Tian et al., ICLR 2020, arXiv:1910.10699"
    example: ClassVar = {"features": "penultimate"}

    term: Literal["crd"]
    width: Count = Field(128, description="of the vectors that are compared, and remembered of every training row")
    negatives: Count = Field(16384, description="rows of other classes that each image is contrasted with")
    temperature: Positive = Field(0.07, description="scores of unit vectors are divided by it")
    momentum: float = Field(0.5, ge=0, lt=1, description="weight of the old vector when a row's memory is renewed")
    mode: Mode = Field("exact", description="an image agrees with its own row; relax: with any row of its class")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, label="one")  # negatives are rows of other classes

    def head(self, student_width: int, teacher_width: int, rows: Callable[[], DatasetRows]) -> Head | None:
        return ContrastiveMemory(
            student_width,
            teacher_width,
            rows(),
            width=self.width,
            negatives=self.negatives,
            temperature=self.temperature,
            momentum=self.momentum,
            mode=self.mode,
        )

    def memory(self, batch_size: int, num_rows: int) -> int:
        """Two vectors of every row, what is known of classes, the scores with their gradients, and the draws."""
        wanted = batch_size * (self.negatives + 1)
        scores = min(2 * batch_size * num_rows, wanted * self.width)
        return 2 * num_rows * self.width * 4 + 3 * num_rows * 8 + 2 * scores * 4 + wanted * (8 + 8 * 4)

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """As `ContrastiveMemory` says, over the batch of all ranks. Of a mixed image, the row is its own."""
        student, teacher = self.vectors(signal, batch)
        assert batch.head is not None, "the term was given no head"
        assert batch.rows is not None, "the term was not told which rows these are"
        value: Tensor = batch.head(student, teacher, whole_batch(batch.rows[:, None]).squeeze(1))
        return value
