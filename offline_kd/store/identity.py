"""What the targets of a store are about: the images, the teacher, and maps of it that decisions were made on."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from offline_kd.data.expected import Kind
from offline_kd.data.label_sets import packed_bytes
from offline_kd.data.labels import SETS, LabelRule
from offline_kd.data.manifest import EvaluationCrop, Normalisation, Tar
from offline_kd.store.decisions import DecisionsConfig
from offline_kd.support.strict import Sha256, Strict

MAX_TARS = 2**17  # of one store
Side = Annotated[int, Field(gt=0, lt=2**15)]


def _is_usual(labels: object) -> bool:
    """Left out of JSON, so that stores of images with `.cls` are described as by earlier versions."""
    return labels == "cls"


def _is_false(value: object) -> bool:
    """Left out of JSON, so that stores of teachers that compute as they always did are described as before."""
    return value is False


def _is_classifier(kind: object) -> bool:
    """Left out of JSON, so that stores of classifiers are described as before."""
    return kind == "classifier"


def _is_unused(value: object) -> bool:
    """Left out of JSON, so that stores of teachers with classes of their own are described as before."""
    return value in (None, "")


class DatasetIdentity(Strict):
    name: str
    split: str
    fingerprint: Sha256
    classes: list[str] = Field(description="names, in the order of their indices; none without labels")
    height: Side | None = Field(description="of every image; None: they differ")
    width: Side | None
    tars: list[Tar] = Field(min_length=1, max_length=MAX_TARS)
    labels: LabelRule = Field("cls", exclude_if=_is_usual, description="what says the label of a sample")
    licence: str

    @model_validator(mode="after")
    def _labels_have_names(self) -> Self:
        if len(self.classes) < 2 and (self.classes or self.labels != "none"):
            raise ValueError("classes are two or more; none only where labels are none")
        return self

    @property
    def has_sets(self) -> bool:
        """Whether the label of a sample is a set of classes."""
        return self.labels.startswith(SETS)

    @property
    def label_array(self) -> tuple[str, float, str, *tuple[tuple[str, int], ...]]:
        """What a store holds of the label of a row: type, what was never written, description, and maybe an axis."""
        if self.has_sets:
            axis = "byte", packed_bytes(len(self.classes))
            return "|u1", 0, "a bit of every class, lowest bits first; then a 1", axis
        return "<i4", -1, "class index" + ("; -2: none" if self.labels == "none" else "")


class Imported(Strict):
    """Of answers that another program stored: the teacher was never asked here."""

    format: str = Field(description="of the files, as the command line has it")
    evaluation: str = Field(description="a split on which students may be evaluated")
    lost: list[str] = Field(description="what the files do not say")

    @property
    def in_words(self) -> str:
        """For people."""
        return f"{self.format}; lost: {'; '.join(self.lost)}"


class MeasuredNeighbours(Strict):
    """How good features are without any training: whether an image is of the class of those that are nearest to it."""

    features: str = Field(description="of the teacher, by name: those that were measured")
    neighbours: int = Field(gt=0, description="by cosine, of the other images of the split, which vote alike")
    top1: float = Field(ge=0, le=100, description="percent of the images")


class TeacherIdentity(Strict):
    name: str
    model: str
    model_args: dict[str, int | float | str | bool]
    kind: Kind = Field(
        "classifier",
        exclude_if=_is_classifier,
        description="embedding: it has no classes, and gives no logits; multilabel: logits of a sigmoid for each",
    )
    weights_sha256: Sha256 = Field(description="where answers were imported: of all that was read of them")
    weights_part: str = Field(
        "", exclude_if=_is_unused, description="entry, prefix of the file, where not the weights themselves were meant"
    )
    normalisation: Normalisation
    crop: EvaluationCrop | None = Field(None, description="of images of different sizes; its size is that of views")
    dtype: str
    compile: bool = Field(False, exclude_if=_is_false, description="whether the network was compiled")
    tf32: bool = Field(False, exclude_if=_is_false, description="whether float32 products may have had 10 bits")
    classes: list[Annotated[list[int], Field(min_length=1)]] | None = Field(
        None,
        exclude_if=_is_unused,
        description="indices of the network's classes that each class of the dataset is; None: they are its own",
    )
    evaluated_on: str
    measured_top1: float | None = Field(
        None, exclude_if=_is_unused, description="percent, by the gate, before anything was written; of a classifier"
    )
    measured_map: float | None = Field(
        None, exclude_if=_is_unused, description="mean average precision in percent, likewise; of a multi-label teacher"
    )
    measured_neighbours: MeasuredNeighbours | None = Field(
        None, exclude_if=_is_unused, description="the same of teachers without classes; None: there were no labels"
    )
    licence: str
    imported: Imported | None = Field(None, exclude_if=_is_unused, description="None: it was asked by offline-kd")

    @model_validator(mode="after")
    def _was_measured(self) -> Self:
        for kind, name, measured in (
            ("classifier", "measured_top1", self.measured_top1),
            ("multilabel", "measured_map", self.measured_map),
        ):
            if (self.kind == kind) != (measured is not None):
                raise ValueError(f"{name} is of every teacher of kind {kind}, and of no other")
        if self.measured_neighbours is not None and self.kind != "embedding":
            raise ValueError("measured_neighbours are of teachers of kind embedding, and of no other")
        return self

    @property
    def what_is_asked(self) -> tuple[object, ...]:
        """Which weights, and which of their classes: teachers that differ in it say other things."""
        return self.kind, self.weights_sha256, self.weights_part, self.classes

    @property
    def gate(self) -> tuple[str, str]:
        """What was measured of it before it was believed, and the figure, in words."""
        if self.measured_top1 is not None:
            return "top-1", f"{self.measured_top1:.2f} % of {self.evaluated_on}"
        if self.measured_map is not None:
            return "mAP", f"{self.measured_map:.2f} % of {self.evaluated_on}"
        if (found := self.measured_neighbours) is None:
            return "k-NN top-1", f"nothing was measured: {self.evaluated_on} has no labels"
        how = f"of {self.evaluated_on}, by features '{found.features}' and {found.neighbours} neighbours"
        return "k-NN top-1", f"{found.top1:.2f} % {how}"

    @property
    def weights(self) -> str:
        """Which weights, in words."""
        of_what = " of the imported labels; the weights are not known" if self.imported else ""
        return f"sha256 {self.weights_sha256}{of_what}"

    @property
    def arithmetic(self) -> str:
        """How it computed, in words."""
        if self.imported:
            return "arithmetic not known"
        return self.dtype + ", TF32" * self.tf32 + ", compiled" * self.compile

    @property
    def precision(self) -> str:
        """The dtype whose rounding explains how far two runs differ; TF32 has as many bits as float16."""
        return "float16" if self.dtype == "float32" and self.tf32 else self.dtype


class DecisionsIdentity(Strict):
    """Decisions that a store holds, and the map they were made on."""

    config: DecisionsConfig
    channels: int = Field(gt=0, le=2**20)
    height: Side
    width: Side
