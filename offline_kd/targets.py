"""What the teacher says of a batch: read from the store, or asked live."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offline_kd.errors import RecipeError
from offline_kd.recipe import AnyTerm, Recipe, kd_layer_terms
from offline_kd.store.codec import decode
from offline_kd.store.reader import Store
from offline_kd.stream import Batch, decision_arrays, tables_on
from offline_kd.taps import TapPoint
from offline_kd.teacher import Teacher
from offline_kd.templates import pack


@dataclass(frozen=True)
class Targets:
    """What the teacher says of a batch, from the store or live."""

    logits: Tensor | None = None  # [B, C]
    decisions: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # by name in the recipe, then by array


AskTeacher = Callable[[Batch], Targets]


def stored_targets(store: Store, terms: Sequence[AnyTerm], device: torch.device) -> AskTeacher:
    """Targets from what `Stream` read of the store."""
    codec = store.identity.codec
    arrays = {term.decisions: decision_arrays(store, term.decisions) for term in kd_layer_terms(terms)}
    tables = _subclass_tables(store, terms, device)

    def targets(batch: Batch) -> Targets:
        decided = {
            name: {full.rsplit("/", 1)[-1]: batch.targets[full] for full in names} | tables.get(name, {})
            for name, names in arrays.items()
        }
        return Targets(decode(codec, batch.targets), decided)

    return targets


def live_targets(
    teacher: Teacher, recipe: Recipe, terms: Sequence[AnyTerm], store: Store | None, device: torch.device
) -> AskTeacher:
    """The same from the live teacher. Its decisions need the store's templates."""
    names = sorted({term.decisions for term in kd_layer_terms(terms)})
    if names and store is None:
        raise RecipeError("decisions of the live teacher need templates: give --store beside --online.")
    templates = {name: tables_on(store, name, device) for name in names} if store else {}
    configs = {name: recipe.capture.decisions[name] for name in names}
    tables = _subclass_tables(store, terms, device) if store else {}
    points: list[TapPoint] = list(configs.values())

    def targets(batch: Batch) -> Targets:
        logits, maps = teacher.logits_and_maps(batch.images, points)
        labels = batch.labels.clamp(min=0)  # those that are hidden are left out of the loss
        decided = {
            name: pack(config, features, labels, templates[name]) | tables.get(name, {})
            for (name, config), features in zip(configs.items(), maps, strict=True)
        }
        return Targets(logits, decided)

    return targets


def _subclass_tables(store: Store, terms: Sequence[AnyTerm], device: torch.device) -> dict[str, dict[str, Tensor]]:
    return {
        term.decisions: {"table": tables_on(store, term.decisions, device)["table"]}
        for term in kd_layer_terms(terms)
        if term.term == "subclass_decisions"
    }
