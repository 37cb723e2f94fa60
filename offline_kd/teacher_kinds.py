"""What the kind of a teacher allows: what is only right for a softmax is refused where sigmoids follow, and the other
way round."""

from collections.abc import Mapping, Sequence

from offline_kd.network_recipe import TeacherNetwork
from offline_kd.objectives.term import Term
from offline_kd.store.codecs.codec import Codec
from offline_kd.store.decisions import AnyDecisions, SubclassDecisions
from offline_kd.support.errors import RecipeError
from offline_kd.support.strict import Strict


def refuse_capture(teacher: TeacherNetwork, codec: Strict, decisions: Mapping[str, AnyDecisions]) -> None:
    """Raise ValueError for a codec, a budget, decisions or an expected figure that are not for a teacher of this kind.

    Args:
        codec: or a wish for one within a budget.
    """
    is_set, expected = teacher.kind == "multilabel", teacher.expected
    if expected is not None and is_set == (expected.map is None):
        raise ValueError(
            f"teacher.expected: a teacher of kind {teacher.kind} is measured by {'map' if is_set else 'top1'}, not by "
            f"{'top1' if is_set else 'map'}"
        )
    budget = getattr(codec, "error_budget", None)
    objective = getattr(budget, "objective", None)
    if isinstance(objective, Term) and (problem := _problem(teacher.kind, objective)):
        raise ValueError(f"capture.codec.error_budget: {problem}")
    if not is_set:
        return
    if isinstance(codec, Codec) and not codec.serves_sets:
        raise ValueError(
            f"capture.codec: '{codec.name}' keeps what a softmax needs of the logits, and the sigmoids of a multilabel "
            "teacher need more: use f16, f32, int or auto"
        )
    for name, config in decisions.items():
        if isinstance(config, SubclassDecisions):
            raise ValueError(
                f"capture.decisions.{name}: sub-classes are parts of the one class of an image, and images have "
                "sets of labels here: use kind templates"
            )


def refuse_terms(kind: str, terms: Sequence[Term], where: str) -> None:
    """Raise RecipeError, beginning with `where`, for a term that is not for teachers of this kind."""
    for term in terms:
        if problem := _problem(kind, term):
            raise RecipeError(f"{where}: {problem}.")


def _problem(kind: str, term: Term) -> str:
    """Why a term is not for teachers of this kind; '' if it is."""
    wants = term.needs.label
    if wants == "one" and kind == "multilabel":
        return (
            f"term '{term.term}' takes an image to be of one class, as a softmax does, and teacher.kind is multilabel: "
            "use bce and binary_kd"
        )
    if wants == "set" and kind != "multilabel":
        return (
            f"term '{term.term}' asks of every class whether the image is of it, and teacher.kind is {kind}: use "
            "ce and kd, or teacher.kind: multilabel"
        )
    return ""
