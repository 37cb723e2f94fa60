"""The frozen network that stage 1 asks: found, checked, gated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from offline_kd.data import BlockLoader
from offline_kd.errors import ModelError, RecipeError, TeacherError
from offline_kd.evaluate import evaluate
from offline_kd.manifest import EvaluationCrop, ExpectedAccuracy, Manifest, Normalisation
from offline_kd.models import build, find_weights, input_of, load_weights, normalise
from offline_kd.recipe import Recipe
from offline_kd.taps import TapPoint, tapped
from offline_kd.views import is_exact

# On a CPU, activations should stay in its cache: ResNet-56 is a quarter slower with 256 images than with 64.
DEFAULT_BATCH_SIZE = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True)
class Teacher:
    name: str
    model: str
    model_args: dict[str, int | float | str | bool]
    weights_sha256: str
    normalisation: Normalisation
    crop: EvaluationCrop | None  # where images have different sizes: its `size` is that of views, too
    dtype: str
    expected: ExpectedAccuracy | None
    licence: str
    network: nn.Module
    batch_size: int

    @torch.no_grad()  # not inference_mode: DTKD keeps what it needs of these logits for its backward pass
    def logits(self, images: Tensor) -> Tensor:
        """`[B, C]` float32 raw logits of `[B, 3, H, W]` uint8 images."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = self.network(normalise(images, self.normalisation))
        return logits.float()

    def logits_and_maps(self, images: Tensor, points: Sequence[TapPoint]) -> tuple[Tensor, list[Tensor]]:
        """The same, and the maps `[B, D, H, W]` float32 of the taps. Raises ModelError for a tap that never ran."""
        with tapped(self.network, points) as maps:
            logits = self.logits(images)
        for point, features in zip(points, maps, strict=True):
            if features is None:
                raise ModelError(f"tap '{point.module}': the network never runs this module.")
        return logits, [features for features in maps if features is not None]


def load_teacher(
    recipe: Recipe, manifest: Manifest, roots: Sequence[Path], num_classes: int, device: torch.device
) -> Teacher:
    """The teacher of a recipe, in evaluation mode; what the recipe leaves open comes from the manifest.

    Raises ModelError when weights are not those of the manifest or do not fit, TeacherError when the network's outputs
    are not one per class.
    """
    wanted = recipe.teacher
    if wanted.weights is None:
        raise RecipeError(
            f"recipe '{recipe.name}': teacher.weights is missing. Name a teacher of the manifest or a "
            "file, or train one: `offline-kd train RECIPE --teacher` (`offline-kd run` does it by itself)."
        )
    known = manifest.teachers.get(wanted.weights)
    model = wanted.model or (known.model if known else None)
    if model is None:
        raise RecipeError(
            f"recipe '{recipe.name}': teacher.model is missing, and weights '{wanted.weights}' "
            "are not in the manifest, which could tell it."
        )
    args = wanted.model_args or (known.model_args if known else {})
    path, sha256 = find_weights(wanted.weights, manifest, roots)
    network = build(model, num_classes, args)
    load_weights(network, path)
    own, student_crop = input_of(model, wanted.weights), recipe.evaluation_crop
    network.requires_grad_(False).eval().to(device)
    return Teacher(
        name=wanted.weights if known else model,
        model=model,
        model_args=args,
        weights_sha256=sha256,
        normalisation=wanted.normalisation
        or (known.normalisation if known else own.normalisation if own else recipe.data.normalisation),
        crop=None
        if is_exact(recipe.views)
        else wanted.crop or (known and known.crop) or (own.crop if own else student_crop),
        dtype=wanted.dtype,
        expected=wanted.expected or (known.expected if known else None),
        licence=wanted.licence or (known.licence if known else ""),
        network=network,
        batch_size=recipe.capture.batch_size or DEFAULT_BATCH_SIZE[device.type],
    )


def gate(
    teacher: Teacher, recipe: Recipe, manifest: Manifest, roots: Sequence[Path], device: torch.device
) -> tuple[str, float]:
    """Measure the teacher before it is believed: `DATASET/SPLIT` and top-1 in percent.

    Raises TeacherError when it is further from the expected accuracy than the tolerance.
    """
    expected = teacher.expected
    dataset, split = (expected.dataset, expected.split) if expected else (recipe.data.dataset, recipe.data.evaluation)
    loader = BlockLoader(
        manifest.dataset(dataset),
        manifest.split(dataset, split),
        roots,
        keep_bytes=0,
        decode=teacher.crop is None,
        on_bad=recipe.data.bad_images,
    )
    measured = evaluate(teacher.logits, loader, teacher.batch_size, device, "teacher gate", teacher.crop).top1
    if expected and abs(measured - expected.top1) > expected.tolerance:
        raise TeacherError(
            f"teacher '{teacher.name}': top-1 on {dataset}/{split} is {measured:.2f} %, expected "
            f"{expected.top1:.2f} +- {expected.tolerance:g}. Check weights, normalisation and class order; "
            "nothing was written."
        )
    return f"{dataset}/{split}", measured
