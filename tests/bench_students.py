"""What a codec does to students: the same teacher's logits, coded anew, and students trained from each store.

    OFFLINE_KD_DATA=FOLDER python tests/bench_students.py runs/codecs/store --out runs/codecs

The store is the one that pipelines/cifar100_filtered/lite0_resnet8_codecs.yaml makes (f32); ResNet-8, 16 epochs of
10,000 images and 8 views, three seeds. cifar100_filtered is not standard CIFAR-100: compare these numbers with each
other only.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from bench_stream import finish

from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.training import distill
from offline_kd.recipe import load_recipe
from offline_kd.store.codecs import CODEC_TABLES, AnyCodec
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.codecs.klt import Klt
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.layout import parts_of
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.store.writer import commit, commit_tables, create_or_resume
from offline_kd.support.places import Folder

ROOT = Path(__file__).parent.parent
VIEWS = 8
CODECS: dict[str, AnyCodec] = {
    "f32": Float32(name="f32"),
    "klt, about 120 bytes": Klt(name="klt", step=0.015, refine=8, refine_step=0.015625),
    "klt, about 50 bytes": Klt(name="klt", step=0.5, refine=8),
    "int, 4 bits": Int(name="int", bits=4),
    "top 10": TopK(name="topk", k=10, tail_temperature=4),
}


def transcode(store: Store, folder: Path, codec: AnyCodec) -> float:
    """Write a store of the first views with another codec; returns bytes per row of its logits."""
    created = store.created.model_copy(
        update={"codec": codec, "views": store.created.views.model_copy(update={"count": VIEWS})}
    )
    place, part = Folder(folder), parts_of(created)[""]
    create_or_resume(place, created)
    names = [spec.name for spec in store.parts[""].specs]

    def logits_of(block: int, view: int) -> np.ndarray:
        arrays = {"values": store.read(block, view, ["logits/values"])["logits/values"]}
        return store.identity.codec.decode_stored(arrays, {}, store.identity.num_classes).numpy()

    # Learned from views that no student is shown.
    others = range(VIEWS, store.identity.views.num_views)
    tables = codec.fit(np.concatenate([logits_of(block, view)[:, 0] for block in store.blocks for view in others]))
    contents, size = {}, 0
    if tables:
        entry = commit_tables(place, part, CODEC_TABLES, {f"codec/{name}": one for name, one in tables.items()}, {})
        contents[entry.file_name] = place.read(f"ledger/{entry.file_name}")
    for block in store.blocks:
        for view in range(VIEWS):
            arrays = {name: array for name, array in store.read(block, view, names).items() if "logits" not in name}
            coded = codec.encode(logits_of(block, view), tables)
            old = store.entry("", block, view)
            logits = {f"logits/{name}": array for name, array in coded.items()}
            entry = commit(place, part, view, old, arrays | logits)
            contents[entry.file_name] = place.read(f"ledger/{entry.file_name}")
            size += sum(stored.bytes for key, stored in entry.objects.items() if key.startswith("logits/"))
    finish(place, contents, VIEWS)
    return size / (VIEWS * sum(tar.count for tar in created.dataset.tars))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    manifest = load_manifest(ROOT / "data_manifest.yaml")
    recipe = load_recipe(ROOT / "pipelines/cifar100_filtered/lite0_resnet8_codecs.yaml", [f"views.count={VIEWS}"])
    store = open_store(arguments.store)
    lines = []
    for name, codec in CODECS.items():
        folder = arguments.out / name.replace(" ", "_").replace(",", "")
        size = transcode(store, folder / "store", codec)
        accuracies = [
            distill(
                recipe, manifest, data_roots(), folder / f"seed{seed}", torch.device("cpu"),
                seed=seed, stores=[str(folder / "store")],
            ).top1
            for seed in recipe.seeds
        ]  # fmt: skip
        spread = statistics.stdev(accuracies)
        lines.append(f"{name:22} {size:6.1f} bytes a row   top-1 {statistics.mean(accuracies):.2f} +- {spread:.2f} %")
        print(lines[-1], accuracies, flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
