"""Images that a student is measured on, for loops of one's own: `(images, labels)` without augmentation."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from offline_kd.cache.in_memory import dataset_of
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.fetching import is_url, root_at
from offline_kd.data.label_sets import label_tensor, unpack_sets
from offline_kd.data.labels import need_labels
from offline_kd.data.manifest import EvaluationCrop, Manifest, Normalisation, data_roots
from offline_kd.models.networks import normalise
from offline_kd.support.errors import RecipeError
from offline_kd.views.render import plain_images


@dataclass(eq=False)
class EvaluationBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Every image of a split once, in the order of its tars; a batch ends where its tar does.

    Batches are images `[B, 3, H, W]` float32, the input of a network, and labels `[B]` int64; of sets
    `[B, C]` float32, 1 for a class of the image.
    """

    images: BlockLoader
    batch_size: int
    device: torch.device
    normalisation: Normalisation
    crop: EvaluationCrop | None = None  # of images of different sizes; None: they are taken as they are

    def __len__(self) -> int:
        return sum(-(-tar.count // self.batch_size) for tar in self.images.split.tars)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for block in self.images:
                for start in range(0, len(block), self.batch_size):
                    pixels, rows = plain_images(block, self.crop, start, start + self.batch_size, threads)
                    labels = label_tensor(block.labels[rows])
                    if labels.dim() == 2:
                        labels = unpack_sets(labels, len(self.images.dataset.classes))
                    yield normalise(pixels.to(self.device), self.normalisation), labels.to(self.device)


def images_to_evaluate(images: str | Path, data: str | Path | None, manifest: Manifest, decode: bool) -> BlockLoader:
    """The images of `api.evaluation_loader`, whose first two arguments these are.

    Args:
        decode: they all have one size.
    """
    if is_url(images) or Path(images).is_dir():
        folder = root_at(images)
        folder = folder.resolve() if isinstance(folder, Path) else folder
        dataset = dataset_of(folder, None)
        roots = [folder.parent] if isinstance(folder, Path) else [folder]
        return BlockLoader(dataset, dataset.splits["train"], roots, decode=decode)
    name, _, part = str(images).rpartition("/")
    if not name:
        raise RecipeError(
            f"'{images}': no such folder. To evaluate, name a folder of tars, or DATASET/SPLIT of the manifest."
        )
    dataset, split = manifest.dataset(name), manifest.split(name, part)
    need_labels(split.labels, f"{name}/{part}", "evaluation")
    if data is None:
        return BlockLoader(dataset, split, data_roots(), decode=decode)
    return BlockLoader(dataset.model_copy(update={"folder": "."}), split, [root_at(data)], decode=decode)
