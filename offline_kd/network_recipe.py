"""Which networks there are, and where their weights come from: the fields `teacher` and `student` of recipes."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from offline_kd.data.expected import MEASURES, ExpectedAccuracy, Kind
from offline_kd.data.manifest import EvaluationCrop, Normalisation
from offline_kd.models.checkpoints import WeightsFile
from offline_kd.support.strict import Strict
from offline_kd.training_recipe import Training, is_unused

WHICH_NETWORK = "`cifar:NAME`, `torchvision:NAME`, `timm:NAME` or `package.module:function`"


def _kind_of_weights(content: object) -> str:
    return "file" if isinstance(content, dict | WeightsFile) else "name"


Weights = Annotated[Annotated[str, Tag("name")] | Annotated[WeightsFile, Tag("file")], Discriminator(_kind_of_weights)]
ClassName = Annotated[int, Field(ge=0, strict=True)] | Annotated[str, Field(min_length=1)]
Head = Literal["keep", "new"]


def _as_lists(content: object) -> object:
    """Classes whose name YAML takes for a number, and those that are one of the teacher's."""
    if not isinstance(content, dict):
        return content
    names = [str(name) if type(name) is int else name for name in content]
    return {name: one if isinstance(one, list) else [one] for name, one in zip(names, content.values(), strict=True)}


ClassMap = Annotated[dict[str, Annotated[list[ClassName], Field(min_length=1)]], BeforeValidator(_as_lists)]


def _is_classifier(kind: object) -> bool:
    """Left out of YAML and JSON, so that recipes and runs of classifiers are described as before."""
    return kind == "classifier"


class TeacherNetwork(Strict):
    """A teacher of the manifest (`weights: NAME`, everything else follows), or a network and where its weights are."""

    model: str | None = Field(None, description=f"{WHICH_NETWORK}; by default the manifest's")
    model_args: dict[str, int | float | str | bool] = Field({}, description="more arguments of the network")
    kind: Kind = Field(
        "classifier",
        exclude_if=_is_classifier,
        description="what its outputs are: logits of one softmax; multilabel: of a sigmoid for every class, for sets "
        "of labels; embedding: vectors, no classes, and what is kept of it are capture.features",
    )
    weights: Weights | None = Field(
        None, description="manifest name, path, torchvision weights name, or pretrained; or {file, key, prefix}"
    )
    head: Head | None = Field(
        None,
        exclude_if=is_unused,
        description="training begins from `weights`, and keeps their head or begins with a new one",
    )
    classes: ClassMap | None = Field(
        None,
        exclude_if=is_unused,
        description="of a teacher with other or more classes: index or name of its class, or a list of them, for "
        "every class of the dataset; or a YAML file beside the recipe that says so",
    )
    normalisation: Normalisation | None = Field(None, description="by default the manifest's, or timm's of the model")
    crop: EvaluationCrop | None = Field(None, description="the same; its size is that of the views the teacher sees")
    expected: ExpectedAccuracy | None = Field(
        None, description="what it must reach before it is asked; by default what the manifest says of it"
    )
    training: Training | None = Field(None, description="how `run` and `train --teacher` make the weights")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of autocast; logits are float32")
    compile: bool = Field(False, exclude_if=is_unused, description="by torch.compile: faster, after a minute or more")
    tf32: bool = Field(False, exclude_if=is_unused, description="let a GPU make float32 products of 10 bits: faster")
    licence: str = Field("", description="of the weights, for the store's card; by default the manifest's")

    @property
    def is_to_be_trained(self) -> bool:
        """Whether the recipe makes the teacher: from nothing, or from the weights whose head it speaks of."""
        return self.training is not None and (self.weights is None or self.head is not None)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.head is not None and (self.training is None or self.weights is None):
            raise ValueError(
                "head is what training keeps of the weights that it begins from: give training and weights too, or "
                "leave head out"
            )
        if self.kind == "multilabel" and any(len(one) > 1 for one in (self.classes or {}).values()):
            raise ValueError(
                "classes of a multilabel teacher are one each: what several sigmoids together say is not defined. Name "
                "one class of the teacher for each of the dataset"
            )
        if self.classes is not None and self.is_to_be_trained:
            raise ValueError("a teacher that is trained here has the classes of the dataset: leave classes out")
        if self.kind == "embedding" and (self.training is not None or self.classes is not None):
            field = "training" if self.training is not None else "classes"
            raise ValueError(f"kind: embedding is a teacher without classes, as it is: leave {field} out")
        if self.expected is not None and self.expected.measure != MEASURES[self.kind]:
            raise ValueError(
                f"expected: a teacher of kind {self.kind} is measured by {MEASURES[self.kind]}, not by "
                f"{self.expected.measure}"
            )
        return self


class StudentNetwork(Strict):
    """The network that learns."""

    model: str = Field(description=WHICH_NETWORK)
    model_args: dict[str, int | float | str | bool] = Field({}, description="more arguments of the network")
    weights: Weights | None = Field(
        None,
        exclude_if=is_unused,
        description="to begin from, as of a teacher: manifest name, path, torchvision weights name, or pretrained; or "
        "{file, key, prefix}",
    )
    head: Head | None = Field(
        None,
        exclude_if=is_unused,
        description="of the weights; by default it is kept where it is for as many classes, and else a new one",
    )
