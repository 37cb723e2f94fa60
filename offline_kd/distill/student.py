"""The network that learns: built by name, with the KD layers and taps that an objective's terms put into it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.parallel import DistributedDataParallel

from offline_kd.data.blocks import BlockLoader
from offline_kd.distill.averaging import WeightAverage
from offline_kd.distill.checkpoint import Stateful
from offline_kd.models.checkpoints import StateDict
from offline_kd.models.kd_layer import WithKDLayer, find_map, insert_kd_layer
from offline_kd.models.networks import (
    build,
    build_without_head,
    classifier_of,
    head_of,
    normalise,
    refuse_no_vectors,
)
from offline_kd.models.sync_batchnorm import synchronise_batchnorm
from offline_kd.models.taps import TapPoint, put_vector_taps
from offline_kd.models.weights import begin_from, load_state
from offline_kd.network_recipe import Head
from offline_kd.objectives.ce import CE
from offline_kd.objectives.decisions import KDLayerTerm
from offline_kd.objectives.term import Head as TermHead
from offline_kd.recipe import AnyTerm, Recipe, feature_terms, kd_layer_terms
from offline_kd.support.console import say
from offline_kd.support.errors import ModelError, RecipeError, TrainingError
from offline_kd.support.ranks import world
from offline_kd.training_recipe import Training

LEFT = 0.05  # of what running statistics begin with, that need not be told of


@dataclass(frozen=True)
class Student:
    network: nn.Module
    kd_layers: Mapping[str, WithKDLayer]  # by the name of the module before
    model: str = ""  # what the network is called
    num_classes: int | None = None  # that it must give logits for; None: it gives vectors, or nobody said
    # The network as it is trained: compiled, or by ranks together, whose gradients are those of all of them.
    trained: nn.Module | None = None
    average: WeightAverage | None = None  # of the weights
    scaler: torch.amp.GradScaler | None = None  # of the loss, in float16
    # [B, D] float32 of the last pass that kept gradients, by the `student_module` of terms on features.
    features: Mapping[str | None, Tensor] = field(default_factory=dict)
    # By number of the term: what is trained, or remembered, beside the network. `with_heads` makes them.
    heads: Mapping[int, TermHead] = field(default_factory=dict)
    row_hashes: NDArray[np.uint64] | None = None  # [n] rising: key hash of every row that heads know by its number

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All that are evaluated and saved, by the end of their names."""
        return {"": self.network} | ({"_ema": self.average.network} if self.average else {})

    @property
    def beside(self) -> dict[str, Stateful]:
        """What a run goes on with, beside network and optimizer."""
        heads = nn.ModuleDict({str(number): head for number, head in self.heads.items()})
        states: dict[str, Stateful | None] = {
            "average": self.average,
            "scaler": self.scaler,
            "heads": heads if len(heads) else None,
        }
        return {name: one for name, one in states.items() if one is not None}


def new_student(
    recipe: Recipe,
    loader: BlockLoader,
    seed: int,
    device: torch.device,
    terms: Sequence[AnyTerm] = (),
    weights: StateDict | None = None,
) -> Student:
    """The student of a recipe, with the KD layers that `terms` put into it.

    Args:
        weights: to begin from, where it is not freshly initialised. KD layers are, and so is a head for another number
            of classes.

    Raises ModelError for weights that do not fit or a KD layer behind a module that gives no map, RecipeError for one
    behind the same module as another.
    """
    num_classes, about = len(loader.dataset.classes), recipe.student
    torch.manual_seed(seed)
    gives = None if has_no_classes(recipe, terms) else num_classes  # None: vectors
    if gives is None:
        network = _network_of_vectors(recipe, weights)
    else:
        network = build(about.model, num_classes, about.model_args)
        begin = Beginning(about.model, about.model_args, recipe.training.train, "student.head", about.head)
        prepare_network(network, num_classes, begin, weights)
    network = network.to(device)
    wanted, compared = kd_layer_terms(terms), feature_terms(terms)
    if not wanted and not compared:
        return Student(network, {}, about.model, gives)
    if (size := recipe.views.output_size) is None:
        images = loader[0].images[:1]
    else:
        images = torch.zeros((1, 3, size, size), dtype=torch.uint8)
    example = normalise(images.to(device), recipe.data.normalisation)
    if gives is None:
        refuse_no_vectors(_of_example(network, example), about.model, len(example))
    # Before KD layers change the names of modules: a tap reads what a module gives, not what such a layer adds to it.
    features = _tapped(network, {term.student_module for term in compared}, recipe, gives, example)
    layers = _with_kd_layers(network, recipe, wanted, num_classes, example)
    return Student(network, layers, about.model, gives, features=features)


def has_no_classes(recipe: Recipe, terms: Sequence[AnyTerm]) -> bool:
    """Whether a student gives vectors, and no logits: its teacher has no classes, and no term is about labels."""
    return recipe.teacher.kind == "embedding" and not any(isinstance(term, CE) for term in terms)


def _network_of_vectors(recipe: Recipe, weights: StateDict | None) -> nn.Module:
    """A student without its classifier, freshly initialised or from these weights."""
    about = recipe.student
    if about.head is not None or recipe.training.train == "head":
        field = "student.head" if about.head is not None else "training.train"
        raise RecipeError(f"{field}: a student of a teacher without classes has no head. Leave it out.")
    network, head = build_without_head(about.model, about.model_args)
    if weights is not None:
        load_state(network, weights, left=head)
    return network


@torch.no_grad()
def _of_example(network: nn.Module, example: Tensor) -> object:
    found = network.eval()(example)
    network.train()
    return found


def _tapped(
    network: nn.Module, modules: set[str | None], recipe: Recipe, num_classes: int | None, example: Tensor
) -> dict[str | None, Tensor]:
    """Vectors of these modules, those of `example` for a start.

    None: what comes into the classifier; of a network without classes, what it gives.
    """
    about = recipe.student
    points: dict[str | None, TapPoint] = {name: TapPoint(module=name) for name in modules if name is not None}
    if None in modules and num_classes is None:
        points[None] = TapPoint(module="")
    elif None in modules and num_classes is not None:
        points[None] = TapPoint(module=classifier_of(about.model, num_classes, about.model_args), at="input")
    vectors = put_vector_taps(network, points)
    if points:
        network.eval()(example)
        network.train()
    if missing := [point.module for key, point in points.items() if key not in vectors]:
        raise ModelError(f"student_module: '{about.model}' never runs '{missing[0]}'. Name a module that it does.")
    return vectors


def _with_kd_layers(
    network: nn.Module, recipe: Recipe, wanted: Sequence[KDLayerTerm], num_classes: int, example: Tensor
) -> dict[str, WithKDLayer]:
    places = {term.after: find_map(network, term.after, example) for term in wanted}
    if len(set(places.values())) < len(wanted):
        raise RecipeError(
            f"recipe '{recipe.name}': two KD layers behind one module: {[term.after for term in wanted]}."
        )
    layers: dict[str, WithKDLayer] = {}
    # A layer behind a module changes the names of the modules inside it: the innermost come first.
    for term in sorted(wanted, key=lambda term: places[term.after].count("."), reverse=True):
        num_templates = recipe.decisions_of(term).num_templates(num_classes)
        layers[term.after], _ = insert_kd_layer(
            network, places[term.after], num_templates, value_ratio=term.value_ratio, example=example
        )
    return layers


@dataclass(frozen=True)
class Beginning:
    """How a network begins its training: where recipes say so, and what."""

    model: str
    model_args: Mapping[str, int | float | str | bool]
    train: Literal["all", "head"]
    field: str  # of the recipe, that says `head`
    head: Head | None


def prepare_network(network: nn.Module, num_classes: int, begin: Beginning, state: StateDict | None) -> None:
    """Load the weights that a network begins from, and freeze what does not train.

    Raises ModelError for weights that do not fit, RecipeError where no weights are to stay as they are.
    """
    if state is None and begin.train == "head":
        raise RecipeError("training.train: head keeps the rest as weights to begin from have it, and none are given.")
    if state is None:
        return
    head = head_of(begin.model, num_classes, begin.model_args)
    if not head and (begin.head == "new" or begin.train == "head"):
        raise ModelError(f"'{begin.model}': nothing in it depends on num_classes, so that it has no head.")
    if new := begin_from(network, state, head, begin.head, begin.field):
        about = "" if begin.head == "new" else "is for another number of classes: "
        say(f"{state.where}: {about}{', '.join(new)} begin anew")
    if begin.train == "head":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in head)


def training_mode(network: nn.Module, training: Training) -> None:
    """As `network.train()`, but around a head that trains alone all computes as in evaluation: statistics stay."""
    network.train()
    for module in network.modules() if training.train == "head" else ():
        module.training = any(parameter.requires_grad for parameter in module.parameters())


def with_states(student: Student, training: Training, device: torch.device) -> Student:
    """The student with what its training keeps beside it: the average of its weights, the scale of its loss."""
    average = WeightAverage(student.network, training.ema) if training.ema else None
    scaler = torch.amp.GradScaler(device.type) if training.amp == "float16" else None
    return replace(student, average=average, scaler=scaler)


def compiled(student: Student, training: Training) -> Student:
    """The student whose steps are compiled, if the recipe says so.

    The network itself stays as it is, and is evaluated and saved as ever.
    """
    if not training.compile:
        return student
    network = torch.compile(student.network, mode=None if training.compile is True else training.compile)
    assert isinstance(network, nn.Module)
    return replace(student, trained=network)


def warn_of_slow_statistics(network: nn.Module, steps: int) -> None:
    """Say so where a new network's BatchNorm will not have forgotten in so many steps what it began with.

    Then it is evaluated with statistics that no layer ever saw, however well it has learned: top-1 like chance, beside
    a loss near 0.
    """
    kept = {one.momentum for one in network.modules() if isinstance(one, BatchNorm) and one.momentum is not None}
    slowest = min(kept, default=1.0)
    if (1 - slowest) ** steps > LEFT:
        say(
            f"warning: the running statistics of this network's BatchNorm begin with nothing and change by {slowest:g} "
            f"a step, and there are {steps} steps: it will look worse than it is. Train for more epochs, with smaller "
            "batches, take another network, or begin from weights"
        )


@contextmanager
def compiling(training: Training) -> Iterator[None]:
    """Raise TrainingError for a network, or a machine, that torch.compile cannot do: it says so in the first step."""
    if not training.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"training.compile: torch.compile cannot do this student here ({reason}). Leave it out."
        ) from error


def among_ranks(student: Student, training: Training, device: torch.device) -> Student:
    """The student as several ranks train it; as it is, of one.

    Without `sync_batchnorm` each rank's BatchNorm takes its statistics from its own rows, and the running statistics
    are those of rank 0.
    """
    if world() == 1:
        return student
    if training.sync_batchnorm:
        synchronise_batchnorm(student.network, device)
    network = student.network if student.trained is None else student.trained
    return replace(student, trained=DistributedDataParallel(network, [device] if device.type == "cuda" else None))


def kd_layer_scores(student: Student) -> dict[str, Tensor]:
    """`[B, K, H, W]` float32 scores of the last training pass, by the name of the module before the KD layer."""
    scores = {after: layer.scores for after, layer in student.kd_layers.items()}
    for after, one in scores.items():
        assert one is not None, f"the KD layer behind {after} kept no scores: the student is not in training mode"
    return {after: one.float() for after, one in scores.items() if one is not None}
