"""What an objective needs of a store: what a codec is asked whether it serves."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Needs:
    """What an objective needs of a teacher."""

    logits: bool = True  # False: none, as cross-entropy on labels, and losses on decisions
    offset: bool = False  # the raw logits' common offset, which probabilities lack
    labels: bool = False  # uses the label beside the teacher
    decisions: bool = False  # decisions on features
    # Classes outside the largest matter only by their mass at this temperature; None: every class matters.
    tail_temperature: float | None = None
    # Field of `store.schema.Fidelity` that bounds it, and what a message says of that field's value.
    measured: tuple[str, str] | None = None
    features: bool = False  # features of a module
    # What an image has, of labels and of the teacher's answers: one class, by softmax; a set, by sigmoids; either.
    label: Literal["one", "set", "either"] = "one"
