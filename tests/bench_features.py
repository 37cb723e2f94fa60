"""What codes of features cost and lose: what comes into the classifier of the pretrained ResNet-56, on CIFAR-10 images.

    OFFLINE_KD_DATA=FOLDER python tests/bench_features.py

Templates are learned from 3,500 images and measured on 500 others, all of one tar and not augmented. Bytes are before
zstd. Where faiss is installed, its product quantisation of the same vectors is beside ours.
"""

from pathlib import Path

import torch

from offline_kd.cache.feature_codes import fit_product
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.training import training_images
from offline_kd.models.taps import TapPoint
from offline_kd.recipe import load_recipe
from offline_kd.store.features import FeatureErrors, Features, pack_features, unpack_features
from offline_kd.support.packaged import packaged

RECIPE = "cifar10/resnet56_resnet20_cpu"
CPU = torch.device("cpu")
IMAGES, MEASURED, BATCH = 4000, 500, 250
CODES: dict[str, dict[str, object]] = {
    "f16": {"name": "f16"},
    "int, 8 bits": {"name": "int"},
    "int, 4 bits": {"name": "int", "bits": 4},
    **{f"pq, {parts} parts": {"name": "pq", "subspaces": parts} for parts in (32, 16, 8, 4)},
    "pq, 8 parts, 2 stages": {"name": "pq", "subspaces": 8, "stages": 2},
}


def features() -> torch.Tensor:
    """`[4000, 64]` float32."""
    recipe, manifest = (
        load_recipe(Path(RECIPE), ["data.tars=[0]"]),
        load_manifest(packaged("data_manifest.yaml")),
    )
    teacher = load_teacher(recipe, manifest, data_roots(), 10, CPU)
    images = training_images(recipe, manifest, data_roots())[0].images[:IMAGES]
    found = [teacher.logits_and_maps(some, [TapPoint(module="layer3")])[1][0] for some in images.split(BATCH)]
    return torch.cat(found).mean(dim=(2, 3))


def inertia_of_faiss(vectors: torch.Tensor, parts: int) -> float | None:
    """Mean squared error of a vector; None: it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    quantizer = faiss.ProductQuantizer(vectors.shape[1], parts, 8)
    quantizer.train(vectors.numpy())
    decoded = quantizer.decode(quantizer.compute_codes(vectors.numpy()))
    return float(((decoded - vectors.numpy()) ** 2).sum(axis=1).mean())


def main() -> None:
    torch.set_num_threads(1)
    every = features()
    learned, measured = every[MEASURED:], every[:MEASURED]
    print("| code | bytes | relative L2 | cosine | same neighbour | inertia / faiss' |\n|---|---|---|---|---|---|")
    for name, code in CODES.items():
        wanted = Features.model_validate({"module": "layer3", "code": code})
        tables, ratio = {}, ""
        if code["name"] == "pq":
            tables["centroids"], statistics = fit_product(learned.numpy().copy(), wanted.code, CPU, name)
            theirs = inertia_of_faiss(learned, wanted.code.subspaces) if wanted.code.stages == 1 else None
            ratio = f"{statistics['inertia_per_vector'] / theirs:.3f}" if theirs else ""
        packed = pack_features(wanted, measured, tables)
        errors = FeatureErrors()
        errors.add(measured, unpack_features(wanted, packed, tables))
        size = sum(array.nbytes for array in packed.values()) / len(measured)
        lost = errors.figures()
        figures = f"{lost['relative_l2']:.4f} | {lost['cosine']:.4f} | {100 * lost['same_neighbour']:.1f} %"
        print(f"| {name} | {size:.0f} | {figures} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
