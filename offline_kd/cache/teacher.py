"""The teacher of a recipe: found, checked against the manifest, measured before it is believed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.expected import MEASURE_NAMES, MEASURES, ExpectedAccuracy
from offline_kd.data.fetching import Root
from offline_kd.data.labels import need_labels, refuse_other_labels
from offline_kd.data.manifest import EvaluationCrop, Manifest, Normalisation
from offline_kd.data.manifest import Teacher as ManifestTeacher
from offline_kd.models.checkpoints import StateDict, as_file, read_state_dict
from offline_kd.models.class_map import indices_of, names_of_classes, refuse_beyond
from offline_kd.models.evaluation import Evaluation, evaluate
from offline_kd.models.neighbours import NEIGHBOURS, embed, knn_top1
from offline_kd.models.networks import build, build_without_head, head_of, input_of
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.models.weights import find_weights, known_classes, load_state
from offline_kd.recipe import CaptureRecipe
from offline_kd.store.identity import MeasuredNeighbours
from offline_kd.support.console import say
from offline_kd.support.errors import ModelError, RecipeError, TeacherError
from offline_kd.views.render import plain_images

# On a CPU, activations should stay in its cache: ResNet-56 is a quarter slower with 256 images than with 64.
DEFAULT_BATCH_SIZE = {"cpu": 64, "cuda": 512}
FIRST_TRIED, MOST_TRIED, TRIES = 64, 8192, 3  # batch sizes on a GPU, and how often each is timed
WORTH_IT = 1.05  # so many times as fast must a batch of twice the size be


def load_teacher(
    recipe: CaptureRecipe, manifest: Manifest, roots: Sequence[Root], num_classes: int, device: torch.device
) -> Teacher:
    """The teacher of a recipe, in evaluation mode; what the recipe leaves open comes from the manifest.

    Raises ModelError when weights are not those of the manifest or do not fit, RecipeError when the teacher is still to
    be trained, or its map of classes is not one of this dataset and this network.
    """
    wanted = recipe.teacher
    if wanted.weights is None:
        raise RecipeError(
            f"recipe '{recipe.name}': teacher.weights is missing. Name a teacher of the manifest or a "
            "file, or train one: `offline-kd train RECIPE --teacher` (`offline-kd run` does it by itself)."
        )
    _refuse_unready(recipe, num_classes)
    file = as_file(wanted.weights)
    known, model = manifest.teachers.get(file.file), teacher_model(recipe, manifest)
    if model is None:
        raise RecipeError(
            f"recipe '{recipe.name}': teacher.model is missing, and weights '{file.file}' "
            "are not in the manifest, which could tell it."
        )
    args = teacher_args(recipe, manifest)
    path, sha256 = find_weights(file, manifest, roots, model, args)
    state = read_state_dict(path, file.key, file.prefix)
    classes = teacher_classes(recipe, manifest)
    if wanted.kind == "embedding":
        network = _without_head(model, args, state)
    else:
        own_classes = num_classes if classes is None else _classes_of_weights(state, model, num_classes, args)
        if classes is not None:
            refuse_beyond(classes, manifest.dataset(recipe.data.dataset).classes, own_classes)
        network = build(model, own_classes, args)
        load_state(network, state)
    normalisation, crop = teacher_input(recipe, manifest, model)
    network.requires_grad_(False).eval().to(device)
    return Teacher(
        name=file.file if known else model,
        model=model,
        model_args=args,
        weights_sha256=sha256,
        normalisation=normalisation,
        crop=crop,
        dtype=wanted.dtype,
        expected=expected_accuracy(recipe, manifest),
        licence=wanted.licence or (known.licence if known else ""),
        network=network,
        batch_size=first_batch_size(recipe, device),
        compile=wanted.compile,
        tf32=wanted.tf32,
        classes=classes,
        weights_part=state.part,
        kind=wanted.kind,
    )


def _refuse_unready(recipe: CaptureRecipe, num_classes: int) -> None:
    wanted = recipe.teacher
    if wanted.kind != "embedding" and not num_classes:
        raise RecipeError(
            f"recipe '{recipe.name}': dataset '{recipe.data.dataset}' has no classes, of which a classifier gives "
            "logits. Name them in the manifest, or ask a teacher without classes: teacher.kind: embedding."
        )
    if wanted.is_to_be_trained:
        raise RecipeError(
            f"recipe '{recipe.name}': teacher.head says that teacher.training begins from teacher.weights. Train it: "
            "`offline-kd train RECIPE --teacher` (`offline-kd run` does it by itself)."
        )


def _without_head(model: str, args: dict[str, int | float | str | bool], state: StateDict) -> nn.Module:
    """A network without its classifier, with these weights; that a head of theirs is left out is said.

    Raises ModelError for weights that do not fit, and where the classifier is not one module.
    """
    network, head = build_without_head(model, args)
    load_state(network, state, left=head)
    if left := [name for name in head if any(one.endswith(name) for one in state.tensors)]:
        say(f"{state.where}: its head is left out ({', '.join(left)}): this network gives vectors, no logits")
    return network


def _known(recipe: CaptureRecipe, manifest: Manifest) -> ManifestTeacher | None:
    """What the manifest says of the recipe's teacher."""
    weights = recipe.teacher.weights
    return None if weights is None else manifest.teachers.get(as_file(weights).file)


def teacher_model(recipe: CaptureRecipe, manifest: Manifest) -> str | None:
    """The name of the teacher's network; None where neither recipe nor manifest tells it."""
    known = _known(recipe, manifest)
    return recipe.teacher.model or (known.model if known else None)


def teacher_args(recipe: CaptureRecipe, manifest: Manifest) -> dict[str, int | float | str | bool]:
    """The arguments of the teacher's network."""
    known = _known(recipe, manifest)
    return recipe.teacher.model_args or (known.model_args if known else {})


def teacher_classes(recipe: CaptureRecipe, manifest: Manifest) -> list[list[int]] | None:
    """For every class of the dataset the indices of the teacher's classes that it is; None: the teacher has the same.

    Raises RecipeError for a map that is not one of this dataset.
    """
    wanted = recipe.teacher
    if wanted.classes is None:
        return None
    names = (
        [] if wanted.weights is None else names_of_classes(teacher_model(recipe, manifest), wanted.weights, manifest)
    )
    return indices_of(wanted.classes, manifest.dataset(recipe.data.dataset).classes, names)


def _classes_of_weights(
    state: StateDict, model: str, num_classes: int, args: dict[str, int | float | str | bool]
) -> int:
    """How many classes the teacher has, by its weights; raises ModelError where they do not tell."""
    count = known_classes(build(model, num_classes, args), state, head_of(model, num_classes, args))
    if count is None:
        raise ModelError(
            f"{state.where}: how many classes this teacher has cannot be told from the head of '{model}'. Weights of "
            "another architecture?"
        )
    return count


def expected_accuracy(recipe: CaptureRecipe, manifest: Manifest) -> ExpectedAccuracy | None:
    """What the gate expects; of a teacher of which some classes are asked, only the recipe can know it."""
    known, wanted = _known(recipe, manifest), recipe.teacher
    if wanted.expected or known is None or known.expected is None or wanted.classes is not None:
        return wanted.expected
    if wanted.kind == "embedding" and known.expected.measure != "knn":
        return None  # it is about the whole network, and its tower alone is asked
    return known.expected


def teacher_input(recipe: CaptureRecipe, manifest: Manifest, model: str) -> tuple[Normalisation, EvaluationCrop | None]:
    """How the teacher, a network of that name, sees images: as recipe, manifest, its library or the student say.

    One that the recipe trains is normalised as the weights that it begins from were, and cropped as students are.

    Raises ModelError when the library that knows is not installed.
    """
    wanted, known = recipe.teacher, _known(recipe, manifest)
    normalisation, crop = wanted.normalisation, wanted.crop
    needs_crop = not recipe.views.is_exact
    if known is not None:
        normalisation = normalisation or known.normalisation
    if wanted.is_to_be_trained:
        crop = crop or recipe.evaluation_crop
    elif known is not None:
        crop = crop or known.crop
    if normalisation is None or (needs_crop and crop is None):
        weights = None if wanted.weights is None else as_file(wanted.weights).file
        own = None if wanted.training is not None and weights is None else input_of(model, weights)
        normalisation = normalisation or (own.normalisation if own else recipe.data.normalisation)
        crop = crop or (own.crop if own else recipe.evaluation_crop)
    return normalisation, crop if needs_crop else None


# ---- batch size ----------------------------------------------------------------------------------------------------


def first_batch_size(recipe: CaptureRecipe, device: torch.device) -> int:
    """What the recipe says, or what is right for most teachers on such a device."""
    size = recipe.capture.batch_size
    return DEFAULT_BATCH_SIZE[device.type] if size == "auto" else size


def with_fastest_batches(teacher: Teacher, recipe: CaptureRecipe, loader: BlockLoader, device: torch.device) -> Teacher:
    """The teacher with the batch size at which a GPU is fastest, where the recipe leaves it open."""
    if device.type != "cuda" or recipe.capture.batch_size != "auto":
        return teacher
    shape = plain_images(loader[0], teacher.crop, 0, 1)[0].shape[1:]
    points: list[TapPoint] = [*recipe.capture.decisions.values(), *recipe.capture.features.values()]

    def seconds(size: int) -> float:
        images = torch.zeros(size, *shape, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        teacher.logits_and_maps(images, points)
        torch.cuda.synchronize(device)
        return time.perf_counter() - started

    size = fastest_batch_size(seconds)
    torch.cuda.empty_cache()  # of the batches that were too large
    say(f"teacher '{teacher.name}': asked in batches of {size}, found by trial; to choose it: capture.batch_size")
    return replace(teacher, batch_size=size)


def fastest_batch_size(seconds: Callable[[int], float]) -> int:
    """Doubled from 64 on until that brings less than 5 % more images a second; half of what memory is too small for.

    Args:
        seconds: of asking about a batch of so many images; raises torch.OutOfMemoryError.

    Raises TeacherError when not even one image fits.
    """
    size, speed = FIRST_TRIED, 0.0
    while size <= MOST_TRIED:
        try:
            faster = size / min(seconds(size) for _ in range(TRIES))
        except torch.OutOfMemoryError:
            return _largest_that_fits(seconds, size // 2)
        if faster < WORTH_IT * speed:
            break
        size, speed = 2 * size, faster
    return size // 2


def _largest_that_fits(seconds: Callable[[int], float], size: int) -> int:
    while size:
        try:
            seconds(size)
        except torch.OutOfMemoryError:
            size //= 2
        else:
            return size
    raise TeacherError("teacher: the GPU's memory is too small for one image. Use --device cpu, or free its memory.")


# ---- the gate ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the gate found, as a store's identity says it."""

    evaluated_on: str  # `DATASET/SPLIT`
    top1: float | None = None  # percent; of classifiers
    map: float | None = None  # percent, of multi-label teachers
    neighbours: MeasuredNeighbours | None = None  # of teachers without classes, where there are labels

    @property
    def percent(self) -> float | None:
        """The one figure that there is; None: there were no labels."""
        of_neighbours = self.neighbours.top1 if self.neighbours else None
        return next((one for one in (self.top1, self.map, of_neighbours) if one is not None), None)

    @property
    def name(self) -> str:
        """Of that figure, for people."""
        if self.neighbours:
            return f"k-NN top-1 of '{self.neighbours.features}' ({self.neighbours.neighbours} neighbours)"
        return MEASURE_NAMES["top1" if self.map is None else "map"]


def gate(
    teacher: Teacher, recipe: CaptureRecipe, manifest: Manifest, roots: Sequence[Root], device: torch.device
) -> tuple[Measured, Evaluation | None]:
    """Measure the teacher before it is believed: what was found, and of a classifier what it answered.

    Raises TeacherError when it is further from what is expected than the tolerance.
    """
    expected = teacher.expected
    dataset, split = manifest.evaluation(
        *((expected.dataset, expected.split) if expected else (recipe.data.dataset, recipe.data.evaluation))
    )
    where = f"{dataset}/{split}"
    loader = BlockLoader(
        manifest.dataset(dataset),
        manifest.split(dataset, split),
        roots,
        keep_bytes=0,
        decode=teacher.crop is None,
        on_bad=recipe.data.bad_images,
    )
    refuse_other_labels(teacher.kind, loader.split.labels, where)
    if teacher.kind == "embedding":
        return _gate_of_embeddings(teacher, recipe, loader, where, device), None
    need_labels(loader.split.labels, where, "the teacher's gate")
    measured = evaluate(teacher.logits, loader, teacher.batch_size, device, "teacher gate", teacher.crop)
    found = Measured(where, top1=measured.figures.get("top1"), map=measured.figures.get("map"))
    _refuse_unexpected(teacher, found)
    return found, None if found.top1 is None else measured  # of sets, reports compare no answers


def _gate_of_embeddings(
    teacher: Teacher, recipe: CaptureRecipe, loader: BlockLoader, where: str, device: torch.device
) -> Measured:
    """By the first of the features that are kept: how many images have the label of their nearest neighbours."""
    if loader.split.labels == "none":
        if teacher.expected:
            need_labels("none", where, "teacher.expected.knn")
        return Measured(where)
    name, tap = next(iter(recipe.capture.features.items()))

    def vectors(images: Tensor) -> Tensor:
        _, (maps,) = teacher.logits_and_maps(images, [tap])
        return maps.mean(dim=(2, 3))

    answered = embed(vectors, loader, teacher.batch_size, device, "teacher gate", teacher.crop)
    top1 = knn_top1(answered.vectors.to(device), answered.labels.to(device))
    found = Measured(where, neighbours=MeasuredNeighbours(features=name, neighbours=NEIGHBOURS, top1=top1))
    _refuse_unexpected(teacher, found)
    return found


def _refuse_unexpected(teacher: Teacher, found: Measured) -> None:
    expected = teacher.expected
    if expected is None or found.percent is None:
        return
    if expected.measure != MEASURES[teacher.kind]:
        raise TeacherError(
            f"teacher '{teacher.name}': {expected.in_words} is expected of it, but its kind is {teacher.kind}, which "
            f"is measured by {MEASURE_NAMES[MEASURES[teacher.kind]]}. Give teacher.expected with "
            f"`{MEASURES[teacher.kind]}`."
        )
    if abs(found.percent - expected.percent) > expected.tolerance:
        raise TeacherError(
            f"teacher '{teacher.name}': {found.name} on {found.evaluated_on} is {found.percent:.2f} %, expected "
            f"{expected.percent:.2f} +- {expected.tolerance:g}. Check weights, normalisation and class order; nothing "
            "was written."
        )
