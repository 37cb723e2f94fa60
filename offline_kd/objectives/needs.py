"""What an objective needs of the teacher, from which follows which codecs and stores serve it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """What an objective needs of a teacher's logits."""

    logits: bool = True  # False: none (ce, decisions)
    offset: bool = False  # the raw logits' common offset, which probabilities lack (DTKD)
    labels: bool = False  # uses the label beside the teacher (dkd, nkd)
    decisions: bool = False  # decisions on features
    tail_temperature: float | None = None  # classes outside the largest matter only by their mass at this temperature
    measured: tuple[str, str] | None = None  # field of Fidelity that bounds it, and what a message says of it
