"""Recipes: one YAML file per experiment, read into the frozen description below.

`extends: other.yaml` starts from another recipe (relative to the file); mappings are merged, everything else replaced.
`--set path.to.field=value` overrides any field last. Where no file has a name, it is that of a recipe that comes with
the package (`digits`, `extends: cifar10/base`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, Union

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from offline_kd.data.manifest import EvaluationCrop
from offline_kd.data_recipe import Data
from offline_kd.network_recipe import StudentNetwork, TeacherNetwork
from offline_kd.objectives import OBJECTIVES, example_terms
from offline_kd.objectives.decisions import KDLayerTerm
from offline_kd.objectives.features import FeatureTerm
from offline_kd.objectives.term import Positive, Term
from offline_kd.recipe_content import keys_beside, with_classes, with_subset, with_value
from offline_kd.report_recipe import Name, Published
from offline_kd.store.codecs import CODEC_TABLES, AnyCodec
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.decisions import AnyDecisions, DecisionsConfig
from offline_kd.store.features import WantedFeatures, that_fit
from offline_kd.support.errors import RecipeError, did_you_mean, shorten
from offline_kd.support.packaged import recipe_file
from offline_kd.support.strict import Count, Seed, Strict, parse
from offline_kd.support.strict_yaml import parse_yaml, read_yaml
from offline_kd.teacher_kinds import refuse_capture, refuse_terms
from offline_kd.training_recipe import Training, is_unused
from offline_kd.views import Views
from offline_kd.views.none import NoAugmentation

if TYPE_CHECKING:
    AnyTerm = Term
else:
    AnyTerm = Annotated[Union[tuple(OBJECTIVES.values())], Field(discriminator="term")]  # noqa: UP007
Objective = Annotated[list[AnyTerm], Field(min_length=1)]
LOOK_AT_LOGITS = {name for name, term in example_terms().items() if term.needs.logits}


class GradientBudget(Strict):
    """What a codec may change of an objective's gradient on a student's logits.

    Recipes write the objective's fields beside it: `{objective: kd, temperature: 4, change: .1}`.
    """

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})  # as recipes write it

    objective: Annotated[AnyTerm, WithJsonSchema({"enum": sorted(LOOK_AT_LOGITS)})] = Field(
        description="a term that looks at the teacher's logits, whose fields stand beside it"
    )
    change: float = Field(gt=0, lt=1, description="length of the difference, relative to the gradient")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: object) -> object:
        if not isinstance(content, dict) or not isinstance(content.get("objective"), str):
            return content
        own = {name: content[name] for name in ("change", "term") if name in content}  # a `term` is refused
        fields = {name: value for name, value in content.items() if name not in ("objective", *own)}
        return {"objective": {"term": content["objective"], **fields}, **own}

    @field_validator("objective")
    @classmethod
    def _looks_at_logits(cls, objective: AnyTerm) -> AnyTerm:
        if not objective.needs.logits:
            raise ValueError(
                f"'{objective.term}' does not look at the teacher's logits: name one that does, such as kd"
            )
        return objective

    @model_serializer
    def _spread(self) -> dict[str, object]:
        fields = self.objective.model_dump(mode="json", exclude={"term"}, exclude_unset=True)
        return {"objective": self.objective.term, **fields, "change": self.change}


def _kind_of_budget(content: object) -> str:
    return "gradient" if isinstance(content, dict | GradientBudget) else "number"


class AutoCodec(Strict):
    """The smallest codec that loses no more than the budget on views of some images.

    A number is about the total variation at the worst of T = 1, 2, 4; of a multi-label teacher, about the mean absolute
    error of a class's probability.
    """

    name: Literal["auto"]
    error_budget: Annotated[
        Annotated[float, Field(gt=0, lt=1), Tag("number")] | Annotated[GradientBudget, Tag("gradient")],
        Discriminator(_kind_of_budget),
    ] = Field(0.01, description="largest total variation, or how much an objective's gradient may change")


class Capture(Strict):
    """How stage 1 stores the teacher's targets."""

    @field_validator("decisions")
    @classmethod
    def _name_is_free(cls, decisions: dict[str, object]) -> dict[str, object]:
        if CODEC_TABLES in decisions:
            raise ValueError(f"'{CODEC_TABLES}' is what the tables of codecs are called: use another name")
        return decisions

    codec: Annotated[AnyCodec | AutoCodec, Field(discriminator="name")] = Field(
        Float16(name="f16"), description="how logits are stored"
    )
    decisions: dict[Name, DecisionsConfig] = Field({}, description="decisions on feature maps, by a name of your own")
    features: Annotated[dict[Name, WantedFeatures], AfterValidator(that_fit), Field(validate_default=True)] = Field(
        {}, exclude_if=lambda features: not features, description="features themselves, by a name of your own"
    )
    views_per_group: Count | None = Field(None, description="views stored and read together; must divide the count")
    batch_size: Count | Literal["auto"] = Field(
        "auto",
        exclude_if=lambda size: size == "auto",
        description="of the teacher; no effect on what is stored. auto: the fastest on a GPU, by trial; 64 on a CPU",
    )
    fidelity_rows: Count = Field(
        1000, description="rows on which the teacher is asked again to finish a store; one of each block at least"
    )


class TeacherStore(Strict):
    """One of several stores, or of several teachers of one store, that a student learns from."""

    store: str = Field(description="folder, URL or manifest name; `#TARGETS` and `@sha256:DIGEST` may follow")
    weight: Positive = Field(1.0, description="how much it counts beside the others; their sum is made 1")
    signed_by: str | None = Field(None, description="public key whose signature it must have; beside the recipe")


class CaptureRecipe(Strict):
    """What stage 1 needs to know: which teacher sees which views of which images, and what is stored of its answers."""

    name: Name = Field(description="of the experiment; `run` writes runs/NAME")
    data: Data = Field(description="which images")
    teacher: TeacherNetwork = Field(description="who is asked")
    views: Views = Field(NoAugmentation(), description="which augmented views teacher and students see")
    capture: Capture = Field(Capture(), description="what is stored of the teacher's answers")

    @model_validator(mode="before")
    @classmethod
    def _embeddings_have_no_codec(cls, content: object) -> object:
        """Of a teacher without classes `capture.codec` is `none` where nothing is said."""
        if not isinstance(content, dict):
            return content
        teacher, capture = content.get("teacher"), content.get("capture") or {}
        if isinstance(teacher, dict) and teacher.get("kind") == "embedding" and isinstance(capture, dict):
            return {**content, "capture": {"codec": {"name": "none"}, **capture}}
        return content

    @model_validator(mode="after")
    def _trains_on_rows_alone(self) -> Self:
        if self.views.mixes and (self.data.subset is not None or self.data.validation is not None):
            raise ValueError(
                "data.subset and data.validation: these views mix images (`mixing`), so that those left out would be "
                "seen in the views of others. Leave out one of the two"
            )
        if self.views.mixes and self.data.labelled_fraction < 1:
            raise ValueError(
                "data.labelled_fraction: these views mix images (`mixing`), so that labels which are to be hidden "
                "would be seen with the views of others. Leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _kind_of_teacher_fits(self) -> Self:
        refuse_capture(self.teacher.kind, self.capture.codec, self.capture.decisions, self.capture.features)
        return self

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
    student: StudentNetwork = Field(description="who learns")
    training: Training = Field(description="how students are trained")
    objectives: dict[Name, Objective] = Field(
        min_length=1, description="what students minimise: sums of terms, each by a name of your own"
    )
    seeds: list[Seed] = Field([0], min_length=1, description="a student of every objective for each")
    published: Published | None = Field(None, exclude_if=is_unused, description="for the report; changes no student")
    sweep: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = Field(
        {},
        exclude_if=lambda sweep: not sweep,
        description="values by path of a field: `run` trains students with every combination of them; "
        "`{training.optimizer.lr: [0.05, 0.1]}`",
    )

    def without_sweep(self) -> "Recipe":
        """As one network is trained of it, which is the same run whatever `run` sweeps."""
        return self.model_copy(update={"sweep": {}})

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

    def features_of(self, term: FeatureTerm) -> WantedFeatures:
        """The features that a term is about; raises RecipeError when there are none of that name."""
        known = self.capture.features
        if term.features not in known:
            raise RecipeError(
                f"recipe '{self.name}': term '{term.term}' asks for features '{term.features}', which are not in "
                f"capture.features.{did_you_mean(term.features, known)}"
            )
        return known[term.features]

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


def feature_terms(terms: Sequence[AnyTerm]) -> list[FeatureTerm]:
    """The terms that compare features of the student with the teacher's."""
    return [term for term in terms if isinstance(term, FeatureTerm)]


def needs_teacher(terms: Sequence[AnyTerm]) -> bool:
    return any(term.needs.logits or term.needs.decisions or term.needs.features for term in terms)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with what it extends and `path.to.field=value` overrides; raises RecipeError.

    Args:
        path: of a file; where there is none, the name of a packaged recipe.
    """
    content = _read(recipe_file(path), ())
    for override in overrides:
        content = _overridden(content, override)
    recipe = recipe_of(with_subset(with_classes(content, Path()), Path()), str(path))
    if isinstance(subset := recipe.data.subset, str) and not os.path.isfile(subset):
        raise RecipeError(f"data.subset: {shorten(subset)}: no such file. Name one that has a key in every line.")
    return recipe


def read_recipe(content: bytes, where: str) -> Recipe:
    """What `dump_recipe` wrote, wherever it lies; raises RecipeError."""
    try:
        return recipe_of(parse_yaml(content.decode(), where=where), where)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not readable as YAML: {error}") from error


def recipe_of(content: object, where: str) -> Recipe:
    """What was read at `where`, checked as a whole; raises RecipeError."""
    recipe = parse(Recipe, content, where=where)
    for name, terms in recipe.objectives.items():
        refuse_terms(recipe.teacher.kind, terms, f"recipe '{recipe.name}': objective '{name}'")
        for term in kd_layer_terms(terms):
            recipe.decisions_of(term)  # a wrong name should not wait until its turn comes
        for one in feature_terms(terms):
            recipe.features_of(one)
    return recipe


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, object]:
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends itself, through {' -> '.join(str(step) for step in seen)}.")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, this is a {type(content).__name__}.")
    keys_beside(path, content)
    content = with_subset(with_classes(content, path.parent), path.parent)
    parent = content.pop("extends", None)
    if parent is None:
        return content
    base = recipe_file(path.parent / str(parent), str(parent), path)
    return _merge(_read(base, (*seen, path.resolve())), content)


def _merge(base: dict[str, object], over: dict[str, object]) -> dict[str, object]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            # Another kind of schedule, optimizer, codec, view or budget starts afresh, without the old one's fields.
            # That of a teacher is one field of it among others.
            tags = () if name == "teacher" else ("name", "kind", "objective")
            other_kind = any(tag in value and value[tag] != old.get(tag) for tag in tags)
            merged[name] = value if other_kind else _merge(old, value)
        else:
            merged[name] = value
    return merged


def _overridden(content: dict[str, object], override: str) -> dict[str, object]:
    """`content` with one `path.to.field=value`."""
    path, equals, text = override.partition("=")
    about = f"--set {shorten(override, 100)}"
    if not equals:
        raise RecipeError(f"{about}: write path.to.field=value")
    return with_value(content, path, parse_yaml(text, where=about), about)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True)
