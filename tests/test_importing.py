"""`store import`: label stores of other programs, made by those programs' own writers (tests/fixtures/README.md)."""

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import invoke, refused
from foreign_labels import CLASSES, FIXTURES, NAMES, SHOWN, SIZE, TINYVIT_SIZE, VIEWS, write_pictures
from PIL import Image
from torch.nn import functional as F

from offline_kd.cache.foreign.answers import Answers
from offline_kd.cache.foreign.fkd import open_fkd
from offline_kd.cache.foreign.ml_dr import open_ml_dr
from offline_kd.cache.foreign.plain import read_plain
from offline_kd.cache.importing import topk_of
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import load_manifest
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.join import join
from offline_kd.store.opening import open_store
from offline_kd.support.errors import DataError
from offline_kd.views.choice import choose
from offline_kd.views.render import render_some

SOURCES = {
    "fkd": ("fkd", FIXTURES / "fkd" / "imagenet", "--size", SIZE),
    "fkd_half": ("fkd", FIXTURES / "fkd_half" / "imagenet", "--size", SIZE),
    "ml_dr": ("ml-dr", FIXTURES / "ml_dr"),
    "ml_dr_plain": ("ml-dr", FIXTURES / "ml_dr_plain"),
    "tinyvit": ("tinyvit", FIXTURES / "tinyvit"),
}
CROPS_ALONE = {
    "AUG": {
        "MIXUP": 0.0,
        "CUTMIX": 0.0,
        "CUTMIX_MINMAX": None,
        "AUTO_AUGMENT": "none",
        "COLOR_JITTER": 0.0,
        "REPROB": 0.0,
    },
    "DATA": {"IMG_SIZE": TINYVIT_SIZE, "INTERPOLATION": "bicubic"},
    "MODEL": {"NAME": "clip"},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """The pictures, packed as people pack them: a manifest, three tars, and the configuration of TinyViT's teacher."""
    folder = tmp_path_factory.mktemp("photos")
    train = write_pictures(folder)
    pack = ["--out", folder / "photos", "--split", "train", "--samples-per-tar", 10, "--write", folder / "manifest.yaml"]
    assert invoke("data", "pack", "imagefolder", "--source", train, *pack).exit_code == 0
    return folder


def importing(photos: Path, name: str, out: Path, *more: object) -> list[object]:
    """The arguments that import one of SOURCES."""
    kind, source, *options = SOURCES[name]
    if kind == "tinyvit":
        (photos / "config.json").write_text(yaml.safe_dump(CROPS_ALONE))
        options += ["--config", photos / "config.json"]
    where = ["--manifest", photos / "manifest.yaml", "--data-root", photos]
    return ["store", "import", kind, source, "--data", "photos", "--out", out, *where, *options, *more]


@pytest.fixture(scope="module")
def stores(photos, tmp_path_factory) -> dict[str, Path]:
    """What every source became, and by the key `said NAME` what was said."""
    folder, found = tmp_path_factory.mktemp("stores"), {}
    for name in SOURCES:
        result = invoke(*importing(photos, name, folder / name))
        assert result.exit_code == 0, result.stderr
        found |= {name: folder / name, f"said {name}": result.stderr}
    return found


@pytest.fixture
def copied(tmp_path, photos, monkeypatch):
    """A copy of a source that may be damaged, in place of the source."""

    def copy(name: str) -> Path:
        kind, source, *options = SOURCES[name]
        shutil.copytree(source, tmp_path / name)
        monkeypatch.setitem(SOURCES, name, (kind, tmp_path / name, *options))
        return tmp_path / name

    return copy


# ---- what arrives ----------------------------------------------------------------------------------------------------


def uniform_rest(ids: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """`[v, 8]`: what is left is shared evenly, as those projects' own students have it."""
    rest = (1 - probabilities.sum(1, keepdims=True)) / (len(CLASSES) - ids.shape[1])
    every = np.broadcast_to(rest, (len(ids), len(CLASSES))).copy()
    np.put_along_axis(every, ids.astype(int), probabilities, axis=1)
    return every


def in_the_files(name: str, number: int) -> np.ndarray:
    """`[v, 8]` probabilities of the picture of that number, read as the other project reads them."""
    _, source, *_ = SOURCES[name]
    label, of_class = divmod(number, len(NAMES))
    key = f"{CLASSES[label]}/{NAMES[of_class]}"
    if name.startswith("fkd"):
        _, _, labels = torch.load(source / "train" / f"{key}.tar", weights_only=False)
        return uniform_rest(*labels.astype(float).swapaxes(0, 1))
    if name.startswith("ml_dr"):
        _, views = torch.load(source / f"{number}.pth.tar", weights_only=False)
        return uniform_rest(*(np.array([view["prob"][part] for view in views]) for part in (1, 0)))
    found = []
    for epoch in range(VIEWS):
        folder = source / f"logits_top3_epoch{epoch}"
        rank = next(rank for rank in "01" if key in (folder / f"rank{rank}-keys.txt").read_text().split())
        row = (folder / f"rank{rank}-keys.txt").read_text().split().index(key)
        content = (folder / f"rank{rank}-values.bin").read_bytes()[16 * row : 16 * row + 16]
        found.append((np.frombuffer(content[4:10], "<i2"), np.frombuffer(content[10:], "<f2").astype(float)))
    return uniform_rest(*(np.stack([one[part] for one in found]) for part in (0, 1)))


def joined(photos: Path, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By key, what a student gets: pixels `[v, 3, size, size]` and probabilities `[v, 8]`."""
    store, manifest = open_store(folder), load_manifest(photos / "manifest.yaml")
    loader = BlockLoader(manifest.dataset("photos"), manifest.split("photos", "train"), [photos], decode=False)
    views, codec, pixels, probabilities = store.identity.views, store.identity.codec, {}, {}
    for number in store.blocks:
        block = loader[number]
        rows = join(store, block, 0, np.tile(np.arange(VIEWS), (len(block), 1)))
        seen = render_some(block, rows.view, views, views.size).reshape(len(block), VIEWS, 3, views.size, views.size)
        read = store.read(number, 0, [f"logits/{name}" for name in codec.arrays()])
        arrays = {name.removeprefix("logits/"): array for name, array in read.items()}
        said = codec.decode_stored(arrays, {}, len(CLASSES)).softmax(-1).numpy()
        pixels |= dict(zip(block.keys, seen, strict=True))
        probabilities |= dict(zip(block.keys, said, strict=True))
    return pixels, probabilities


@pytest.mark.parametrize("name", SOURCES)
def test_a_student_gets_the_stored_answers_and_the_pixels_they_are_about(name, stores, photos):
    pixels, probabilities = joined(photos, stores[name])
    assert len(probabilities) == len(CLASSES) * len(NAMES)
    for number in range(len(probabilities)):
        key = f"{CLASSES[number // len(NAMES)]}/{NAMES[number % len(NAMES)]}"
        assert np.allclose(probabilities[key], in_the_files(name, number), atol=2e-3), key
    if name == "fkd_half":
        return
    seen = np.load(FIXTURES / f"{name}_seen.npz")
    expected = seen["student" if "student" in seen else "teacher"].astype(int)
    here = np.stack([pixels[f"{CLASSES[0]}/{NAMES[number]}"] for number in range(SHOWN)]).astype(int)
    differences = np.abs(here - expected).mean(axis=(2, 3, 4))
    print(f"{name}: mean difference of a view {differences.mean():.3f}, largest {differences.max():.3f} of 255")
    assert differences.max() < 1.5
    assert np.abs(here - np.roll(expected, 1, axis=1)).mean() > 5 * max(differences.max(), 0.5)  # not any view
