"""What says the label of a sample: `labels` of a split, in the manifest.

cls              its member `.cls`: the index of the class, in ASCII
json:FIELD       a field of its member `.json`: the index of the class, or its name
json-set:FIELD   a field of its member `.json`: a list of indices or names of classes, each once, maybe of none
none             nothing: the label is UNLABELLED, as one that is hidden from a student
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from offline_kd.support.errors import DataError, did_you_mean

UNLABELLED = -1
LABEL_RULES = r"^(cls|none|json(-set)?:[^\x00-\x1f]+)$"
SETS = "json-set:"
LabelRule = Annotated[str, Field(pattern=LABEL_RULES)]


class Names(dict[str, int]):
    """Any name is a class here: numbers below those of classes, in the order in which the names come."""

    def __missing__(self, name: str) -> int:
        self[name] = UNLABELLED - 1 - len(self)
        return self[name]


@dataclass(frozen=True)
class Labels:
    """How labels are read; `numbers` has the class index of every name that a field of `.json` may hold."""

    rule: str = "cls"
    numbers: Mapping[str, int] = field(default_factory=dict)

    def of(self, members: Mapping[str, bytes]) -> int | None:
        """The class index of a sample with these members, by extension; None where none of them says it.

        Of a sample whose label is a set, which `set_of` reads, it is UNLABELLED.

        Raises ValueError saying what stands there instead of a label.
        """
        if self.rule == "none" or self.are_sets:
            return UNLABELLED
        if self.rule == "cls":
            return _class_index(members["cls"]) if "cls" in members else None
        said = _field_of(members.get("json", b"{}"), self.rule.removeprefix("json:"))
        return None if said is None else self._index_of(said)

    @property
    def are_sets(self) -> bool:
        """Whether a label is a set of classes."""
        return self.rule.startswith(SETS)

    def set_of(self, members: Mapping[str, bytes]) -> tuple[int, ...] | None:
        """The class indices of a sample, rising; None where no member says them.

        Raises ValueError saying what stands there instead of a list of classes, each once.
        """
        said = _field_of(members.get("json", b"{}"), self.rule.removeprefix(SETS))
        if said is None:
            return None
        if not isinstance(said, list):
            raise ValueError(f"the labels are {said!r:.40}, no list of classes")
        found = [self._index_of(one) for one in said]
        if len(set(found)) < len(found):
            twice = next(one for one, index in zip(said, found, strict=True) if found.count(index) > 1)
            raise ValueError(f"the labels have {twice!r:.40} twice")
        return tuple(sorted(found))

    def _index_of(self, said: object) -> int:
        if isinstance(said, str):
            try:
                return self.numbers[said]
            except KeyError:
                near = did_you_mean(said, list(self.numbers)[:1000])
                raise ValueError(f"the label is {said[:40]!r}, no class of the dataset.{near[:200]}") from None
        if isinstance(said, int) and not isinstance(said, bool) and said >= 0:
            return said
        raise ValueError(f"the label is {said!r:.40}, no index and no name of a class")


CLS = Labels()


def labels_of(rule: str, classes: Sequence[str]) -> Labels:
    """How labels of a split with these classes are read."""
    return Labels(rule, {name: index for index, name in enumerate(classes)})


def _class_index(text: bytes) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"the label is {text[:40]!r}, not a class index")
    return int(text)


def _field_of(text: bytes, name: str) -> object:
    """None where there is no such field."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read: {error}") from error
    return content.get(name) if isinstance(content, dict) else None


def need_labels(rule: str, where: str, what_for: str) -> None:
    """Raise DataError where a split has no labels and something cannot do without."""
    if rule == "none":
        raise DataError(
            f"{where}: has no labels (`labels: none` in the manifest), but {what_for} needs them. Name a split with "
            "labels, or do without."
        )


def need_one_label(rule: str, where: str, what_for: str) -> None:
    """Raise DataError where the labels of a split are none, or sets, and something needs one of every sample."""
    need_labels(rule, where, what_for)
    if rule.startswith(SETS):
        raise DataError(
            f"{where}: has sets of labels (`labels: {rule}` in the manifest), but {what_for} needs one label of every "
            "sample. Name another split, or do without."
        )


def refuse_other_labels(kind: str, rule: str, where: str) -> None:
    """Raise DataError where the labels of a split are not what a teacher of this kind names.

    Args:
        kind: of the teacher, as recipes have it.
        rule: of the split, as `Split.labels`.
    """
    if rule == "none" or (kind == "multilabel") == rule.startswith(SETS):
        return
    if kind == "multilabel":
        raise DataError(
            f"{where}: has one label of every sample (`labels: {rule}` in the manifest), but teacher.kind is "
            "multilabel: give `labels: json-set:FIELD`, or leave teacher.kind out."
        )
    if kind == "embedding":
        raise DataError(
            f"{where}: has sets of labels (`labels: {rule}` in the manifest), but what goes with a teacher without "
            "classes is judged by one label of every sample: `labels: none` leaves them out."
        )
    raise DataError(
        f"{where}: has sets of labels (`labels: {rule}` in the manifest), but teacher.kind is {kind}, whose softmax "
        "names one class: --set teacher.kind=multilabel."
    )
