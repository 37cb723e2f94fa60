"""What the teacher says of a batch: read from the store, or asked live."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from offline_kd.distill.loader import LIVE_IMAGES, Batch
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import AnyTerm, Recipe, kd_layer_terms
from offline_kd.store.decisions import pack, unpack_probs
from offline_kd.store.join import codec_tables_on, decision_arrays, tables_on
from offline_kd.store.reader import Store
from offline_kd.support.errors import RecipeError, StoreMismatch

MOST_MEASURED_ERROR = 0.05  # of WTTM's weight and DTKD's temperature, relative


@dataclass(frozen=True)
class Targets:
    """What the teacher says of a batch, from the store or live."""

    logits: Tensor | None = None  # [B, C]
    decisions: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # by name in the recipe, then by array


AskTeacher = Callable[[Batch], Targets]


@dataclass(frozen=True)
class Mix:
    """How the logits of several teachers become one teacher's."""

    weights: Sequence[float] = (1.0,)  # by store; they are made to sum to 1
    space: Literal["probability", "logit"] = "probability"


def mix_logits(logits: Sequence[Tensor], mix: Mix) -> Tensor:
    """`[B, C]` logits of the mixture of teachers that say `[B, C]` each.

    In logit space their weighted mean. In probability space log of the weighted mean of softmax(z): exact at T = 1,
    with no offset of its own, which terms such as DTKD need.
    """
    if len(logits) == 1:
        return logits[0]
    total = sum(mix.weights)
    shares = [weight / total for weight in mix.weights]
    if mix.space == "logit":
        return sum((share * z for share, z in zip(shares, logits, strict=True)), torch.zeros_like(logits[0]))
    scaled = [z.log_softmax(dim=-1) + math.log(share) for share, z in zip(shares, logits, strict=True)]
    return torch.stack(scaled).logsumexp(dim=0)


def decisions_by_store(stores: Sequence[Store], terms: Sequence[AnyTerm]) -> list[list[str]]:
    """Which decisions the terms want of which store: of the first that has them.

    Raises StoreMismatch when none has decisions of that name.
    """
    wanted: list[list[str]] = [[] for _ in stores]
    if not stores:
        return wanted
    for name in sorted({term.decisions for term in kd_layer_terms(terms)}):
        owner = next((index for index, store in enumerate(stores) if name in store.identity.decisions), 0)
        decision_arrays(stores[owner], name)
        wanted[owner].append(name)
    return wanted


def refuse_bias(store: Store, terms: Sequence[AnyTerm]) -> None:
    """Raise StoreMismatch when a term needs more of the logits than the store's codec has kept.

    What no codec promises, such as WTTM's weight and DTKD's temperature, is compared with what the store measured.
    """
    codec, manifest = store.identity.codec, store.manifest
    fidelity = manifest.fidelity.get(store.targets) if manifest else None
    for term in terms:
        problem = codec.serves(term.needs)
        if not problem and term.needs.measured and fidelity:
            name, message = term.needs.measured
            error: float | None = getattr(fidelity, name)
            problem = message.format(error) if (error or 0) > MOST_MEASURED_ERROR else ""
        if problem:
            raise StoreMismatch(
                f"{store.place}: codec {codec.model_dump(mode='json')} does not serve term '{term.term}', {problem}. "
                "Capture with another codec, or train with the bias: --allow-biased."
            )


def stored_targets(
    stores: Sequence[Store], terms: Sequence[AnyTerm], device: torch.device, mix: Mix = Mix()
) -> AskTeacher:
    """Targets from what `Stream` read of the stores.

    Raises RecipeError for a term that needs the logits' offset, of teachers that are mixed as probabilities.
    """
    for term in terms if len(stores) > 1 and mix.space == "probability" else ():
        if term.needs.offset:
            raise RecipeError(
                f"{term.term.upper()} needs the offset of the logits, which a mixture of probabilities lacks: "
                "`mix: logit`."
            )
    arrays: dict[str, tuple[str, list[str]]] = {}
    tables: dict[str, dict[str, Tensor]] = {}
    prefixes = ["", *(f"{number}:" for number in range(1, len(stores)))]
    for store, prefix, names in zip(stores, prefixes, decisions_by_store(stores, terms), strict=True):
        arrays |= {name: (prefix, decision_arrays(store, name)) for name in names}
        tables |= _subclass_tables(store, [term for term in kd_layer_terms(terms) if term.decisions in names], device)

    codecs = [codec_tables_on(store, device) for store in stores]

    def targets(batch: Batch) -> Targets:
        decided = {
            name: _unpacked({full.rsplit("/", 1)[-1]: batch.targets[prefix + full] for full in full_names})
            | tables.get(name, {})
            for name, (prefix, full_names) in arrays.items()
        }
        logits = [
            store.identity.codec.decode(
                {name: batch.targets[prefix + name] for name in store.identity.codec.unpacked_arrays()},
                store.identity.num_classes,
                codec,
            )
            for store, prefix, codec in zip(stores, prefixes, codecs, strict=True)
        ]
        return Targets(mix_logits(logits, mix), decided)

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
        logits, maps = teacher.logits_and_maps(batch.targets.get(LIVE_IMAGES, batch.images), points)
        labels = batch.labels.clamp(min=0)  # those that are hidden are left out of the loss
        decided = {
            name: _unpacked(pack(config, features, labels, templates[name])) | tables.get(name, {})
            for (name, config), features in zip(configs.items(), maps, strict=True)
        }
        return Targets(logits, decided)

    return targets


def _unpacked(decided: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decisions as losses want them, by the last part of the array's name: probabilities as such, not as integers."""
    return {name: unpack_probs(values) if name == "prob" else values for name, values in decided.items()}


def _subclass_tables(store: Store, terms: Sequence[AnyTerm], device: torch.device) -> dict[str, dict[str, Tensor]]:
    return {
        term.decisions: {"table": tables_on(store, term.decisions, device)["table"]}
        for term in kd_layer_terms(terms)
        if term.kind == "subclasses"
    }
