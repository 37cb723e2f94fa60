"""`store import`: label stores of other programs, made by those programs' own writers (tests/fixtures/README.md)."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import invoke, refused
from foreign_labels import CLASSES, FIXTURES, NAMES, SHOWN, SIZE, TINYVIT_SIZE, VIEWS, write_pictures
from PIL import Image

from offline_kd.cache.foreign.answers import Answers
from offline_kd.cache.importing import topk_of
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import load_manifest
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.join import join
from offline_kd.store.opening import open_store
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
    pack = [
        "--out",
        folder / "photos",
        "--split",
        "train",
        "--samples-per-tar",
        10,
        "--write",
        folder / "manifest.yaml",
    ]
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


@pytest.mark.parametrize("name", ["fkd", "ml_dr", "tinyvit"])
def test_an_imported_store_is_proven_and_tells_what_was_lost(name, stores, photos):
    where = ["--manifest", photos / "manifest.yaml", "--data-root", photos]
    proven = invoke("store", "verify", stores[name], "--dataset", *where)
    assert proven.exit_code == 0, proven.output
    assert "no fault" in proven.stderr
    store = open_store(stores[name])
    imported = store.identity.teacher.imported
    card, info = (stores[name] / "README.md").read_text(), invoke("store", "info", stores[name], *where).stdout
    for lost in imported.lost:
        assert all(lost in said for said in (stores[f"said {name}"], card, info))
    assert store.manifest.fidelity == {}
    assert "nobody can ask again" in info
    assert "The teacher was never asked here" in card
    assert "weights are not known" in info
    again = refused("store", "verify", stores[name], "--teacher", 5, "--recipe", stores[name] / "recipe.yaml", *where)
    assert "nobody can ask again" in again


def test_students_train_from_an_imported_store_with_kd_and_not_with_what_needs_all_logits(stores, photos, tmp_path):
    recipe, where = stores["ml_dr"] / "recipe.yaml", ["--manifest", photos / "manifest.yaml", "--data-root", photos]
    distill = ["distill", recipe, "--store", stores["ml_dr"], *where, "--set", "training.epochs=2", "--objective"]
    done = invoke(*distill, "kd", "--out", tmp_path / "kd")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "kd" / "result.json").is_file()
    wttm = ["--set", "objectives={x: [{term: wttm, gamma: .3}]}"]
    assert "does not serve term 'wttm'" in refused(*distill, "x", "--out", tmp_path / "wttm", *wttm)
    hot = ["--set", "objectives={x: [{term: kd, temperature: 4}]}"]
    assert "its tail is right at T = 1" in refused(*distill, "x", "--out", tmp_path / "hot", *hot)
    assert "cannot be drawn" in refused("train", recipe, *where, "--out", tmp_path / "ce")


def test_an_import_that_was_ended_goes_on_and_one_that_is_whole_is_left(stores, photos, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(stores["fkd"], store)
    whole = {file.name: file.read_bytes() for file in (store / "ledger").iterdir()}
    (store / "manifest.json").unlink()
    (store / "ledger" / sorted(whole)[1]).unlink()
    assert invoke(*importing(photos, "fkd", store)).exit_code == 0
    assert {file.name: file.read_bytes() for file in (store / "ledger").iterdir()} == whole
    assert open_store(store).digest == open_store(stores["fkd"]).digest
    assert "holds another capture" in refused(*importing(photos, "fkd_half", store))


@pytest.mark.slow
def test_the_first_views_can_be_imported_and_the_others_later(photos, tmp_path):
    store = tmp_path / "store"
    assert invoke(*importing(photos, "ml_dr_plain", store, "--views", 2)).exit_code == 0
    few = open_store(store)
    assert few.identity.views.num_views == 2
    assert "has 4 views" in refused(*importing(photos, "ml_dr_plain", store, "--views", 5))
    assert invoke(*importing(photos, "ml_dr_plain", store)).exit_code == 0
    assert open_store(store).identity.views.num_views == 4
    assert few.listed.items() <= open_store(store).listed.items()
    assert open_store(store, digest=few.digest).identity.views.num_views == 2


@pytest.mark.parametrize("t", [1, 2, 4])
def test_likeliest_classes_are_stored_as_if_all_logits_had_been_there(t):
    rng = np.random.default_rng(0)
    probabilities = np.sort(rng.dirichlet(np.full(20, 0.3), (3, 5)), axis=-1)[..., ::-1]
    ids = rng.permuted(np.broadcast_to(np.arange(20), (3, 5, 20)), axis=-1)
    codec = TopK(name="topk", k=6, tail_temperature=t)
    told = [Answers({}, ids[n, :, :6], probabilities[n, :, :6]) for n in range(3)]
    arrays = topk_of(codec, told, 20)
    dense = np.zeros((3, 5, 20))
    rest = np.broadcast_to(probabilities[..., 6:].mean(-1, keepdims=True), (3, 5, 14))
    np.put_along_axis(dense, ids, np.concatenate([probabilities[..., :6], rest], -1), axis=-1)
    whole = codec.encode((t * np.log(dense)).astype(np.float32), {})
    assert np.allclose(arrays["rest"], whole["rest"], atol=1e-4)
    decoded, expected = codec.decode_stored(arrays, {}, 20), codec.decode_stored(whole, {}, 20)
    assert torch.allclose(decoded, expected, atol=2e-2)
    assert torch.allclose((decoded / t).softmax(-1), torch.from_numpy(dense).float(), atol=5e-3)


# ---- what is refused -------------------------------------------------------------------------------------------------


def nothing_was_written(photos: Path, name: str, out: Path, *more: object) -> str:
    message = refused(*importing(photos, name, out, *more))
    assert not out.exists()
    return message


def test_labels_of_other_images_are_refused_before_anything_is_written(copied, photos, tmp_path):
    """Missing ones, too many, another order, another image of the name, and other classes."""
    out, train = tmp_path / "out", copied("fkd") / "train"
    (train / "cat" / "a.tar").rename(tmp_path / "a.tar")
    assert "no labels of sample 'cat/a'" in nothing_was_written(photos, "fkd", out)
    shutil.copy(train / "ibis" / "a.tar", train / "cat" / "a.tar")
    assert "it is about another image" in nothing_was_written(photos, "fkd", out)
    folder = copied("ml_dr_plain")
    shutil.copy(folder / "0.pth.tar", folder / "24.pth.tar")
    assert "holds 25 files, the dataset 24 images" in nothing_was_written(photos, "ml_dr_plain", out)
    (folder / "24.pth.tar").unlink()
    shutil.copy(folder / "0.pth.tar", folder / "5.pth.tar")
    assert "speaks of image 0" in nothing_was_written(photos, "ml_dr_plain", out)
    config = torch.load(folder / "config.pth.tar", weights_only=False)
    torch.save(config | {"num_classes": 1000}, folder / "config.pth.tar")
    assert "was made for 1000 classes, the dataset has 8" in nothing_was_written(photos, "ml_dr_plain", out)


def test_answers_that_do_not_name_the_labels_are_refused(copied, photos, tmp_path):
    """Images of one size in another order are found by nothing else."""
    folder = copied("fkd")
    for name in NAMES:
        files = [folder / "train" / one / f"{name}.tar" for one in CLASSES]
        states = [torch.load(file, weights_only=False) for file in files]
        for file, own, other in zip(files, states, [*states[1:], states[0]], strict=True):
            torch.save([*own[:2], other[2]], file)
    message = nothing_was_written(photos, "fkd", tmp_path / "out")
    assert "the likeliest class is the label in 0.0 % of the views, less than 50 %" in message
    message = nothing_was_written(photos, "ml_dr", tmp_path / "out", "--least-top1", 80)
    assert "in 70.8 % of the views, less than 80 %" in message


def test_the_order_of_another_dataset_is_given_by_its_keys(copied, photos, tmp_path):
    folder, keys = copied("ml_dr"), tmp_path / "keys.txt"
    in_order = [f"{one}/{name}" for one in CLASSES for name in NAMES]
    for number in range(24):
        at, views = torch.load(folder / f"{number}.pth.tar", weights_only=False)
        torch.save((23 - at, views), tmp_path / f"{23 - at}.pth.tar", pickle_protocol=4)
    for number in range(24):
        shutil.move(tmp_path / f"{number}.pth.tar", folder / f"{number}.pth.tar")
    assert "another image" in nothing_was_written(photos, "ml_dr", tmp_path / "out")
    keys.write_text("\n".join(in_order[1:]))
    message = nothing_was_written(photos, "ml_dr", tmp_path / "out", "--keys", keys)
    assert "'bus/a-1' (and 0 more) is not among the --keys" in message
    keys.write_text("\n".join(reversed(in_order)))
    assert invoke(*importing(photos, "ml_dr", tmp_path / "out", "--keys", keys)).exit_code == 0


class Harmful:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("touched"),))


def test_nothing_of_a_foreign_file_is_run_and_damaged_ones_are_one_line(copied, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, file = tmp_path / "out", copied("fkd") / "train" / "bus" / "a-1.tar"  # the first that is read
    whole, state = file.read_bytes(), torch.load(file, weights_only=False)
    torch.save([state, Harmful()], file)
    assert "which is not run" in nothing_was_written(photos, "fkd", out)
    assert not Path("touched").exists()
    for damaged in (whole[:-200], whole.replace(b"numpy", b"nunpy"), gzip.compress(whole), b"", b"\x80\x04N."):
        file.write_bytes(damaged)
        message = nothing_was_written(photos, "fkd", out)
        assert "not readable as a file of torch.save" in message
        assert ("unpack it first" in message) == damaged.startswith(b"\x1f\x8b")
    for parts, problem in (
        ((state[0], state[1], state[2][:, 0, 0]), "hard"),
        ((state[0][:2], state[1], state[2]), "do not belong together"),
        ((state[0], state[1], np.full_like(state[2], np.nan)), "no numbers"),
        ((state[0], state[1], state[2] + 3), "names class"),
        ((state[0], state[1], np.stack([state[2][:, 0], state[2][:, 1] + 1], 1)), "no probabilities"),
        ((state[0], state[1], state[2] * np.array([[[0.0], [1.0]]])), "a class twice"),
        ((state[0] * 1.01, state[1], state[2]), "between the pixels"),
        ((state[0], state[1]), "does not hold crops"),
    ):
        torch.save(list(parts), file)
        assert problem in nothing_was_written(photos, "fkd", out)


def test_augmentations_that_cannot_be_made_again_are_refused(copied, photos, tmp_path):
    out, folder = tmp_path / "out", copied("ml_dr")
    config = torch.load(folder / "config.pth.tar", weights_only=False)
    augmentation = config["reinforce"]["image_augmentation"]
    for more, problem in (
        ({"mixup": {"enable": True, "alpha": 1.0}}, "mixup with any view of any image"),
        ({"resize": {"size": 224}}, "What can be imported is random_resized_crop"),
        ({"rand_augment": {"fill": 1}}, "sets fill of transforms"),
        ({"rand_augment": {"num_ops": 3}}, "expected are 3 of Identity"),
        ({"random_erase": {"enable": False}}, "names random_resized_crop, random_horizontal_flip, rand_augment."),
    ):
        config["reinforce"]["image_augmentation"] = augmentation | more
        torch.save(config, folder / "config.pth.tar")
        assert problem in nothing_was_written(photos, "ml_dr", out)
    tinyvit = importing(photos, "tinyvit", out)
    for more, problem in (
        ({"AUTO_AUGMENT": "rand-m9-mstd0.5-inc1", "REPROB": 0.25}, "AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1, AUG.REPROB"),
        ({"MIXUP": 0.8}, "imported labels would be those of other pictures"),
    ):
        (photos / "config.json").write_text(yaml.safe_dump(CROPS_ALONE | {"AUG": CROPS_ALONE["AUG"] | more}))
        assert problem in refused(*tinyvit)
    (photos / "config.json").write_text("AUG: {MIXUP: 0}")
    assert "does not say AUG.CUTMIX" in refused(*tinyvit)


def test_tinyvits_rows_are_found_by_number_too_and_cut_files_are_refused(copied, photos, stores, tmp_path):
    folder, out = copied("tinyvit"), tmp_path / "out"
    numbers = {f"{one}/{name}": 3 * c + n for c, one in enumerate(CLASSES) for n, name in enumerate(NAMES)}
    for file in folder.glob("*/rank*-keys.txt"):
        file.write_text("".join(f"{numbers[key]}\n" for key in file.read_text().split()))
    assert invoke(*importing(photos, "tinyvit", out)).exit_code == 0
    here, there = (open_store(one).listed for one in (out, stores["tinyvit"]))
    assert here == there  # the same rows, to the byte
    values = folder / "logits_top3_epoch2" / "rank1-values.bin"
    values.write_bytes(values.read_bytes()[:-1])
    assert "191 bytes, 12 keys of 16 bytes make 192" in refused(*importing(photos, "tinyvit", tmp_path / "cut"))
    shutil.rmtree(folder / "logits_top3_epoch2")
    (folder / "logits_top5_epoch2").mkdir()
    assert "Give one kind" in refused(*importing(photos, "tinyvit", tmp_path / "cut"))


def test_images_that_other_programs_see_otherwise_are_left_out(photos, tmp_path):
    """Of a turned and a transparent one, other programs' crops are of other pixels."""
    train = write_pictures(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(train / "cat" / "a.png") as image:
        image.copy().save(train / "cat" / "a.png", exif=turned)
    with Image.open(train / "dog" / "a.png") as image:
        image.convert("RGBA").save(train / "dog" / "a.png")
    pack = ["--out", tmp_path / "photos", "--split", "train", "--write", tmp_path / "manifest.yaml"]
    assert invoke("data", "pack", "imagefolder", "--source", train, *pack).exit_code == 0
    result = invoke(*importing(tmp_path, "fkd", tmp_path / "store"))
    assert result.exit_code == 0, result.stderr
    assert "cat/a: the image is turned by its EXIF orientation (6)" in result.stderr
    assert "dog/a: the image is transparent" in result.stderr
    assert "lost: 2 of 24 images" in result.stderr
    where = ["--manifest", tmp_path / "manifest.yaml", "--data-root", tmp_path]
    assert invoke("store", "verify", tmp_path / "store", "--dataset", *where).exit_code == 0
    assert open_store(tmp_path / "store").manifest.left_out == 2
