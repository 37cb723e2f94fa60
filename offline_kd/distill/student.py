"""The network that learns: built by name, with the KD layers that an objective's terms put into it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from offline_kd.data.blocks import BlockLoader
from offline_kd.models.kd_layer import WithKDLayer, find_map, insert_kd_layer
from offline_kd.models.networks import build, normalise
from offline_kd.models.sync_batchnorm import synchronise_batchnorm
from offline_kd.recipe import AnyTerm, Recipe, Training, kd_layer_terms
from offline_kd.support.errors import RecipeError
from offline_kd.support.ranks import world


@dataclass(frozen=True)
class Student:
    network: nn.Module
    kd_layers: Mapping[str, WithKDLayer]  # by the name of the module before
    shared: nn.Module | None = None  # the network as ranks train it together: its gradients are those of all of them


def new_student(
    recipe: Recipe, loader: BlockLoader, seed: int, device: torch.device, terms: Sequence[AnyTerm] = ()
) -> Student:
    """The student of a recipe, freshly initialised, with the KD layers that `terms` put into it.

    Raises ModelError for a KD layer behind a module that gives no map, RecipeError for one behind the same module as
    another.
    """
    num_classes = len(loader.dataset.classes)
    torch.manual_seed(seed)
    network = build(recipe.student.model, num_classes, recipe.student.model_args).to(device)
    wanted = kd_layer_terms(terms)
    if not wanted:
        return Student(network, {})
    if (size := recipe.views.output_size) is None:
        images = loader[0].images[:1]
    else:
        images = torch.zeros((1, 3, size, size), dtype=torch.uint8)
    example = normalise(images.to(device), recipe.data.normalisation)
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
    return Student(network, layers)


def among_ranks(student: Student, training: Training, device: torch.device) -> Student:
    """The student as several ranks train it; as it is, of one.

    Without `sync_batchnorm` each rank's BatchNorm takes its statistics from its own rows, and the running statistics
    are those of rank 0.
    """
    if world() == 1:
        return student
    if training.sync_batchnorm:
        synchronise_batchnorm(student.network, device)
    return replace(
        student, shared=DistributedDataParallel(student.network, [device] if device.type == "cuda" else None)
    )


def kd_layer_scores(student: Student) -> dict[str, Tensor]:
    """`[B, K, H, W]` float32 scores of the last training pass, by the name of the module before the KD layer."""
    scores = {after: layer.scores for after, layer in student.kd_layers.items()}
    for after, one in scores.items():
        assert one is not None, f"the KD layer behind {after} kept no scores: the student is not in training mode"
    return {after: one.float() for after, one in scores.items() if one is not None}
