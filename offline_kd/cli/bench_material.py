"""What `bench` works on: the first batches of a recipe's dataset and a small capture of them, in a temporary folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.fetching import Root
from offline_kd.data.labels import labels_of, need_one_label
from offline_kd.data.manifest import Dataset, Manifest, Split, folders_of, locate
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample, read_tar
from offline_kd.models.networks import build
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import AnyTerm, AutoCodec, Capture, Recipe
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.reader import Store
from offline_kd.support.console import say
from offline_kd.support.errors import RecipeError, shorten
from offline_kd.support.strict import parse
from offline_kd.support.strict_yaml import parse_yaml

BENCH_TARS = 4  # so that what is done for one block while another is worked on shows


@dataclass(frozen=True)
class Bench:
    """A small capture of a recipe, and what it was made from."""

    recipe: Recipe
    terms: Sequence[AnyTerm]
    manifest: Manifest
    roots: Sequence[Root]
    images: BlockLoader
    teacher: Teacher
    store: Store
    folder: Path
    device: torch.device

    @property
    def batches(self) -> float:
        """How many batches all images are, shown once."""
        return self.images.split.count / self.recipe.training.batch_size

    @property
    def batches_of_pass(self) -> float:
        """How many batches a pass of training shows."""
        return self.batches * self.recipe.training.views_per_decode


def small_recipe(
    recipe: Recipe, manifest: Manifest, roots: Sequence[Root], folder: Path, sizes: tuple[int, int]
) -> tuple[Recipe, Manifest]:
    """The recipe on some of its dataset, packed anew into `folder`; the teacher's gate is left out.

    A teacher that is still to be trained gets random weights: that it knows nothing changes no time.

    Args:
        sizes: how many batches of images, and how many views of each at most.
    """
    steps, most_views = sizes
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    need_one_label(split.labels, f"{recipe.data.dataset}/{recipe.data.train}", "this benchmark")
    samples = _first_samples(dataset, split, roots, steps * recipe.training.batch_size)
    tars = pack(samples, folder / "bench", "all", -(-len(samples) // BENCH_TARS))
    small = Dataset(folder="bench", classes=dataset.classes, splits={"all": Split(tars=tars)})
    ungated = {name: teacher.model_copy(update={"expected": None}) for name, teacher in manifest.teachers.items()}
    changes = {"dataset": "bench", "train": "all", "evaluation": "all", "tars": None, "keep_bytes": 2**30}
    teacher = recipe.teacher.model_copy(update={"expected": None})
    if teacher.is_to_be_trained and teacher.model is not None:
        say("bench: the teacher of this recipe is still to be trained: it gets random weights, which are as fast")
        weights = folder / "teacher.safetensors"
        network = build(teacher.model, len(dataset.classes), teacher.model_args)
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, weights)
        teacher = teacher.model_copy(update={"weights": str(weights), "head": None})
    return (
        recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update=changes),
                "views": recipe.views.with_count(min(most_views, recipe.views.num_views)),
                "capture": recipe.capture.model_copy(update={"views_per_group": None}),
                "teacher": teacher,
            }
        ),
        manifest.model_copy(update={"datasets": {"bench": small}, "teachers": ungated}),
    )


def _first_samples(dataset: Dataset, split: Split, roots: Sequence[Root], wanted: int) -> list[Sample]:
    """The first ones of a split, or all of it."""
    samples: list[Sample] = []
    folders, labels = folders_of(dataset, roots), labels_of(split.labels, dataset.classes)
    for tar in split.tars:
        if len(samples) < wanted:
            some, _ = read_tar(locate(tar.file, folders), labels=labels)
            samples += some[: wanted - len(samples)]
    return samples


def parse_codec(text: str) -> AnyCodec:
    """A codec as recipes write it; raises RecipeError."""
    about = f"codec {shorten(text, 100)}"
    chosen = parse(Capture, {"codec": parse_yaml(text, where=about)}, where=about).codec
    if isinstance(chosen, AutoCodec):
        raise RecipeError(f"{about}: name one, such as '{{name: int, bits: 4}}'.")
    return chosen
