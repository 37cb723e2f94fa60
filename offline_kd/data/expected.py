"""What a teacher's outputs are, what is measured of it before it is believed, and what is expected of that."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from offline_kd.support.strict import Strict

# Logits of one softmax; a vector, no class; a logit of a sigmoid for every class.
Kind = Literal["classifier", "embedding", "multilabel"]
Percent = Annotated[float, Field(ge=0, le=100)]
# What the gate measures, by kind of teacher: fields of ExpectedAccuracy, and how people call them.
MEASURES: dict[Kind, str] = {"classifier": "top1", "embedding": "knn", "multilabel": "map"}
MEASURE_NAMES = {"top1": "top-1", "knn": "k-NN top-1", "map": "mAP"}


def _is_none(value: object) -> bool:
    """Left out of YAML and JSON, so that what is expected of classifiers is described as before."""
    return value is None


class ExpectedAccuracy(Strict):
    """The teacher gate: what is measured on a dataset split must be within `tolerance` of what is said here."""

    dataset: str = Field(description="name in the manifest")
    split: str = Field(description="of that dataset")
    top1: Percent | None = Field(None, exclude_if=_is_none, description="percent; of a classifier")
    knn: Percent | None = Field(
        None,
        exclude_if=_is_none,
        description="percent, of a teacher without classes: the images whose label most of their 20 nearest have",
    )
    map: Percent | None = Field(
        None, exclude_if=_is_none, description="mean average precision in percent, of a teacher of kind multilabel"
    )
    tolerance: float = Field(gt=0, description="percentage points")

    @model_validator(mode="after")
    def _says_one_figure(self) -> Self:
        if sum(one is not None for one in (self.top1, self.knn, self.map)) != 1:
            raise ValueError(
                "give top1 of a classifier, knn of a teacher without classes, or map of one of kind multilabel"
            )
        return self

    @property
    def measure(self) -> str:
        """The field that is given."""
        return "top1" if self.top1 is not None else "knn" if self.knn is not None else "map"

    @property
    def percent(self) -> float:
        """What it is."""
        return next(one for one in (self.top1, self.knn, self.map) if one is not None)

    @property
    def in_words(self) -> str:
        """The figure, with its name."""
        return f"{MEASURE_NAMES[self.measure]} {self.percent:.2f}"
