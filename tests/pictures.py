"""Made-up photographs, and recipes on them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from conftest import make_recipe
from PIL import Image

from offline_kd.data.manifest import Dataset, Manifest, Split
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample
from offline_kd.models.networks import build
from offline_kd.recipe import Recipe
from offline_kd.views.augment import ColorJitter, RandAugment
from offline_kd.views.erase import Erase
from offline_kd.views.mixing import Mixing
from offline_kd.views.random_resized_crop import RandomCrop

EVERYTHING = RandomCrop(
    kind="random_resized_crop",
    size=32,
    augment=RandAugment(kind="randaugment", num_ops=2, magnitude=0.5, magnitude_std=0.1),
    jitter=ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
    erase=Erase(probability=0.5, fill="noise"),
    mixing=Mixing(mixup=0.8, cutmix=1.0, probability=0.7),
    count=4,
)

NUM = 90


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """Smooth shapes and some texture, which resampling and JPEG treat as they treat photographs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 5) * x + rng.uniform(1, 5) * y + rng.random())) for _ in range(3)]
    noise = rng.normal(0, 0.1, (height, width, 3))
    return Image.fromarray(((np.stack(waves, -1) / 2.4 + 0.5 + noise) * 255).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_samples() -> list[Sample]:
    rng = np.random.default_rng(7)
    samples = []
    for index in range(NUM):
        image = photograph(index, *rng.integers(30, 90, 2).tolist())
        samples.append(Sample(f"{index:04d}", index % 3, encoded(image, "JPEG", quality=90), "jpg"))
    return samples


def views_of(**changes: object) -> dict:
    return EVERYTHING.model_copy(update={"count": 2, "size": 16, **changes}).model_dump(mode="json")


def photographs(
    folder: Path, samples: list[Sample], classes: Sequence[str] = "abc", per_tar: int = 40, **changes: object
) -> tuple[Recipe, Manifest]:
    """A recipe on 40 + 40 + 10 photographs, with a teacher that sees 24 pixels where the student sees 16."""
    tars = pack(samples, folder / "photos", "train", per_tar)
    dataset = Dataset(folder="photos", classes=list(classes), splits={"train": Split(tars=tars)})
    manifest = Manifest(datasets={"photos": dataset})
    weights = folder / "teacher.pt"
    if not weights.is_file():
        torch.manual_seed(0)
        torch.save(build("cifar:resnet8", len(classes)).state_dict(), weights)
    about = {"views": views_of(), "data": {}, "capture": {}} | changes
    recipe = make_recipe(
        data={"dataset": "photos", "evaluation": "train"} | about["data"],
        teacher={
            "model": "cifar:resnet8",
            "weights": str(weights),
            "training": None,
            "crop": {"size": 24, "resize": 28},
        },
        capture={"views_per_group": None, "fidelity_rows": 50} | about["capture"],
        training={"batch_size": 16},
    )
    chosen = {"views": about["views"], "student": {"model": "cifar:resnet8"}}
    return Recipe.model_validate(recipe.model_dump() | chosen), manifest


def command_line(folder: Path, recipe: Recipe, manifest: Manifest) -> tuple[Path, list[str]]:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest.model_dump(mode="json", exclude_none=True)))
    return file, ["--manifest", str(folder / "manifest.yaml"), "--data-root", str(folder)]
