"""What the teacher says of a batch: read from the store, or asked live."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from offline_kd.distill.loader import all_features_decoder
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import AnyTerm, Recipe, feature_terms, kd_layer_terms
from offline_kd.store.decisions import pack, unpack_probs
from offline_kd.store.feature_reading import held_features
from offline_kd.store.features import pooled
from offline_kd.store.join import Wanted, decision_arrays, tables_on
from offline_kd.store.logit_reading import logits_decoder
from offline_kd.store.reader import Store
from offline_kd.store.rows import Rows
from offline_kd.support.errors import RecipeError


@dataclass(frozen=True)
class TeacherSignal:
    """What a loss gets from a teacher for a batch. Nothing at all, where there is no teacher."""

    logits: Tensor | None = None  # [B, C]; None where no term asks for them
    decisions: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # by name in the recipe, then by array
    features: Mapping[str, Tensor] = field(default_factory=dict)  # [B, D] or [B, D, H, W] float32 by name in the recipe

    def take(self, rows: slice) -> "TeacherSignal":
        """What it says of some rows; the table of sub-classes is about all."""
        decisions = {
            decided: {name: array if name == "table" else array[rows] for name, array in arrays.items()}
            for decided, arrays in self.decisions.items()
        }
        features = {name: one[rows] for name, one in self.features.items()}
        return TeacherSignal(None if self.logits is None else self.logits[rows], decisions, features)


def said_of(logits: Tensor, batch: Rows) -> Tensor:
    """`[4]` float64 on the device, sums over the rows of a batch: 1; the entropy in nats of the teacher's softmax at
    T = 1; 1 where the label is known; 1 where it has the largest logit as well.

    Of a mixed image the label is that of the larger share.

    Args:
        logits: `[B, C]`, the teacher's.
    """
    entropy = torch.special.entr(logits.softmax(dim=1)).sum(dtype=torch.float64)
    labels = torch.where(batch.share >= 0.5, batch.labels, batch.other_labels)
    known, right = (labels >= 0).sum(), (logits.argmax(dim=1) == labels).sum()
    return torch.stack([entropy.new_full((), len(logits)), entropy, known, right])


AskTeacher = Callable[[Rows], TeacherSignal]


@dataclass(frozen=True)
class Ensemble:
    """How the logits of several teachers become one teacher's."""

    weights: Sequence[float] = (1.0,)  # by store; they are made to sum to 1
    space: Literal["probability", "logit"] = "probability"


def ensemble_logits(logits: Sequence[Tensor], ensemble: Ensemble) -> Tensor:
    """`[B, C]` logits of several teachers averaged, which say `[B, C]` each.

    In logit space their weighted mean. In probability space log of the weighted mean of softmax(z): exact at T = 1,
    with no offset of its own, which is why DTKD cannot use it.
    """
    if len(logits) == 1:
        return logits[0]
    total = sum(ensemble.weights)
    shares = [weight / total for weight in ensemble.weights]
    if ensemble.space == "logit":
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


def features_by_store(stores: Sequence[Store], terms: Sequence[AnyTerm]) -> list[list[str]]:
    """Which features the terms want of which store: of the first that has them.

    Raises StoreMismatch when none has features of that name.
    """
    wanted: list[list[str]] = [[] for _ in stores]
    for name in sorted({term.features for term in feature_terms(terms)}) if stores else ():
        owner = next((index for index, store in enumerate(stores) if name in store.identity.features), 0)
        held_features(stores[owner], name)
        wanted[owner].append(name)
    return wanted


def wanted_of(stores: Sequence[Store], terms: Sequence[AnyTerm]) -> list[Wanted]:
    """What the terms want of every store; logits only where a term uses them.

    Raises StoreMismatch when no store has decisions or features that a term names.
    """
    of_taps = zip(decisions_by_store(stores, terms), features_by_store(stores, terms), strict=True)
    return [Wanted(needs_logits(terms), decisions, features) for decisions, features in of_taps]


def needs_logits(terms: Sequence[AnyTerm]) -> bool:
    return any(term.needs.logits for term in terms)


def stored_signal(
    stores: Sequence[Store], terms: Sequence[AnyTerm], device: torch.device, ensemble: Ensemble = Ensemble()
) -> AskTeacher:
    """The teacher signal out of what the loader read of the stores.

    Raises RecipeError for a term that needs the logits' offset, of teachers that are averaged as probabilities.
    """
    for term in terms if len(stores) > 1 and ensemble.space == "probability" else ():
        if term.needs.offset:
            if term.needs.label == "set":
                raise RecipeError(
                    f"term '{term.term}': several multi-label teachers are averaged as logits, not as one softmax: "
                    "`mix: logit`."
                )
            raise RecipeError(
                f"{term.term.upper()} needs the offset of the logits, which a mixture of probabilities lacks: "
                "`mix: logit`."
            )
    tables: dict[str, dict[str, Tensor]] = {}
    for store, names in zip(stores, decisions_by_store(stores, terms), strict=True):
        tables |= _subclass_tables(store, [term for term in kd_layer_terms(terms) if term.decisions in names], device)
    decoders = [logits_decoder(store, device) for store in stores] if needs_logits(terms) else []
    features_of = all_features_decoder(stores, wanted_of(stores, terms), device)

    def ask(batch: Rows) -> TeacherSignal:
        decided = {name: _unpacked(one) | tables.get(name, {}) for name, one in batch.decisions.items()}
        features = features_of(batch.features)
        if not decoders:
            return TeacherSignal(None, decided, features)
        logits = [decoder(signal) for decoder, signal in zip(decoders, batch.signal, strict=True)]
        return TeacherSignal(ensemble_logits(logits, ensemble), decided, features)

    return ask


def live_signal(
    teacher: Teacher, recipe: Recipe, terms: Sequence[AnyTerm], store: Store | None, device: torch.device
) -> AskTeacher:
    """The teacher signal of the live teacher, asked for every batch. Its decisions need the store's templates.

    Features are the teacher's own, not coded, from where capture.features says; raises RecipeError for a name that is
    not there.
    """
    names = sorted({term.decisions for term in kd_layer_terms(terms)})
    if names and store is None:
        raise RecipeError("decisions of the live teacher need templates: give --store beside --online.")
    templates = {name: tables_on(store, name, device) for name in names} if store else {}
    configs = {name: recipe.capture.decisions[name] for name in names}
    tables = _subclass_tables(store, terms, device) if store else {}
    taps = {term.features: recipe.features_of(term) for term in feature_terms(terms)}
    points: list[TapPoint] = [*configs.values(), *taps.values()]

    def ask(batch: Rows) -> TeacherSignal:
        images = batch.images if batch.live_images is None else batch.live_images
        logits, maps = teacher.logits_and_maps(images, points)
        labels = batch.labels.clamp(min=0)  # packed sets stay; those that are hidden are left out of the loss
        decided = {
            name: _unpacked(pack(config, features, labels, templates[name])) | tables.get(name, {})
            for (name, config), features in zip(configs.items(), maps[: len(configs)], strict=True)
        }
        of_taps = zip(taps.items(), maps[len(configs) :], strict=True)
        said = None if teacher.kind == "embedding" else logits
        return TeacherSignal(said, decided, {name: pooled(tap, features) for (name, tap), features in of_taps})

    return ask


def no_signal(batch: Rows) -> TeacherSignal:
    """Of plain training, where no teacher is asked."""
    return TeacherSignal()


def _unpacked(decided: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decisions as losses want them, by the last part of the array's name: probabilities as such, not as integers."""
    return {name: unpack_probs(values) if name == "prob" else values for name, values in decided.items()}


def _subclass_tables(store: Store, terms: Sequence[AnyTerm], device: torch.device) -> dict[str, dict[str, Tensor]]:
    return {
        term.decisions: {"table": tables_on(store, term.decisions, device)["table"]}
        for term in kd_layer_terms(terms)
        if term.kind == "subclasses"
    }
