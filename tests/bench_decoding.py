"""What scaled decoding saves, and what it does to pixels and to the answers of a teacher.

    OFFLINE_KD_DATA=FOLDER python tests/bench_decoding.py [--rounds 5] [--images 200]

One core, one run: whole and scaled decoding are timed in turn, and the median of the ratios within a round is printed.
Photographs of imagenet_sample (short side 240 pixels), and the same enlarged to a short side of about 1,600, which have
the size of camera pictures but hardly their finest detail; the teacher is EfficientNet-Lite0. Differences are those
from views of whole images, of views that are decoded smaller; another interpolation stands beside them for scale.
"""

import argparse
import io
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from bench_stream import in_turn, ratio
from numpy.typing import NDArray
from PIL import Image

from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import BlockLoader, Decoder, ImageBlock
from offline_kd.data.decoding import Decoded, decode_image
from offline_kd.data.manifest import Dataset, Split, data_roots, load_manifest
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import load_recipe
from offline_kd.views import render
from offline_kd.views.choice import choose
from offline_kd.views.kind import draw
from offline_kd.views.random_resized_crop import RandomCrop
from offline_kd.views.render import decoding_scales, render_choice

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FULL = RandomCrop(kind="random_resized_crop", size=224, interpolation="bicubic", count=4)
SCALED = FULL.model_copy(update={"decoding": "scaled"})


def packed(folder: Path, block: ImageBlock, count: int, enlarged: float) -> ImageBlock:
    samples = []
    for key, encoded in zip(block.keys[:count], block.encoded, strict=False):
        if enlarged > 1:
            image, buffer = decode_image(encoded), io.BytesIO()
            size = (round(image.width * enlarged), round(image.height * enlarged))
            image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
            encoded = buffer.getvalue()
        samples.append(Sample(key, 0, encoded, "jpg"))
    tars = pack(samples, folder / f"{enlarged}", "train", count)
    dataset = Dataset(folder=f"{enlarged}", classes=["a", "b"], splits={"train": Split(tars=tars)})
    return BlockLoader(dataset, dataset.splits["train"], [folder], decode=False)[0]


def rendered(block: ImageBlock, views: RandomCrop, size: int, num_views: int = 1) -> torch.Tensor:
    """The first views of all images, one image after the other; each is decoded once for all its views."""
    parameters = draw(views, block.key_hash, block.sizes())
    decoder, pixels = Decoder(block), []
    for row in range(len(block)):
        choice = choose(parameters, np.full(num_views, row), np.arange(num_views))
        pixels.append(render_choice(decoder, choice, views, size)[0])
        decoder.forget()
    return torch.cat(pixels)


def speed(name: str, block: ImageBlock, size: int, rounds: int) -> None:
    height, width = np.median(block.sizes(), axis=0)
    kilobytes = sum(map(len, block.encoded)) / len(block) / 1e3
    for num_views in (1, 4):
        print(f"{name} ({width:.0f}x{height:.0f}, {kilobytes:.0f} kB), views of {size}, {num_views} of each decode")

        def work(views: RandomCrop, num_views: int = num_views) -> Callable[[], int]:
            return lambda: len(rendered(block, views, size, num_views))

        times = in_turn({"whole": work(FULL), "scaled": work(SCALED)}, rounds)
        print(f"views a second, scaled / whole: {ratio(times, 'whole', 'scaled'):.2f}")


def with_twice_the_pixels(views: RandomCrop, box: NDArray[np.int16], size: int) -> NDArray[np.int64]:
    """A more careful rule."""
    return decoding_scales(views, box, 2 * size)


def to_whole_pixels(self: Decoded, box: NDArray[np.int16]) -> NDArray[np.int64]:
    """What scaled boxes are not: rounded."""
    top, left, height, width = box.astype(np.int64)
    edges = np.rint(np.array([top, left, top + height, left + width]) / self.scale).astype(np.int64)
    return np.concatenate([edges[:2], edges[2:] - edges[:2]])


def effect(name: str, block: ImageBlock, size: int, teacher: Teacher) -> None:
    variants: dict[str, tuple[RandomCrop, AbstractContextManager[object]]] = {
        "scaled": (SCALED, nullcontext()),
        "scaled, twice the pixels": (SCALED, mock.patch.object(render, "decoding_scales", with_twice_the_pixels)),
        "scaled, whole pixels": (SCALED, mock.patch.object(Decoded, "box", to_whole_pixels)),
        "bilinear, not bicubic": (FULL.model_copy(update={"interpolation": "bilinear"}), nullcontext()),
    }
    scales = decoding_scales(SCALED, draw(FULL, block.key_hash, block.sizes())["box"][:, 0], size)
    which = torch.from_numpy(scales > 1)
    counts = {f"1/{scale}": number for scale, number in sorted(Counter(scales.tolist()).items())}
    print(f"{name}, views of {size}, {len(block)} images decoded at {counts}; of those decoded smaller:")
    whole = rendered(block, FULL, size)[which]
    answer = asked(teacher, whole)
    for variant, (views, patched) in variants.items():
        with patched:
            pixels = rendered(block, views, size)[which]
        other = asked(teacher, pixels)
        logit = (other - answer).abs().mean().item()
        agreement = (other.argmax(1) == answer.argmax(1)).float().mean().item()
        variation = [((other / t).softmax(1) - (answer / t).softmax(1)).abs().sum(1).mean().item() / 2 for t in (1, 4)]
        print(
            f"  {variant:28} pixels {(pixels.int() - whole).abs().float().mean():5.2f} of 255   logits {logit:.3f}   "
            f"total variation {variation[0]:.4f} (T=1) {variation[1]:.4f} (T=4)   same top-1 {100 * agreement:.1f} %"
        )


def asked(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([teacher.logits(part) for part in pixels.split(32)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    manifest, roots = load_manifest(ROOT / "data_manifest.yaml"), data_roots([])
    recipe = load_recipe(ROOT / "pipelines/imagenet_sample/lite0_codecs.yaml")
    teacher = load_teacher(recipe, manifest, roots, 1000, CPU)
    dataset = manifest.datasets["imagenet_sample"]
    photographs = BlockLoader(dataset, dataset.splits["val"], roots, decode=False)[0]
    with tempfile.TemporaryDirectory() as folder:
        small = packed(Path(folder), photographs, arguments.images, 1)
        large = packed(Path(folder), photographs, arguments.images, 6.7)
        few = large.without(dict.fromkeys(range(40, len(large)), "not timed"))
        speed("camera pictures", few, 224, arguments.rounds)
        speed("photographs", small, 48, arguments.rounds)
        effect("camera pictures", large, 224, teacher)
        effect("photographs", small, 48, teacher)


if __name__ == "__main__":
    main()
