"""Recipes: one YAML file per experiment, read into the frozen description below.

`extends: other.yaml` starts from another recipe (relative to the file); mappings are merged, everything else replaced.
`--set path.to.field=value` overrides any field last.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import Field, field_validator

from offline_kd.data.blocks import OnBadImage
from offline_kd.data.manifest import EvaluationCrop, ExpectedAccuracy, Normalisation
from offline_kd.objectives import OBJECTIVES
from offline_kd.objectives.decisions import KDLayerTerm
from offline_kd.objectives.term import Positive, Term
from offline_kd.store.codecs import CODEC_TABLES, AnyCodec
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.decisions import AnyDecisions, DecisionsConfig
from offline_kd.support.errors import RecipeError, did_you_mean
from offline_kd.support.strict import Strict, parse, read_yaml
from offline_kd.views import Views
from offline_kd.views.none import NoAugmentation

Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z_\-]+$")]


class Data(Strict):
    dataset: str = Field(description="name in the manifest")
    train: str = "train"
    evaluation: str = "test"
    tars: list[int] | None = Field(None, min_length=1, description="numbers of the training tars to use; all if absent")
    labelled_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the training samples whose label the student may see, chosen by key",
    )
    normalisation: Normalisation = Field(description="of the student, and of a teacher that has none of its own")
    root: str | None = Field(None, description="folder of the data, before OFFLINE_KD_DATA")
    crop: EvaluationCrop | None = Field(
        None, description="of the student's evaluation, where views resize; by default views.size of 8/7 of it"
    )
    bad_images: OnBadImage = Field("fail", description="skip: leave out images that cannot be decoded, and list them")
    keep_bytes: int = Field(2**30, ge=0, description="decoded images kept in memory between epochs")
    workers: int = Field(0, ge=0, description="processes that read and decode tars")


class SGD(Strict):
    name: Literal["sgd"]
    lr: Positive
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)


class AdamW(Strict):
    name: Literal["adamw"]
    lr: Positive
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0)


class Step(Strict):
    """Multiply the rate by `gamma` after each milestone (epochs that are over)."""

    name: Literal["step"]
    milestones: list[int]
    gamma: Positive = 0.1
    warmup_epochs: float = Field(0, ge=0)


class Cosine(Strict):
    """From the full rate to `final_fraction` of it along half a cosine."""

    name: Literal["cosine"]
    final_fraction: float = Field(0, ge=0, le=1)
    warmup_epochs: float = Field(0, ge=0)


class Training(Strict):
    epochs: int = Field(ge=1)
    batch_size: int = Field(64, ge=2)
    optimizer: Annotated[SGD | AdamW, Field(discriminator="name")]
    schedule: Annotated[Step | Cosine, Field(discriminator="name")]
    label_smoothing: float = Field(0, ge=0, lt=1)
    views_per_decode: int = Field(
        1, ge=1, description="views shown of an image once it is decoded; so many epochs pass at once"
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="save every so many steps, beside every epoch's end")
    amp: bool = Field(False, description="bfloat16 autocast of the student; helps on GPUs with tensor cores")
    pool_blocks: int = Field(16, ge=1, description="tars whose rows are shuffled together")


if TYPE_CHECKING:
    AnyTerm = Term
else:
    AnyTerm = Annotated[Union[tuple(OBJECTIVES.values())], Field(discriminator="term")]  # noqa: UP007
Objective = Annotated[list[AnyTerm], Field(min_length=1)]


class TeacherNetwork(Strict):
    """A teacher of the manifest (`weights: NAME`, everything else follows), or a network and where its weights are."""

    model: str | None = None
    model_args: dict[str, int | float | str | bool] = Field({}, description="more arguments of the network")
    weights: str | None = Field(None, description="manifest name, path, or torchvision weights name")
    normalisation: Normalisation | None = Field(None, description="by default the manifest's, or timm's of the model")
    crop: EvaluationCrop | None = Field(None, description="the same; its size is that of the views the teacher sees")
    expected: ExpectedAccuracy | None = None
    training: Training | None = Field(None, description="how `run` and `train --teacher` make the weights")
    dtype: Literal["float32", "bfloat16"] = "float32"
    licence: str = ""


class AutoCodec(Strict):
    """The smallest codec whose total variation, at the worst of T = 1, 2, 4, is within the budget on first views."""

    name: Literal["auto"]
    error_budget: float = Field(0.01, gt=0, lt=1)


class Capture(Strict):
    """How stage 1 stores the teacher's targets."""

    @field_validator("decisions")
    @classmethod
    def _name_is_free(cls, decisions: dict[str, Any]) -> dict[str, Any]:
        if CODEC_TABLES in decisions:
            raise ValueError(f"'{CODEC_TABLES}' is what the tables of codecs are called: use another name")
        return decisions

    codec: Annotated[AnyCodec | AutoCodec, Field(discriminator="name")] = Float16(name="f16")
    decisions: dict[Name, DecisionsConfig] = Field({}, description="decisions on feature maps, by a name of your own")
    views_per_group: int | None = Field(None, ge=1, description="views stored and read together; must divide the count")
    batch_size: int | None = Field(None, ge=1, description="of the teacher; no effect on what is stored")
    fidelity_rows: int = Field(
        1000, ge=1, description="rows on which the teacher is asked again to finish a store; one of each block at least"
    )


class StudentNetwork(Strict):
    model: str
    model_args: dict[str, int | float | str | bool] = Field({}, description="more arguments of the network")


class TeacherStore(Strict):
    """One of several stores, or of several teachers of one store, that a student learns from."""

    store: str = Field(description="folder, URL or manifest name; `#TARGETS` and `@sha256:DIGEST` may follow")
    weight: Positive = 1.0


class CaptureRecipe(Strict):
    """What stage 1 needs to know: which teacher sees which views of which images, and what is stored of its answers."""

    name: Name
    data: Data
    teacher: TeacherNetwork
    views: Views = NoAugmentation()
    capture: Capture = Capture()

    @property
    def evaluation_crop(self) -> EvaluationCrop | None:
        """How the student sees images of different sizes when it is evaluated; None: as they are, all of one size."""
        return self.data.crop or self.views.evaluation_crop


class Recipe(CaptureRecipe):
    """An experiment: what is captured, and which students learn from it, how."""

    store: str | Annotated[list[TeacherStore], Field(min_length=1)] | None = Field(
        None, description="where stage 2 finds targets, unless --store says so; several are mixed by weight"
    )
    mix: Literal["probability", "logit"] = Field("probability", description="what is averaged over several teachers")
    student: StudentNetwork
    training: Training
    objectives: dict[Name, Objective] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)

    def decisions_of(self, term: KDLayerTerm) -> AnyDecisions:
        """The decisions that a term is about; raises RecipeError when there are none of that name or kind."""
        known = self.capture.decisions
        if term.decisions not in known:
            raise RecipeError(
                f"recipe '{self.name}': term '{term.term}' asks for decisions '{term.decisions}', which are not in "
                f"capture.decisions.{did_you_mean(term.decisions, known)}"
            )
        config = known[term.decisions]
        if config.kind != term.kind:
            raise RecipeError(
                f"recipe '{self.name}': term '{term.term}' cannot use decisions '{term.decisions}' of kind "
                f"'{config.kind}'."
            )
        return config

    def objective(self, name: str | None) -> tuple[str, list[AnyTerm]]:
        """The objective of that name, or the only one."""
        if name is None and len(self.objectives) == 1:
            name = next(iter(self.objectives))
        if name is None:
            raise RecipeError(
                f"recipe '{self.name}' has several objectives: pick one with --objective: {', '.join(self.objectives)}"
            )
        if name not in self.objectives:
            raise RecipeError(f"recipe '{self.name}' has no objective '{name}'.{did_you_mean(name, self.objectives)}")
        return name, self.objectives[name]


def kd_layer_terms(terms: Sequence[AnyTerm]) -> list[KDLayerTerm]:
    """The terms that put a KD layer into the student."""
    return [term for term in terms if isinstance(term, KDLayerTerm)]


def needs_teacher(terms: Sequence[AnyTerm]) -> bool:
    return any(term.needs.logits or term.needs.decisions for term in terms)


def parse_codec(text: str) -> AnyCodec:
    """A codec as recipes write it; raises RecipeError."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"codec {text}: not readable as YAML") from error
    chosen = parse(Capture, {"codec": content}, where=f"codec {text}").codec
    if isinstance(chosen, AutoCodec):
        raise RecipeError(f"codec {text}: name one, such as '{{name: int, bits: 4}}'.")
    return chosen


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with what it extends and `path.to.field=value` overrides; raises RecipeError."""
    content = _read(path, ())
    for override in overrides:
        _override(content, override)
    recipe = parse(Recipe, content, where=str(path))
    for terms in recipe.objectives.values():
        for term in kd_layer_terms(terms):
            recipe.decisions_of(term)  # a wrong name should not wait until its turn comes
    return recipe


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe{f' (extended by {seen[-1]})' if seen else ''}.")
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends itself, through {' -> '.join(str(step) for step in seen)}.")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, this is a {type(content).__name__}.")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    return _merge(_read(path.parent / str(parent), (*seen, path.resolve())), content)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            # Another kind of schedule, optimizer, codec or view starts afresh: the old one's fields are not its own.
            other_kind = any(tag in value and value[tag] != old.get(tag) for tag in ("name", "kind"))
            merged[name] = value if other_kind else _merge(old, value)
        else:
            merged[name] = value
    return merged


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: write path.to.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not readable as YAML") from error
    *parents, last = path.split(".")
    node: Any = content
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) and parent.isdigit() else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {override}: '{parent}' has no fields, it is {node!r}")
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise RecipeError(f"--set {override}: '{last}' is no position in a list of {len(node)}")
        node[int(last)] = value
    else:
        node[last] = value


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True)
