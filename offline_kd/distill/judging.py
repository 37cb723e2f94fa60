"""What is measured of a student after a pass, and on which images."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offline_kd.data.blocks import BlockLoader
from offline_kd.distill.results import Run
from offline_kd.distill.student import Student
from offline_kd.models.evaluation import evaluate
from offline_kd.models.evaluation_file import put_predictions
from offline_kd.models.networks import normalise
from offline_kd.support.ranks import copy_from_first
from offline_kd.training_recipe import Training


@dataclass(frozen=True)
class Judged:
    """The images that a student is evaluated on."""

    evaluation: BlockLoader
    validation: BlockLoader | None = None  # of the training split; then `evaluation` waits for the end

    def after(self, first: int, end: int, training: Training) -> dict[str, BlockLoader]:
        """What is evaluated after epochs first to end - 1, by what the names of its figures begin with."""
        if end < training.epochs and first // training.evaluate_every == end // training.evaluate_every:
            return {}
        whole = {"": self.evaluation} if self.validation is None or end >= training.epochs else {}
        return whole if self.validation is None else {"val_": self.validation} | whole


def evaluate_student(run: Run, student: Student, due: Mapping[str, BlockLoader], is_last: bool) -> dict[str, float]:
    """top1 (percent), nll and ece on the evaluation split, also of the average of the weights: `top1_ema`, ...; where
    labels are sets, map (percent) and bce.

    With validation rows, `val_top1` and so on of those, and of the evaluation split after the last pass alone. Then
    what the student answered there is written, before the checkpoint that says that all is done.
    Ranks share the images, and evaluate what the first one saves: each has had running statistics of its own.
    """
    found: dict[str, float] = {}
    for end, network in student.networks.items():
        copy_from_first(network.buffers())

        @torch.inference_mode()
        def predict(images: Tensor, network: nn.Module = network) -> Tensor:
            network.eval()
            return network(normalise(images, run.recipe.data.normalisation))

        for prefix, images in due.items():
            title = "validation" if prefix else "evaluation"
            measured = evaluate(predict, images, 256, run.device, title, run.recipe.evaluation_crop)
            if is_last and not prefix and not end and "top1" in measured.figures:  # of sets, answers are not compared
                put_predictions(run.out, measured.answers, images.dataset.classes, images.split.count)
            found |= {f"{prefix}{name}{end}": value for name, value in measured.figures.items()}
    return found
