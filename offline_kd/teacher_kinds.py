"""What the kind of a teacher allows: what is only right for a softmax is refused where sigmoids follow, the other way
round, and both where there are no classes."""

from collections.abc import Mapping, Sequence

from offline_kd.data.expected import Kind
from offline_kd.objectives.term import Term
from offline_kd.store.codecs.codec import Codec
from offline_kd.store.decisions import AnyDecisions, SubclassDecisions
from offline_kd.store.features import WantedFeatures
from offline_kd.support.errors import RecipeError
from offline_kd.support.strict import Strict


def refuse_capture(
    kind: Kind, codec: Strict, decisions: Mapping[str, AnyDecisions], features: Mapping[str, WantedFeatures]
) -> None:
    """Raise ValueError for a codec, a budget, decisions or features that are not for a teacher of this kind.

    Args:
        codec: or a wish for one within a budget.
    """
    if kind == "embedding":
        _refuse_capture_of_vectors(codec, features)
        return
    if _name(codec) == "none":
        raise ValueError("capture.codec: none is of teachers without logits: teacher.kind: embedding")
    for name, one in features.items():
        if not one.module:
            raise ValueError(f"capture.features.{name}: of a classifier, say which module's")
    objective = getattr(getattr(codec, "error_budget", None), "objective", None)
    if isinstance(objective, Term) and (problem := _problem(kind, objective)):
        raise ValueError(f"capture.codec.error_budget: {problem}")
    if kind == "multilabel":
        _refuse_capture_of_sets(codec, decisions)


def _refuse_capture_of_vectors(codec: Strict, features: Mapping[str, WantedFeatures]) -> None:
    if not features:
        raise ValueError(
            "teacher.kind: embedding gives no logits, and capture.features is empty: say what is kept, "
            "`features: {embedding: {}}` for what the network itself gives"
        )
    if _name(codec) != "none":
        raise ValueError(
            f"capture.codec: {_name(codec)} is of logits, and teacher.kind: embedding has none: leave it out, or "
            "write {name: none}"
        )


def _refuse_capture_of_sets(codec: Strict, decisions: Mapping[str, AnyDecisions]) -> None:
    if isinstance(codec, Codec) and not codec.serves_sets:
        raise ValueError(
            f"capture.codec: '{codec.name}' keeps what a softmax needs of the logits, and the sigmoids of a multilabel "
            "teacher need more: use f16, f32, int, last_layer or auto"
        )
    for name, config in decisions.items():
        if isinstance(config, SubclassDecisions):
            raise ValueError(
                f"capture.decisions.{name}: sub-classes are parts of the one class of an image, and images have "
                "sets of labels here: use kind templates"
            )


def _name(codec: Strict) -> str:
    """As recipes write it."""
    return str(getattr(codec, "name", ""))


def refuse_terms(kind: Kind, terms: Sequence[Term], where: str) -> None:
    """Raise RecipeError, beginning with `where`, for a term that is not for teachers of this kind."""
    for term in terms:
        if problem := _problem(kind, term):
            raise RecipeError(f"{where}: {problem}.")


def _problem(kind: Kind, term: Term) -> str:
    """Why a term is not for teachers of this kind; '' if it is."""
    wants = term.needs.label
    if kind == "embedding" and term.needs.logits:
        return (
            f"term '{term.term}' needs the teacher's logits, and a teacher without classes (teacher.kind: embedding) "
            "has none. Use terms on its features: embedding, relational, crd, itrd"
        )
    if wants == "one" and kind == "multilabel":
        return (
            f"term '{term.term}' takes an image to be of one class, as a softmax does, and teacher.kind is multilabel: "
            "use bce and binary_kd"
        )
    if wants == "set" and kind != "multilabel":
        return (
            f"term '{term.term}' asks of every class whether the image is of it, and teacher.kind is {kind}: use "
            f"{'ce' if kind == 'embedding' else 'ce and kd'}, or teacher.kind: multilabel"
        )
    return ""
