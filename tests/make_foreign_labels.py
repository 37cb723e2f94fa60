"""Run the writers of FKD, ml-dr and TinyViT on a few pictures: makes `tests/fixtures/foreign`.

    python tests/make_foreign_labels.py FKD_CLONE ML_DR_CLONE CREAM_CLONE

The clones are those of szq0214/FKD, apple/ml-dr and microsoft/Cream. The teacher is eight fixed directions in the mean
colour. What the writers cannot do without a GPU or without parts that were never published is done here, and said.
"""

import argparse
import importlib
import os
import random
import shutil
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from foreign_labels import CLASSES, FIXTURES, SHOWN, SIZE, TINYVIT_SIZE, VIEWS, write_pictures
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def teacher(images: torch.Tensor, return_prob: bool = False) -> torch.Tensor:
    """`[n, 8]` logits (or probabilities) of normalised images."""
    signs = torch.tensor([[1.0 if label >> channel & 1 else -1.0 for channel in range(3)] for label in range(8)])
    logits = images.mean((2, 3)) @ signs.T * 1.5
    return logits.softmax(-1) if return_prob else logits


def as_pixels(images: torch.Tensor) -> np.ndarray:
    """`[..., 3, H, W]` normalised images as uint8."""
    mean, std = (torch.tensor(one)[:, None, None] for one in (MEAN, STD))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def modules_of(folder: Path, *names: str) -> list[types.ModuleType]:
    """Modules of a clone, which have the shortest names: those of the next clone must not meet them."""
    sys.path.insert(0, str(folder))
    found = [importlib.import_module(name) for name in names]
    sys.path.remove(str(folder))
    for name, one in list(sys.modules.items()):
        if str(getattr(one, "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    return found


# ---- FKD -----------------------------------------------------------------------------------------------------------


def make_fkd(clone: Path, train: Path, out: Path) -> None:
    """`generate_soft_labels`, with and without --use_fp16; it runs on a CPU as it is."""
    writer, utils = modules_of(clone / "FKD" / "FKD_SLG", "generate_soft_label", "utils")
    for half in (False, True):
        crop = utils.RandomResizedCropWithCoords(
            size=SIZE, scale=(0.08, 0.936), interpolation=InterpolationMode.BICUBIC
        )
        steps = [crop, utils.RandomHorizontalFlipWithRes(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        save_path, kept = out / ("fkd_half" if half else "fkd"), {}
        dataset = utils.ImageFolder_FKD_GSL(
            num_crops=VIEWS,
            save_path=str(save_path),
            reference_path=None,
            root=str(train),
            transform=utils.ComposeWithCoords(transforms=steps),
        )
        args = argparse.Namespace(
            save_path=str(save_path),
            num_crops=VIEWS,
            num_seg=VIEWS // 2,
            gpu=None,
            temp=1.0,
            label_type="marginal_smoothing_k5",
            use_fp16=half,
        )
        batches = list(DataLoader(dataset, batch_size=4))
        for images, _, _, _, paths in batches:
            kept |= {path: torch.stack([one[index] for one in images]) for index, path in enumerate(paths)}
        writer.generate_soft_labels(batches, Network(), args)
        if not half:
            seen = [kept[path] for path, _ in dataset.samples[:SHOWN]]
            np.savez_compressed(out / "fkd_seen.npz", teacher=as_pixels(torch.stack(seen)))


class Network(torch.nn.Module):
    """`teacher` as a module."""

    def forward(self, images: torch.Tensor, return_prob: bool = False) -> torch.Tensor:
        return teacher(images, return_prob)


# ---- ml-dr ---------------------------------------------------------------------------------------------------------


def make_ml_dr(clone: Path, train: Path, out: Path) -> None:
    """`reinforce` of reinforce.py, without `internal`, which nobody published, and `models`, which Python refuses."""
    for name in ("internal", "internal.hooks", "internal.data", "models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["models"].load_model = None
    (writer, their) = modules_of(clone, "reinforce", "dr.transforms")
    plain = {
        "uint8": {"enable": True},
        "random_resized_crop": {"enable": True, "size": SIZE},
        "random_horizontal_flip": {"enable": True, "p": 0.5},
        "to_tensor": {"enable": True},
        "normalize": {"mean": list(MEAN), "std": list(STD)},
    }
    more = plain | {"rand_augment": {"enable": True, "p": 0.8}, "random_erase": {"enable": True, "p": 0.5}}
    for name, augmentation, compress in (("ml_dr", more, True), ("ml_dr_plain", plain, False)):
        folder = out / name
        config = {
            "dataset": "imagenet",
            "teacher": {"timm_ensemble": True, "name": "mean_colour"},
            "num_classes": len(CLASSES),
            "gpu": None,
            "print_freq": 1000,
            "reinforce": {
                "num_samples": VIEWS,
                "topk": 3,
                "compress": compress,
                "joblib": False,
                "gzip": True,
                "image_augmentation": augmentation,
            },
        }
        dataset = ImageFolder(str(train))
        before = their.compose_from_config(their.before_collate_config(augmentation))
        indexed = writer.IndexedDataset(writer.DatasetWithParameters(dataset, before, VIEWS))
        seen: dict[int, torch.Tensor] = {}
        own = writer.transform_batch

        def recorded(ids: torch.Tensor, *rest: object, own=own, seen=seen) -> object:
            images, params = own(ids, *rest)
            seen.update(zip(ids.tolist(), images, strict=True))
            return images, params

        writer.transform_batch = recorded
        writer.os = Elsewhere(folder)  # the folder is fixed there
        writer.reinforce(DataLoader(indexed, batch_size=8, shuffle=True), Network(), config)
        writer.transform_batch = own
        torch.save(config, folder / "config.pth.tar")  # as main does
        students = ml_dr_students(their, folder, augmentation, compress, train)
        shown = [seen[number] for number in range(SHOWN)]
        np.savez_compressed(out / f"{name}_seen.npz", teacher=as_pixels(torch.stack(shown)), student=students)


def ml_dr_students(
    their: types.ModuleType, folder: Path, augmentation: dict, compress: bool, train: Path
) -> np.ndarray:
    """The pixels that their students are trained on: what dr/data.py does with a file, for every view of it."""
    apply, dataset, found = their.compose_from_config(augmentation), ImageFolder(str(train)), []
    for number in range(SHOWN):
        _, views = torch.load(folder / f"{number}.pth.tar", weights_only=False)
        for view in views:
            params = apply.decompress(view["params"]) if compress else view["params"]
            found.append(apply.reapply(dataset[number][0], params)[0])
    return as_pixels(torch.stack(found)).reshape(SHOWN, VIEWS, 3, SIZE, SIZE)


class Elsewhere:
    """`os` with another place for /mnt/reinforced_data."""

    def __init__(self, folder: Path) -> None:
        self.makedirs = os.makedirs
        self.path = types.SimpleNamespace(
            join=lambda *parts: os.path.join(*(part.replace("/mnt/reinforced_data", str(folder)) for part in parts)),
            exists=os.path.exists,
        )


# ---- TinyViT -------------------------------------------------------------------------------------------------------


def make_tinyvit(clone: Path, train: Path, out: Path) -> None:
    """`DatasetWrapper`, its manager and transforms; the loop of save_logits.py, which wants a GPU, is done here."""
    (augmentation, wrapper) = modules_of(clone / "TinyViT" / "data", "augmentation", "augmentation.dataset_wrapper")

    class Named(ImageFolder):
        def get_keys(self) -> list[str]:
            return [f"{Path(path).parent.name}/{Path(path).stem}" for path, _ in self.samples]

    transform = augmentation.create_transform(
        input_size=TINYVIT_SIZE,
        is_training=True,
        color_jitter=None,
        auto_augment=None,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
    )
    dataset = Named(str(train), transform=transform)
    seen = torch.zeros(SHOWN, VIEWS, 3, TINYVIT_SIZE, TINYVIT_SIZE)
    for rank in range(2):
        wrapper.get_rank = lambda rank=rank: rank
        saving = wrapper.DatasetWrapper(dataset, str(out / "tinyvit"), 3, write=True)
        for epoch in range(VIEWS):
            saving.set_epoch(epoch)
            for index in np.random.permutation(np.arange(rank, len(dataset), 2)).tolist():
                (image, _), (key, seed) = saving[index]
                values, indices = teacher(image[None], return_prob=True)[0].topk(3)
                ids, kept = indices.to(torch.int16).numpy(), values.to(torch.float16).numpy()
                saving.get_manager().write(key, seed.tobytes() + ids.tobytes() + kept.tobytes())
                if index < SHOWN:
                    seen[index, epoch] = image
        saving.set_epoch(-1)
        del saving  # which ends its writer
    np.savez_compressed(out / "tinyvit_seen.npz", teacher=as_pixels(seen))


if __name__ == "__main__":
    fkd, ml_dr, cream = (Path(one).resolve() for one in sys.argv[1:])
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        pictures = write_pictures(Path(scratch))
        make_fkd(fkd, pictures, FIXTURES)
        make_ml_dr(ml_dr, pictures, FIXTURES)
        make_tinyvit(cream, pictures, FIXTURES)
