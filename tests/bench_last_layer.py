"""What codecs of logits and codes of features take and lose, on teachers whose logits a last layer makes of features.

    OFFLINE_KD_DATA=FOLDER python tests/bench_last_layer.py runs/last_layer [resnet56 | lite0 | resnet8]

2,000 images in two views each are captured with their features in f32 and given to `bench codecs`, which measures on
every fifth image what it has learned from the others. The 100 classes are those of cifar100_filtered, which is not
standard CIFAR-100; `resnet8` is trained here for EPOCHS passes of 5,000 images, so it knows them badly.
"""

import sys
from pathlib import Path

import torch
from make_cifar100_teacher import main as make_lite0

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cli import bench_last_layer
from offline_kd.cli.bench_codecs import bench_codecs
from offline_kd.cli.bench_material import small_recipe
from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.teacher_training import train_teacher
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.store.opening import open_store
from offline_kd.support.packaged import packaged

CPU = torch.device("cpu")
IMAGES, VIEWS, EPOCHS = 2000, 2, 8
LAYERS = {"resnet56": "linear", "lite0": "classifier", "resnet8": "fc"}
OF_100 = "cifar100_filtered/lite0_resnet8_codecs"
SGD = f"{{epochs: {EPOCHS}, optimizer: {{name: sgd, lr: 0.1}}, schedule: {{name: cosine}}, evaluate_every: {EPOCHS}}}"


def recipe_of(name: str, folder: Path) -> Recipe:
    """With the teacher that it names, made or trained in `folder` if need be."""
    if name == "resnet56":
        return load_recipe(Path("cifar10/resnet56_resnet20_cpu"), [])
    weights = folder / f"{name}.safetensors"
    if name == "lite0":
        make_lite0(weights)
        return load_recipe(Path(OF_100), [f"teacher.weights={weights}"])
    plain = ["data.crop=null", f"views={{kind: pad_crop_flip, padding: 4, count: {EPOCHS}}}"]
    trained = load_recipe(Path(OF_100), [*plain, f"teacher={{model: cifar:resnet8, training: {SGD}}}"])
    result = train_teacher(trained, load_manifest(packaged("data_manifest.yaml")), data_roots(), folder / name, CPU)
    print(f"resnet8: top-1 {result.top1:.1f} % after {EPOCHS} epochs of 5,000 images")
    weights = folder / name / "teacher.safetensors"
    return load_recipe(Path(OF_100), [*plain, f"teacher={{model: cifar:resnet8, weights: {weights}}}"])


def main(folder: Path, name: str) -> None:
    recipe, manifest = recipe_of(name, folder), load_manifest(packaged("data_manifest.yaml"))
    place = folder / f"{name}-images"
    batches = IMAGES // recipe.training.batch_size
    small, manifest = small_recipe(recipe, manifest, data_roots(), place, (batches, VIEWS))
    capture = {
        "codec": {"name": "last_layer", "features": "penultimate"},
        "features": {"penultimate": {"module": LAYERS[name], "at": "input", "code": {"name": "f32"}}},
        "views_per_group": VIEWS,
        "fidelity_rows": 20,
    }
    changed = Recipe.model_validate(small.model_dump(mode="json", exclude_none=True) | {"capture": capture})
    cache_teacher(changed, manifest, data_roots([place]), folder / f"{name}-store", CPU)
    if name == "lite0":  # K-means of 1,280 numbers takes long
        bench_last_layer.PARTS, bench_last_layer.STAGES = (32,), (1,)
    print("| codec | bytes as stored | tables, kB | TV at T = 1, 2, 4 | KL, T = 1 | gradient of KD at T = 4, of WTTM |")
    print("|---|---|---|---|---|---|")
    for one in bench_codecs(open_store(folder / f"{name}-store"), IMAGES * VIEWS):
        lost = one.distortion
        variation = " ".join(f"{value:.4f}".removeprefix("0") for value in lost["total_variation"].values())
        changes = f"{100 * one.change['kd']:.2g} %, {100 * one.change['wttm']:.2g} %"
        size = f"{one.bytes_per_row:.1f} | {one.table_bytes / 1e3:,.0f}"
        print(f"| {one.codec} | {size} | {variation} | {lost['kl']['1']:.1e} | {changes} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
