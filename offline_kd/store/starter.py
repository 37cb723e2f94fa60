"""A recipe to begin with: what a store was made from, and a student that learns from it."""

import re
from collections.abc import Sequence

import yaml

from offline_kd.data.manifest import Tar
from offline_kd.objectives.kd import KD
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.decisions import TemplateDecisions
from offline_kd.store.identity import TeacherIdentity
from offline_kd.store.reader import Store
from offline_kd.store.schema import Held, StoreIdentity, StoreManifest
from offline_kd.support.console import printable

COMMAND = "offline-kd distill THIS_FOLDER/recipe.yaml --store THIS_FOLDER --out RUN"
SMALL, TINY = 64, 16  # sides in pixels up to which a network of the CIFAR papers is right, and the smallest of them
TEMPERATURES = (4.0, 2.0, 1.0)


def starter_recipe(store: Store, manifest: StoreManifest) -> str:
    """As YAML, a recipe that trains from what is stored: its data, views, codec and decisions; one objective.

    Where the weights of the teacher are is not known. It names them by none, and a run compares model, arguments and
    normalisation.
    """
    identity, held = store.identity, manifest.held
    dataset, teacher = identity.dataset, identity.teacher
    evaluation = teacher.evaluated_on.removeprefix(f"{dataset.name}/")
    evaluation = teacher.imported.evaluation if teacher.imported else evaluation
    blocks = range(len(dataset.tars)) if held is None else range(held.first_block, held.end_block)
    samples = sum(dataset.tars[block].count for block in blocks)
    data = {
        "dataset": dataset.name,
        "train": dataset.split,
        "evaluation": evaluation,
        "normalisation": teacher.normalisation.model_dump(mode="json"),
        "tars": _numbers(dataset.tars, blocks),
    }
    decisions = identity.decisions if held is None or held.has("decisions/") else {}
    of = identity.codec.of_features  # described wherever the codec is
    features = {name: one for name, one in identity.features.items() if not held or held.has("features/") or name == of}
    capture = {
        "codec": identity.codec.model_dump(mode="json"),
        "decisions": {name: one.config.model_dump(mode="json") for name, one in decisions.items()} or None,
        "features": {name: one.config.model_dump(mode="json") for name, one in features.items()} or None,
        "views_per_group": identity.views_per_group,
    }
    small = _side(identity) <= SMALL
    training = {
        "epochs": 60,
        "batch_size": max(2, min(128, samples // 4)),
        "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 5.0e-4},
        "schedule": {"name": "cosine", "warmup_epochs": 2},
    }
    recipe = {
        "name": re.sub(r"[^0-9A-Za-z_-]+", "-", identity.name)[:100] or "store",
        "data": data,
        "teacher": _teacher(teacher),
        "views": identity.views.model_dump(mode="json"),
        "capture": capture,
        "student": {"model": f"cifar:resnet{8 if _side(identity) < TINY else 20}" if small else "torchvision:resnet18"},
        "training": training,
        "objectives": _objectives(identity, held),
    }
    comment = [
        f"# Trains a student from the store '{printable(identity.name)}':",
        f"#   {COMMAND}",
        "# Model, epochs and rate of the student are a beginning: choose your own.",
    ]
    text = yaml.safe_dump(
        _without_none(recipe), sort_keys=False, allow_unicode=True, width=float("inf"), default_flow_style=None
    )
    return "\n".join([*comment, text])


def _teacher(teacher: TeacherIdentity) -> dict[str, object]:
    return {
        "model": teacher.model,
        "model_args": teacher.model_args or None,
        "kind": None if teacher.kind == "classifier" else teacher.kind,
        "normalisation": teacher.normalisation.model_dump(mode="json"),
        "crop": teacher.crop.model_dump(mode="json") if teacher.crop else None,
        "dtype": teacher.dtype,
        "licence": teacher.licence or None,
    }


def _numbers(tars: Sequence[Tar], blocks: range) -> list[int] | None:
    """The numbers of a part of the dataset's tars; None for all.

    A store does not know which tars there are beside its own: the numbers are those in their names, if they have any.
    """
    found = [re.search(r"(\d+)\D*$", tar.file) for tar in tars]
    numbers = [int(one[1]) for one in found if one]
    ordered = len(numbers) == len(tars) and numbers == sorted(set(numbers)) and numbers != [*range(1, len(tars) + 1)]
    named = numbers if ordered else list(range(len(tars)))
    some = [named[block] for block in blocks]
    return None if some == list(range(len(tars))) else some


def _side(identity: StoreIdentity) -> int:
    """Of what a student sees."""
    return identity.views.output_size or max(identity.seen_size)


def _objectives(identity: StoreIdentity, held: Held | None) -> dict[str, list[dict[str, object]]]:
    """KD at a temperature that the codec serves; of a copy without logits, letKD's on its decisions.

    Of a teacher without classes, its first features.
    """
    if identity.teacher.kind == "embedding":
        return {"embedding": [{"term": "embedding", "features": name} for name in list(identity.features)[:1]]}
    labelled = identity.dataset.labels != "none"
    if identity.teacher.kind == "multilabel":
        if held is not None and not held.has("logits/"):
            return {"bce": [{"term": "bce"}]}
        bce: list[dict[str, object]] = [{"term": "bce"}] if labelled else []
        return {"binary_kd": [*bce, {"term": "binary_kd", "temperature": 2.0}]}
    ce: list[dict[str, object]] = [{"term": "ce"}] if labelled else []
    if held is None or held.has("logits/"):
        kd: dict[str, object] = {"term": "kd", "temperature": _temperature(identity.codec)}
        return {"kd": [{"term": "ce", "weight": 0.1}, kd | {"weight": 0.9}] if labelled else [kd]}
    for name, one in identity.decisions.items():
        if held.has("decisions/") and isinstance(one.config, TemplateDecisions):
            return {"letkd": [*ce, {"term": "decisions", "decisions": name}]}
    return {"ce": ce}


def _temperature(codec: AnyCodec) -> float:
    """The first that the codec serves without bias."""
    return next((t for t in TEMPERATURES if not codec.serves(KD(term="kd", temperature=t).needs)), 1.0)


def _without_none(content: object) -> object:
    if isinstance(content, dict):
        return {name: _without_none(value) for name, value in content.items() if value is not None}
    return content
