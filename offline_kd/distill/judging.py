"""What is measured of a student after a pass, and on which images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offline_kd.data.blocks import BlockLoader
from offline_kd.distill.probe import neighbours_of, probe
from offline_kd.distill.results import Run
from offline_kd.distill.student import Student
from offline_kd.models.evaluation import evaluate
from offline_kd.models.evaluation_file import put_predictions
from offline_kd.models.neighbours import Embedded, embed
from offline_kd.models.networks import normalise
from offline_kd.support.ranks import copy_from_first
from offline_kd.training_recipe import Training


@dataclass(frozen=True)
class Judged:
    """The images that a student is evaluated on."""

    evaluation: BlockLoader
    validation: BlockLoader | None = None  # of the training split; then `evaluation` waits for the end
    learn_from: Callable[[], BlockLoader | None] = lambda: None  # what a linear probe learns from, asked at the end

    def after(self, first: int, end: int, training: Training) -> dict[str, BlockLoader]:
        """What is evaluated after epochs first to end - 1, by what the names of its figures begin with."""
        if end < training.epochs and first // training.evaluate_every == end // training.evaluate_every:
            return {}
        whole = {"": self.evaluation} if self.validation is None or end >= training.epochs else {}
        return whole if self.validation is None else {"val_": self.validation} | whole


def evaluate_student(run: Run, student: Student, judged: Judged, epoch: int, end: int) -> dict[str, float | str]:
    """What is due after epochs `epoch` to `end` - 1: top1 (percent), nll and ece on the evaluation split, also of the
    average of the weights: `top1_ema`, ...; where labels are sets, map (percent) and bce; of students without classes
    what `_of_vectors` says.

    With validation rows, `val_top1` and so on of those, and of the evaluation split after the last pass alone. Then
    what the student answered there is written, before the checkpoint that says that all is done.
    Ranks share the images, and evaluate what the first one saves: each has had running statistics of its own.
    """
    due, is_last = judged.after(epoch, end, run.recipe.training), end >= run.recipe.training.epochs
    found: dict[str, float | str] = {}
    for which, network in student.networks.items():
        copy_from_first(network.buffers())

        @torch.inference_mode()
        def predict(images: Tensor, network: nn.Module = network) -> Tensor:
            network.eval()
            return network(normalise(images, run.recipe.data.normalisation))

        for prefix, images in due.items():
            if run.gives_vectors:
                learn_from = judged.learn_from if is_last and not prefix else None
                figures = _of_vectors(run, predict, images, prefix, learn_from)
            else:
                measured = evaluate(predict, images, 256, run.device, _title(prefix), run.recipe.evaluation_crop)
                figures = {**measured.figures}
                if is_last and not prefix and not which and "top1" in figures:  # of sets, answers are not compared
                    put_predictions(run.out, measured.answers, images.dataset.classes, images.split.count)
            found |= {f"{prefix}{name}{which}": value for name, value in figures.items()}
    return found


def _title(prefix: str) -> str:
    return "validation" if prefix else "evaluation"


def _of_vectors(
    run: Run,
    network: Callable[[Tensor], Tensor],
    images: BlockLoader,
    prefix: str,
    learn_from: Callable[[], BlockLoader | None] | None,
) -> dict[str, float | str]:
    """knn_top1 (percent); after the last pass probe_top1 too, and what the linear probe learned from. Nothing of images
    without labels.

    Args:
        learn_from: gives the images of the training split that a probe learns from; None: none is to be trained.
    """
    if images.split.labels == "none":
        return {}

    def embedded(some: BlockLoader, title: str) -> Embedded:
        return embed(network, some, 256, run.device, title, run.recipe.evaluation_crop)

    found = embedded(images, _title(prefix))
    figures: dict[str, float | str] = {}
    if (top1 := neighbours_of(found, run.device)) is not None:
        figures["knn_top1"] = top1
    if learn_from is not None and (probed := probe(found, learn_from(), embedded)) is not None:
        figures |= {"probe_top1": probed[0], "probe_learned_from": probed[1]}
    return figures
