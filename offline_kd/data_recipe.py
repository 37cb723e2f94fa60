"""Which images a recipe is about, and which of them are trained on: the field `data` of recipes."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from offline_kd.data.blocks import OnBadImage
from offline_kd.data.manifest import EvaluationCrop, Normalisation
from offline_kd.support.strict import Strict
from offline_kd.training_recipe import is_unused


class ScoredRows(Strict):
    """The rows that a store's teacher scores highest or lowest; the scores are means over all stored views."""

    score: Literal[
        "teacher_entropy", "teacher_confidence", "margin", "consistency", "label_probability", "agreement"
    ] = Field(
        description="entropy of its softmax; probability of its class; distance to the second one; share of the views "
        "in which it names that class; probability of the label; share of the views in which it names the label"
    )
    order: Literal["highest", "lowest"] = Field(description="which are kept")
    keep: float = Field(gt=0, le=1, description="share of all training rows, whatever their classes")


def _kind_of_subset(content: object) -> str:
    return "score" if isinstance(content, dict | ScoredRows) else "file"


class Data(Strict):
    """Which images there are, and how they are read."""

    dataset: str = Field(description="name in the manifest")
    train: str = Field("train", description="split of which the teacher is asked, and on which students are trained")
    evaluation: str = Field("test", description="a split of the dataset, or DATASET/SPLIT of one with the same classes")
    tars: list[int] | None = Field(None, min_length=1, description="numbers of the training tars to use; all if absent")
    labelled_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the training samples whose label the student may see, chosen by key",
    )
    subset: (
        Annotated[Annotated[str, Tag("file")] | Annotated[ScoredRows, Tag("score")], Discriminator(_kind_of_subset)]
        | None
    ) = Field(
        None,
        exclude_if=is_unused,
        description="rows that students train on: a file of their keys (lines, or the CSV of `store explore`) beside "
        "the recipe, or those that a store's teacher scores highest or lowest; all if absent",
    )
    validation: float | None = Field(
        None,
        gt=0,
        lt=1,
        exclude_if=is_unused,
        description="share of the training samples, chosen by key, that nothing is trained on: evaluated every epoch "
        "instead of the evaluation split, which is evaluated once, at the end",
    )
    normalisation: Normalisation = Field(description="of the student, and of a teacher that has none of its own")
    root: str | None = Field(None, description="folder of the data, before OFFLINE_KD_DATA")
    crop: EvaluationCrop | None = Field(
        None, description="of the student's evaluation, where views resize; by default views.size of 8/7 of it"
    )
    bad_images: OnBadImage = Field("fail", description="skip: leave out images that cannot be decoded, and list them")
    keep_bytes: int = Field(2**30, ge=0, lt=2**63, description="decoded images kept in memory between epochs")
    workers: int = Field(0, ge=0, le=1024, description="processes that read and decode tars")
