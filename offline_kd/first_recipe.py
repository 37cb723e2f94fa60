"""A first recipe for somebody's own pictures: what every setting follows from stands beside it."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import yaml

from offline_kd.data.folders import Photos, Picture, evaluation_split
from offline_kd.data.manifest import EvaluationCrop, Normalisation
from offline_kd.first_plan import (
    EPOCHS,
    MANY,
    TEACHER_EPOCHS,
    Plan,
    Start,
    batch_size_for,
    decoding_for,
    one_size,
    plan,
    seconds_of_all,
    short_side,
    train_of,
)
from offline_kd.support.console import counted, printable
from offline_kd.views.random_resized_crop import RandomCrop

# Not mobilenet_v3_small: the running statistics of its BatchNorm take 300 steps to forget what they began with.
STUDENT, SMALL_STUDENT = "torchvision:shufflenet_v2_x1_0", "cifar:resnet20"
FEW_CLASSES = 100  # for which 16 bits each are not much
OF_IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class FirstRecipe:
    """YAML, and about how long a run of it takes."""

    text: str
    minutes: float


def first_recipe(
    name: str, photos: Photos, start: Start, student: str | None, minutes: int, device: torch.device
) -> FirstRecipe:
    """The recipe `name` for a dataset of that name.

    Args:
        student: its network; by default a small one.
        minutes: how long it may take on this machine.

    Raises ModelError for networks that do not take pictures of these sizes.
    """
    train, evaluation = train_of(photos), evaluation_split(photos.splits) or train_of(photos)
    pictures, known = photos.splits[train], start.sees
    network = student or (SMALL_STUDENT if one_size(pictures) else STUDENT)
    seconds, sizes = seconds_of_all(start, network, photos, device)
    chosen = plan(seconds, len(pictures), len(photos.splits[evaluation]), sizes, 60 * minutes)
    counts = ", ".join(f"{part} {len(those):,}" for part, those in photos.splits.items())
    machine = "a GPU" if device.type == "cuda" else f"{os.cpu_count()} cores"
    workers = min((os.cpu_count() or 1) // 2, 8)
    text = f"""\
# Written by `offline-kd init` for pictures of {counted(len(photos.classes), "classes")} ({printable(counts)}).
# Every line may be changed.
#
#   command    offline-kd run recipe.yaml        teacher, store, students and report, in runs/{name}
#   time       about {max(round(chosen.seconds / 60), 1)} min with {machine}, by a few pictures that were timed here
name: {_text(name)}
data:
  dataset: {_text(name)}  # its tars are named in data_manifest.yaml, and lie in data/{name}{_packed(photos)}
  train: {_text(train)}
  evaluation: {_text(evaluation)}  # measured on, never learned from
  normalisation: {_flow(known.normalisation if known else OF_IMAGENET)}  # {"the teacher's" if known else "ImageNet's"}
  workers: {workers if workers > 1 else 0}  # processes that read pictures; 0: this one, where there are few cores
{_views(pictures, chosen, sizes, minutes)}
capture:
  codec: {_codec(len(photos.classes))}
teacher:
  model: {_text(start.model)}  # {printable(start.why)}
{_teacher(start, pictures, chosen, device)}\
student:
  model: {_text(network)}  # {"as asked for" if student else "small; any cifar:, torchvision: or timm: network"}
{_student(network)}training:  # of every student
  epochs: {EPOCHS * chosen.rounds}  # every stored view is shown {EPOCHS} times
{_training(pictures, device, "1.0e-3", "from nothing")}\
objectives:  # one student each; all are served by one store, so adding one asks the teacher nothing
  kd: [{{term: ce, weight: 0.1}}, {{term: kd, weight: 0.9, temperature: 4}}]
  ce: [{{term: ce}}]  # from labels only: what kd has to beat
  # dist: [{{term: ce}}, {{term: dist, beta: 1, gamma: 1, temperature: 4}}]
  # wttm: [{{term: ce}}, {{term: wttm, weight: 4, gamma: 0.3}}]
seeds: [0]  # more of them say how far results are luck: [0, 1, 2]
"""
    return FirstRecipe(text, chosen.seconds / 60)


def _packed(photos: Photos) -> str:
    """A remark on pictures that are packed smaller than they were."""
    sides = {one.side for those in photos.splits.values() for one in those if one.side is not None}
    return "".join(f"; of larger pictures with {side:,} pixels on the shorter side" for side in sides)


def _views(pictures: Sequence[Picture], chosen: Plan, sizes: Sequence[int], minutes: int) -> str:
    side = one_size(pictures)
    if side:
        padding = max(side // 8, 1)
        return f"""\
views:
  kind: pad_crop_flip  # all pictures have one small size: they are shifted and mirrored, not resampled
  padding: {padding}
  flip: true  # false where left and right matter: digits, letters
  count: {min(chosen.rounds, 2 * (2 * padding + 1) ** 2)}  # views of every picture that the teacher is asked about"""
    why = f"the largest that --minutes {minutes} has time for"
    if chosen.seconds > 60 * minutes:
        why = f"the smallest, and still more than --minutes {minutes}"
    elif chosen.size == sizes[0]:
        why = "as large as pictures and networks ask for"
    augment = "augment: {kind: trivialaugment}  # one random change of colour or shape"
    few = f"# {augment}, for more than {MANY} epochs"
    return f"""\
views:
  kind: random_resized_crop  # a random part of every picture, resampled to one size
  size: {chosen.size}  # pixels; {why}: half of the pictures have {short_side(pictures):,} on their short side
  scale: [0.25, 1.0]  # share of the picture that a view shows
  flip: 0.5  # 0 where left and right matter: digits, letters, signs
  decoding: {decoding_for(pictures, chosen.size)}  # scaled: JPEGs much larger than views are decoded smaller
  {augment if EPOCHS * chosen.rounds > MANY else few}
  count: {chosen.rounds}  # views of every picture that the teacher is asked about"""


def _codec(classes: int) -> str:
    if classes <= FEW_CLASSES:
        return f"{{name: f16}}  # {2 * classes} bytes a view: nothing to save"
    return "{name: auto, error_budget: 0.01}  # the smallest that changes probabilities by 1 % at most"


def _teacher(start: Start, pictures: Sequence[Picture], chosen: Plan, device: torch.device) -> str:
    text = ""
    if start.weights is not None:
        text += f"  weights: {_text(start.weights)}\n"
    elif start.warning:
        text += "  # weights: pretrained  # or a file, and head: new: better than nothing with so few pictures\n"
    if not start.trains:
        return text + "  # normalisation and crop: add them where it learned with others than its library's\n"
    if start.new_head:
        text += "  head: new  # as many outputs as there are classes\n"
    normalisation = start.sees.normalisation if start.sees else OF_IMAGENET
    text += f"  normalisation: {_flow(normalisation)}\n"
    if one_size(pictures) is None:
        crop = RandomCrop(kind="random_resized_crop", size=chosen.size, count=1).evaluation_crop
        why = "the size at which it learns, and is asked"
        if start.head_alone and start.sees:
            crop, why = start.sees.crop, "the size of what it knows: it learns and is asked there, students see less"
        text += f"  crop: {_flow(crop)}  # {why}\n"
    rate, why = ("2.0e-4", "small, for what it knows already") if start.new_head else ("1.0e-3", "from nothing")
    alone = ""
    if start.head_alone:
        rate, why = "1.0e-3", "of a last layer"
        alone = "    train: head  # with so few pictures what it knows stays; all: everything learns (lr: 2.0e-4)\n"
    training = _training(pictures, device, rate, why).replace("\n  ", "\n    ")
    return f"{text}  training:\n    epochs: {TEACHER_EPOCHS * chosen.rounds}\n{alone}  {training}"


def _student(network: str) -> str:
    """How a student begins from what its library learned, which few pictures cannot teach it."""
    if not network.startswith(("timm:", "torchvision:")):
        return ""
    return "  # weights: pretrained  # begins with what its library has learned, where there is a network\n"


def _training(pictures: Sequence[Picture], device: torch.device, rate: str, why: str) -> str:
    amp = "  amp: true  # bfloat16, for which GPUs have units of their own\n" if device.type == "cuda" else ""
    size = batch_size_for(len(pictures))
    return f"""\
  batch_size: {size}  # {counted(math.ceil(len(pictures) / size), "steps")} an epoch
{amp}  optimizer: {{name: adamw, lr: {rate}}}  # {why}
  schedule: {{name: cosine, warmup_epochs: 1}}
"""


def _text(value: str) -> str:
    """As YAML has it: in quotes where it would be read as something else."""
    plain = re.fullmatch(r"[A-Za-z][0-9A-Za-z_:./\-]*", value) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def _flow(about: Normalisation | EvaluationCrop) -> str:
    """As YAML has it in one line; JSON is YAML."""
    return json.dumps(about.model_dump(mode="json")).replace('"', "")
