"""What a codec does to students: the same teacher's logits, coded anew, and students trained from each store.

    OFFLINE_KD_DATA=FOLDER python tests/bench_students.py runs/codecs/store --out runs/codecs --seeds 5

The store is the one that pipelines/cifar100_filtered/lite0_resnet8_codecs.yaml makes (f32): of its two view groups the
first is shown to students, the second is what codecs learn from. Seeds come last in turn, and what is finished is not
trained again, so the program may be ended and started again with more of them. cifar100_filtered is not standard
CIFAR-100: compare these numbers with each other only.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from bench_stream import finish
from scipy.stats import t

from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.training import distill
from offline_kd.recipe import load_recipe
from offline_kd.store.codecs import CODEC_TABLES, AnyCodec
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.codecs.klt import Klt
from offline_kd.store.codecs.klt_means import KltMeans
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.layout import parts_of
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.store.writer import commit, commit_tables, create_or_resume
from offline_kd.support.places import Folder

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "pipelines/cifar100_filtered/lite0_resnet8_codecs.yaml"
CODECS: dict[str, AnyCodec] = {
    "f32": Float32(name="f32"),
    "klt": Klt(name="klt", step=0.5, refine=8),
    # The setting of docs/codecs.md for 100 classes: the error of 4-bit integers.
    "klt_means": KltMeans(
        name="klt_means",
        step=0.91,
        finer=1,
        refine=100,
        refine_step=0.0558,
        refine_spread=2.354,
        refine_coarsest=0.5363,
    ),
    "int_4": Int(name="int", bits=4),
    "top_10": TopK(name="topk", k=10, tail_temperature=4),
}


def logits_of(store: Store, block: int, group: int) -> np.ndarray:
    """`[rows, v, C]` of the views of one group."""
    arrays = {"values": store.read(block, group, ["logits/values"])["logits/values"]}
    return store.identity.codec.decode_stored(arrays, {}, store.identity.num_classes).numpy()


def transcode(store: Store, folder: Path, codec: AnyCodec) -> float:
    """Write a store of the first view group with another codec; returns bytes per row of its logits."""
    views = store.created.views.model_copy(update={"count": store.created.views_per_group})
    created = store.created.model_copy(update={"codec": codec, "views": views})
    place, part = Folder(folder), parts_of(created)[""]
    create_or_resume(place, created)
    names = [spec.name for spec in store.parts[""].specs if not spec.name.startswith("logits/")]
    tables = codec.fit(np.concatenate([logits_of(store, block, 1) for block in store.blocks]))
    contents, size = {}, 0
    if tables:
        entry = commit_tables(place, part, CODEC_TABLES, {f"codec/{name}": one for name, one in tables.items()}, {})
        contents[entry.file_name] = place.read(f"ledger/{entry.file_name}")
    for block in store.blocks:
        coded = codec.encode(logits_of(store, block, 0), tables)
        arrays = store.read(block, 0, names) | {f"logits/{name}": array for name, array in coded.items()}
        entry = commit(place, part, 0, store.entry("", block, 0), arrays)
        contents[entry.file_name] = place.read(f"ledger/{entry.file_name}")
        size += sum(stored.bytes for key, stored in entry.objects.items() if key.startswith("logits/"))
    finish(place, created, contents)
    return size / (created.views_per_group * sum(tar.count for tar in created.dataset.tars))


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:6.2f}        "
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):6.2f} +- {half:4.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--objectives", nargs="+", help="of the recipe; all by default, which several processes may share"
    )
    arguments = parser.parse_args()
    manifest = load_manifest(ROOT / "data_manifest.yaml")
    store = open_store(arguments.store)
    recipe = load_recipe(RECIPE, [f"views.count={store.created.views_per_group}"])
    sizes = {}
    for name, codec in CODECS.items():
        written = arguments.out / name / "bytes"
        if not written.exists():
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(str(transcode(store, arguments.out / name / "store", codec)))
        sizes[name] = float(written.read_text())
        print(f"{name:10} {sizes[name]:6.1f} bytes a row", flush=True)
    objectives = arguments.objectives or recipe.objectives
    found: dict[tuple[str, str], list[float]] = {(about, name): [] for about in objectives for name in CODECS}
    for seed in range(arguments.seeds):
        for objective, name in found:
            folder = arguments.out / name
            result = distill(
                recipe, manifest, data_roots(), folder / f"{objective}_seed{seed}", torch.device("cpu"),
                objective=objective, seed=seed, stores=[str(folder / "store")], allow_biased=True,
            )  # fmt: skip
            found[objective, name].append(result.top1)
        for (objective, name), top1 in found.items():
            apart = [one - exact for one, exact in zip(top1, found[objective, "f32"], strict=True)]
            line = f"{objective:5} {name:10} {sizes[name]:6.1f} bytes a row   top-1 {interval(top1)} %"
            print(f"{line}   less that of f32 {interval(apart)}", flush=True)


if __name__ == "__main__":
    main()
