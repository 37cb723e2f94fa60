"""Training the teacher of a recipe, by the loop that trains students."""

from collections.abc import Sequence
from pathlib import Path

import torch

from offline_kd.cache.teacher import teacher_args, teacher_input, teacher_model
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest
from offline_kd.distill.chosen_rows import chosen_images
from offline_kd.distill.judging import Judged
from offline_kd.distill.loop import fit
from offline_kd.distill.results import Result, Run
from offline_kd.distill.run_directory import run_place
from offline_kd.distill.student import Beginning, Student, prepare_network
from offline_kd.distill.teacher_signal import no_signal
from offline_kd.distill.tracking import check_tracker
from offline_kd.distill.training import (
    evaluation_images,
    group_views,
    initial_weights,
    make_loader,
    refuse_labels_that_are_not,
    source_of,
    training_images,
)
from offline_kd.models.networks import build
from offline_kd.network_recipe import StudentNetwork, TeacherNetwork
from offline_kd.objectives.bce import BCE
from offline_kd.objectives.ce import CE
from offline_kd.recipe import AnyTerm, Recipe
from offline_kd.support.console import say
from offline_kd.support.errors import RecipeError
from offline_kd.support.ranks import from_first, joined
from offline_kd.views.random_resized_crop import RandomCrop

TEACHER_FILE = "teacher.safetensors"  # of its run directory: student.safetensors under the name of what it is


def train_teacher(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Root],
    out: str | Path,
    device: torch.device,
    log: str | None = None,
) -> Result:
    """Train a recipe's teacher with cross-entropy on all labels, binary of sets, into `out/teacher.safetensors`.

    It begins from `teacher.weights`, where there are any, with their head unless `teacher.head` is `new`. Views have
    the size that it will be asked at, that of its crop, where they are resampled.

    Args:
        log: a tracker that is told every epoch, as of `distill`.

    Raises ModelError for weights to begin from that do not fit.
    """
    check_tracker(log)
    model, training = teacher_model(recipe, manifest), recipe.teacher.training
    if model is None or training is None:
        raise RecipeError(f"recipe '{recipe.name}': to train a teacher, give teacher.model and teacher.training.")
    with joined(device):
        images, seed, place = training_images(recipe, manifest, roots), recipe.seeds[0], run_place(out)
        terms: list[AnyTerm] = [BCE(term="bce") if recipe.teacher.kind == "multilabel" else CE(term="ce")]
        refuse_labels_that_are_not(recipe, images, terms)
        num_classes, args = len(images.dataset.classes), teacher_args(recipe, manifest)
        torch.manual_seed(seed)
        network = build(model, num_classes, args)
        state, initial = initial_weights(recipe.teacher.weights, manifest, roots, model, args)
        begin = Beginning(model, args, training.train, "teacher.head", recipe.teacher.head or "keep")
        prepare_network(network, num_classes, begin, state)
        if state is not None:
            say(f"the teacher begins from {state.where}" + ", and its head alone trains" * (training.train == "head"))
        plain = _as_of_a_student(recipe, manifest, model)
        rows, groups = chosen_images(plain, images), group_views(plain, images, None)
        loader = make_loader(plain, source_of(plain, rows.trained, groups=groups), seed, device)
        trained = StudentNetwork(model=model, model_args=args)
        run = Run(
            plain,
            "teacher",
            terms,
            seed,
            place,
            device,
            initial_sha256=initial,
            trained=trained,
            log=log,
            rows_sha256=rows.sha256,
        )
        student = Student(network.to(device), {}, model, num_classes)
        judged = Judged(evaluation_images(plain, manifest, roots), rows.validation)
        result = fit(run, student, loader, judged, no_signal)
        from_first(lambda: place.copy("student.safetensors", TEACHER_FILE))
        return result


def _as_of_a_student(recipe: Recipe, manifest: Manifest, model: str) -> Recipe:
    """The recipe with the teacher's training, images and views in the places of the student's."""
    normalisation, crop = teacher_input(recipe, manifest, model)
    views = recipe.views
    if crop is not None and isinstance(views, RandomCrop):
        views = views.model_copy(update={"size": crop.size})
    own = {"labelled_fraction": 1.0, "subset": None, "normalisation": normalisation}  # subsets are of students
    data = recipe.data.model_copy(update=own | ({"crop": crop} if crop else {}))
    about = {"training": recipe.teacher.training, "data": data, "views": views}
    return recipe.without_sweep().model_copy(update=about)


def trained_teacher(recipe: Recipe, manifest: Manifest, weights: str) -> TeacherNetwork:
    """The teacher of a recipe when it was trained: it has these weights, and sees images as it was trained to."""
    wanted, model = recipe.teacher, teacher_model(recipe, manifest)
    assert model is not None, "it was trained"
    tuned = wanted.model_copy(update={"head": wanted.head or "keep"} if wanted.weights else {})
    own = {"model": model, "model_args": teacher_args(recipe, manifest)} if wanted.model is None else {}
    trained = wanted.model_copy(update={"weights": weights, "head": None, **own})
    saw, sees = (teacher_input(recipe.model_copy(update={"teacher": one}), manifest, model) for one in (tuned, trained))
    # A library knows how its own weights see, not these.
    return trained if saw == sees else trained.model_copy(update={"normalisation": saw[0], "crop": saw[1]})
