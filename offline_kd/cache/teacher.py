"""The teacher of a recipe: found, checked against the manifest, measured before it is believed."""

from collections.abc import Sequence
from pathlib import Path

import torch

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.labels import need_labels
from offline_kd.data.manifest import EvaluationCrop, Manifest, Normalisation
from offline_kd.models.evaluation import evaluate
from offline_kd.models.networks import build, input_of
from offline_kd.models.teacher import Teacher
from offline_kd.models.weights import find_weights, load_weights
from offline_kd.recipe import CaptureRecipe
from offline_kd.support.errors import RecipeError, TeacherError

# On a CPU, activations should stay in its cache: ResNet-56 is a quarter slower with 256 images than with 64.
DEFAULT_BATCH_SIZE = {"cpu": 64, "cuda": 512}


def load_teacher(
    recipe: CaptureRecipe, manifest: Manifest, roots: Sequence[Path], num_classes: int, device: torch.device
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
    path, sha256 = find_weights(wanted.weights, manifest, roots)
    args = teacher_args(recipe, manifest)
    network = build(model, num_classes, args)
    load_weights(network, path)
    normalisation, crop = teacher_input(recipe, manifest, model)
    network.requires_grad_(False).eval().to(device)
    return Teacher(
        name=wanted.weights if known else model,
        model=model,
        model_args=args,
        weights_sha256=sha256,
        normalisation=normalisation,
        crop=crop,
        dtype=wanted.dtype,
        expected=wanted.expected or (known.expected if known else None),
        licence=wanted.licence or (known.licence if known else ""),
        network=network,
        batch_size=recipe.capture.batch_size or DEFAULT_BATCH_SIZE[device.type],
    )


def teacher_args(recipe: CaptureRecipe, manifest: Manifest) -> dict[str, int | float | str | bool]:
    """The arguments of the teacher's network."""
    known = manifest.teachers.get(recipe.teacher.weights or "")
    return recipe.teacher.model_args or (known.model_args if known else {})


def teacher_input(recipe: CaptureRecipe, manifest: Manifest, model: str) -> tuple[Normalisation, EvaluationCrop | None]:
    """How the teacher, a network of that name, sees images: as recipe, manifest, its library or the student say.

    Raises ModelError when the library that knows is not installed.
    """
    wanted, known = recipe.teacher, manifest.teachers.get(recipe.teacher.weights or "")
    normalisation, crop = wanted.normalisation, wanted.crop
    if known is not None:
        normalisation, crop = normalisation or known.normalisation, crop or known.crop
    needs_crop = not recipe.views.is_exact
    if normalisation is None or (needs_crop and crop is None):
        own = input_of(model, wanted.weights)
        normalisation = normalisation or (own.normalisation if own else recipe.data.normalisation)
        crop = crop or (own.crop if own else recipe.evaluation_crop)
    return normalisation, crop if needs_crop else None


def gate(
    teacher: Teacher, recipe: CaptureRecipe, manifest: Manifest, roots: Sequence[Path], device: torch.device
) -> tuple[str, float]:
    """Measure the teacher before it is believed: `DATASET/SPLIT` and top-1 in percent.

    Raises TeacherError when it is further from the expected accuracy than the tolerance.
    """
    expected = teacher.expected
    dataset, split = manifest.evaluation(
        *((expected.dataset, expected.split) if expected else (recipe.data.dataset, recipe.data.evaluation))
    )
    loader = BlockLoader(
        manifest.dataset(dataset),
        manifest.split(dataset, split),
        roots,
        keep_bytes=0,
        decode=teacher.crop is None,
        on_bad=recipe.data.bad_images,
    )
    need_labels(loader.split.labels, f"{dataset}/{split}", "the teacher's gate")
    measured = evaluate(teacher.logits, loader, teacher.batch_size, device, "teacher gate", teacher.crop).top1
    if expected and abs(measured - expected.top1) > expected.tolerance:
        raise TeacherError(
            f"teacher '{teacher.name}': top-1 on {dataset}/{split} is {measured:.2f} %, expected "
            f"{expected.top1:.2f} +- {expected.tolerance:g}. Check weights, normalisation and class order; "
            "nothing was written."
        )
    return f"{dataset}/{split}", measured
