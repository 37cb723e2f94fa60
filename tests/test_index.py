"""Webdatasets that exist, as they are: indexed, proven, captured, trained from."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import invoke, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, photograph
from test_data import raw_tar
from test_remote import s3, server  # noqa: F401
from webdataset import ShardWriter, TarWriter

import offline_kd as okd
from offline_kd.data.blocks import BlockLoader, load_block
from offline_kd.data.labels import CLS, labels_of
from offline_kd.data.manifest import Manifest, load_manifest
from offline_kd.data.packing import digits_samples, encode_png
from offline_kd.data.tars import (
    MAX_KEY_BYTES,
    Sample,
    _plain_files,
    pack_keys,
    parse_samples,
    problem_of_key,
    unpack_keys,
)
from offline_kd.store.join import Wanted, join
from offline_kd.store.layout import NO_LABEL
from offline_kd.store.lookup import stored_keys
from offline_kd.store.opening import open_store
from offline_kd.support.errors import DataError
from offline_kd.support.places import Bucket

SYNSETS = ["n02018795", "n01440764", "n07717410"]


def timm(folder: Path, split: str, count: int, each: int = 4) -> str:
    """As `timm/imagenet-1k-wds`: its keys, its three members, its numbering; written by webdataset's own writer."""
    folder.mkdir(exist_ok=True)
    start = {"train": 0, "validation": 500}[split]
    with ShardWriter(str(folder / f"imagenet1k-{split}-%04d.tar"), maxcount=each, verbose=0) as writer:
        for index in range(start, start + count):
            label = index % 3
            key, about = f"{SYNSETS[label]}_{index}", {"label": label, "height": 32, "width": 40}
            about["filename"] = f"{SYNSETS[label]}/{key}.JPEG"
            writer.write({"__key__": key, "jpg": encoded(photograph(index, 32, 40)), "cls": label, "json": about})
    return f"{folder}/imagenet1k-{split}-{{0000..{-(-count // each) - 1:04d}}}.tar"


def img2dataset(folder: Path, shard: str, samples: dict[str, bytes]) -> None:
    """As `img2dataset --output_format webdataset --encode_format png`: image, caption, metadata; figures beside it."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{shard}.tar").open("wb") as file, TarWriter(file) as writer:
        for key, image in samples.items():
            about = {"url": f"https://example.org/{key}", "caption": "a digit", "key": key, "status": "success"}
            writer.write({"__key__": key, "png": image, "txt": "a digit", "json": json.dumps(about, indent=4)})
    (folder / f"{shard}_stats.json").write_text("{}")
    (folder / f"{shard}.parquet").write_bytes(b"PAR1")


def test_imagenet_as_timm_has_it_is_indexed_checked_and_grows_by_a_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, validation = (timm(tmp_path / "wds", split, 10) for split in ("train", "validation"))
    (tmp_path / "names.txt").write_text("\n".join(SYNSETS) + "\n")
    (tmp_path / "data_manifest.yaml").write_text("# ours\nmanifest_version: 1\n")
    index = ["data", "index", "--name", "imagenet", "--classes", "names.txt"]
    said = invoke(*index, train, "--split", "train", "--workers", 1).stderr
    assert "samples by class: n02018795 4, n01440764 3, n07717410 3" in said
    assert "3 tars, 10 samples" in said
    invoke(*index, validation, "--split", "val", "--label", "json:label", "--workers", 1)

    text = (tmp_path / "data_manifest.yaml").read_text()
    assert text.startswith("# ours")
    about = yaml.safe_load(text)["datasets"]["imagenet"]
    assert about["location"] == "wds"
    assert about["splits"]["val"] == {
        "index": "imagenet-val.index.json",
        "sha256": about["splits"]["val"]["sha256"],
        "labels": "json:label",
    }
    assert "tars" not in about["splits"]["train"]
    dataset = load_manifest(tmp_path / "data_manifest.yaml").dataset("imagenet")
    assert [tar.count for tar in dataset.splits["train"].tars] == [4, 4, 2]
    (block, *_) = BlockLoader(dataset, dataset.splits["val"], [], decode=False)
    assert block.labels.tolist() == [index % 3 for index in range(500, 504)]
    assert block.keys[0] == "n07717410_500"
    assert "train 10 samples, val 10 samples, all good" in invoke("data", "check", "imagenet").stdout
    listed = invoke("data", "list").stdout
    assert "3 classes; train 10, val 10" in listed
    assert "yes" in listed

    changed = (tmp_path / "imagenet-train.index.json").read_text().replace('"count":2', '"count":3')
    (tmp_path / "imagenet-train.index.json").write_text(changed)
    assert "imagenet-train.index.json: sha256 is" in refused("data", "check", "imagenet")
    (tmp_path / "imagenet-train.index.json").unlink()
    assert "imagenet-train.index.json: an index of tars that cannot be read" in refused("data", "list")


def test_labels_may_be_names_and_what_is_none_is_said(tmp_path):
    tar, image = tmp_path / "a.tar", encode_png(np.zeros((4, 4, 3), np.uint8))

    def tar_of(*contents: object) -> None:
        members = [(f"{i}.png", f"{i}.json", content) for i, content in enumerate(contents)]
        raw_tar(
            tar, [one for png, about, said in members for one in ((png, image), (about, json.dumps(said).encode()))]
        )

    index = ["data", "index", tar, "--name", "set", "--manifest", tmp_path / "m.yaml", "--label", "json:class_name"]
    for content, problem in (
        ({"class_name": 1.5}, "sample '1': the label is 1.5, no index and no name of a class"),
        ({"class_name": -1}, "the label is -1"),
        ({"class_name": True}, "the label is True"),
        ({"name": "dog"}, "sample '1': expected one image (png, jpg, jpeg, webp) and a .json that says its label"),
        ([], "a .json that says its label, found .png, .json"),
        ({"class_name": 3}, "some labels are names, as 'cat', others numbers, as 3"),
        ({"class_name": "cat"}, "all labels are 'cat': one class only"),
    ):
        tar_of({"class_name": "cat"}, content)
        assert problem in refused(*index)
    assert not (tmp_path / "m.yaml").exists()
    tar_of({"class_name": "dog"}, {"class_name": "cät"}, {"class_name": "dog"})
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    assert "a.tar: has label 'cät', the dataset has 2 classes." in refused(*index, "--classes", tmp_path / "names.txt")
    assert "samples by class: cät 1, dog 2" in invoke(*index).stderr
    dataset = load_manifest(tmp_path / "m.yaml").dataset("set")
    assert BlockLoader(dataset, dataset.splits["train"], [])[0].labels.tolist() == [1, 0, 1]
    block = load_block(tar, dataset.splits["train"].tars[0], 2, labels=labels_of("none", ["a", "b"]))
    assert block.labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("members", "left_out", "problem"),
    [
        (
            [("_stats.json", b"{}"), ("readme.txt", b"x"), ("docs/notes.txt", b"x")],
            ["_stats", "readme", "docs/notes"],
            "",
        ),
        ([("1.png", b"x"), ("1.seg.png", b"y"), ("1.txt", b"z"), ("1.cls", b"0"), ("1.cls.txt", b"cat")], [], ""),
        ([("1.txt", b"x"), ("1.png", b"x")], [], "sample '1': expected one image"),
        ([("1.txt", b"x"), ("1.cls", b"0")], [], "sample '1': expected one image"),
        ([("2020.01.02.png", b"x")], [], "sample '2020': expected one image .* found .01.02.png"),
    ],
)
def test_files_that_are_none_of_ours_are_left_out_and_halves_of_samples_are_not(tmp_path, members, left_out, problem):
    whole = [("0.png", b"x"), ("0.cls", b"1")]
    content, found = raw_tar(tmp_path / "a.tar", [*whole, *members]).read_bytes(), []
    if problem:
        with pytest.raises(DataError, match=problem):
            parse_samples(content, "a.tar", CLS)
    else:
        samples = parse_samples(content, "a.tar", CLS, found)
        assert (found, samples[0], len(samples)) == (left_out, Sample("0", 1, b"x", "png"), 1 if left_out else 2)


def test_what_is_wrong_with_tars_is_named_and_only_what_is_open_is_read_again(tmp_path):
    named, image = timm(tmp_path, "train", 12), encode_png(np.zeros((4, 4, 3), np.uint8))
    index = ["data", "index", named, "--name", "set", "--manifest", tmp_path / "m.yaml", "--workers", 1]
    last = tmp_path / "imagenet1k-train-0002.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:3000])
    assert "imagenet1k-train-0002.tar: damaged or truncated" in refused(*index)
    assert not (tmp_path / "m.yaml").exists()
    first = tmp_path / "imagenet1k-train-0000.tar"
    key = "n01440764_7"  # of the second tar
    raw_tar(first, [(f"{key}.png", image), (f"{key}.cls", b"0")])
    last.write_bytes(whole)
    result = refused(*index)
    assert f"key '{key}' is that of samples in 2 tars: imagenet1k-train-0000.tar, imagenet1k-train-0001.tar" in result
    raw_tar(first, [("new.png", image), ("new.cls", b"0")])
    said = invoke(*index).stderr
    assert "2 of 3 tars were read before and are unchanged" in said
    dataset = load_manifest(tmp_path / "m.yaml").dataset("set")
    assert [tar.count for tar in dataset.splits["train"].tars] == [1, 4, 4]
    assert dataset.classes == ["0", "1", "2"]
    assert not list(tmp_path.glob("*.partial"))
    assert "read before" not in invoke(*index).stderr  # the index is whole: all are read again

    for tars, problem in (
        ([tmp_path / "no-*.tar"], "there is no such file"),
        ([tmp_path / "no.tar"], "no.tar: cannot be read (No such file or directory)"),
        ([last, named], "is named twice"),
        ([tmp_path / "{000..tar"], "Write ranges as {000..123}"),
        ([last, "s3://team/a.tar"], "must lie in one place"),
    ):
        assert problem in refused("data", "index", *tars, *index[3:])
    (tmp_path / "other").mkdir()
    moved = last.rename(tmp_path / "other" / "b.tar")
    assert "dataset 'set' lies in" in refused("data", "index", moved, *index[3:], "--split", "val")


KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd"), min_size=1, max_size=90)


@settings(max_examples=60)
@given(st.lists(KEYS, min_size=1, max_size=6, unique=True), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_any_key_that_the_rule_allows_survives_a_tar_and_a_store(keys, tar_format):
    keys = [key for key in keys if not problem_of_key(key) and "." not in key.rpartition("/")[2]]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name in (name for key in keys for name in (f"{key}.png", f"{key}.cls")):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 1, 1.5  # a fraction, as webdataset's writer has it
            tar.addfile(info, io.BytesIO(b"0"))
    if keys and tar_format == tarfile.PAX_FORMAT:
        with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
            assert [file["fname"] for file in _plain_files(buffer.getvalue())] == tar.getnames()
    assert [sample.key for sample in parse_samples(buffer.getvalue(), "a.tar", CLS)] == keys
    assert unpack_keys(pack_keys(keys)) == keys


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a/../b",
        "..",
        "a\nb",
        "a\x00",
        "\x85",
        "\ufffd",
        "a\udcff",
        "a" * (MAX_KEY_BYTES + 1),
        "é" * 129,
    ],
)
def test_a_key_that_the_rule_refuses_is_refused(key):
    assert problem_of_key(key)
    assert not problem_of_key("a" * MAX_KEY_BYTES)


ODD = [
    "a b+c@d",
    "n01440764/n01440764_10026",
    "./köln",
    "ko\u0308ln",
    "日本/写真",
    "v1.0/x",
    "👩\u200d🚀",
    "A",
    "a",
    "%2e",
    "é" * 128,
]


@pytest.fixture(scope="module")
def crawled(recipe, tmp_path_factory) -> tuple[Path, Manifest]:
    """Digits as img2dataset leaves them, without labels and with all kinds of keys, and a split with labels."""
    folder = tmp_path_factory.mktemp("crawled")
    digits = digits_samples()
    images = [one.encoded for one in digits["train"][:60]]
    keys = [*ODD, *(f"{index:09d}" for index in range(60 - len(ODD)))]
    for shard in range(2):
        some = slice(30 * shard, 30 * shard + 30)
        img2dataset(folder / "digits", f"{shard:05d}", dict(zip(keys[some], images[some], strict=True)))
    members = [
        (f"{one.key}.{kind}", value)
        for one in digits["test"][:80]
        for kind, value in (("cls", str(one.label).encode()), ("png", one.encoded))
    ]
    raw_tar(folder / "digits" / "val.tar", members)
    (folder / "names.txt").write_text("\n".join(reversed("0123456789")))
    index = ["data", "index", "--name", "digits", "--manifest", folder / "m.yaml", "--workers", 1]
    bare = [*index[:3], "bare", *index[4:], folder / "digits" / "0*.tar", "--label", "none"]
    assert "no labels; 0 classes" in invoke(*bare).stderr
    said = invoke(*index, folder / "digits" / "0*.tar", "--label", "none", "--num-classes", 10).stderr
    assert "no labels; 10 classes" in said
    labelled = ["data", "index", folder / "digits" / "val.tar", "--name", "labelled", *index[4:], "--split", "test"]
    invoke(*labelled)
    invoke(*labelled[:3], "--name", "shuffled", *labelled[5:], "--classes", folder / "names.txt")
    return folder, load_manifest(folder / "m.yaml")


def test_a_dataset_without_labels_and_with_any_keys_is_captured_verified_and_trained_from(
    crawled, recipe, recipe_file, tmp_path
):
    folder, manifest = crawled
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"evaluation": "labelled/test"})})
    recipe_file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    store, where = tmp_path / "store", ("--manifest", folder / "m.yaml")
    assert "has no labels" in refused(
        "cache-teacher", recipe_file, "--store", store, *where, "--set", "data.evaluation=train"
    )
    decisions = "capture.decisions={s: {kind: subclasses, module: body.2, per_class: 2, components: 2}}"
    assert "capture.decisions.s needs them" in refused(
        "cache-teacher", recipe_file, "--store", store, *where, "--set", decisions
    )
    assert not (store / "store.json").exists()
    invoke("cache-teacher", recipe_file, "--store", store, *where)
    opened = open_store(store)
    assert opened.manifest.fidelity[""].teacher_top1 is None
    assert stored_keys(opened)[: len(ODD)] == ODD
    assert (opened.read(0, 0, ["label"])["label"] == NO_LABEL).all()
    assert "there are no labels" in (store / "README.md").read_text()
    assert invoke("store", "verify", store, "--dataset", *where).exit_code == 0
    explored = invoke("store", "explore", store, "--out", tmp_path / "gallery", "--samples", 4, *where)
    assert explored.exit_code == 0, explored.output
    gallery = (tmp_path / "gallery/index.html").read_text()
    assert "<img" in gallery
    assert 'id="confusions"' not in gallery  # nor anything else that needs labels
    rows = list(csv.DictReader((tmp_path / "gallery/samples.csv").read_text().splitlines()))
    assert {(row["label"], row["agreement"]) for row in rows} == {("", "")}
    page = tmp_path / "page.html"
    invoke("store", "inspect", store, "--key", ODD[4], "--out", page, *where, "--data-root", folder)
    assert ODD[4] in page.read_text()

    dataset = manifest.dataset("digits")
    block = BlockLoader(dataset, dataset.splits["train"], [])[0]
    rows = join(opened, block, 0, np.zeros(len(block), dtype=np.int64), Wanted())
    assert rows.labels.tolist() == [-1] * len(block)

    distill = ("distill", recipe_file, "--store", store, *where, "--out")
    message = refused(*distill, tmp_path / "refused", "--objective", "kd")
    assert "digits/train: has no labels" in message
    assert "the term 'ce' of the objective needs them" in message
    alone = "objectives.kd=[{term: kd, temperature: 4}]"
    shuffled = ("--objective", "kd", "--set", alone, "--set", "data.evaluation=shuffled/test")
    assert "has other classes" in refused(*distill, tmp_path / "run", *shuffled)
    invoke(*distill, tmp_path / "run", "--objective", "kd", "--set", alone)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["top1"] >= 0
    batches = list(okd.open_store(store).loader(folder / "digits", batch_size=20).epoch(0))
    assert sum(int((batch.labels == -1).sum()) for batch in batches) == 60


def test_a_bucket_is_indexed_where_it_is_and_what_was_replaced_is_read_again(s3, tmp_path):  # noqa: F811
    timm(tmp_path / "wds", "train", 12)
    place = Bucket(f"s3://team/{tmp_path.name}")
    files = sorted((tmp_path / "wds").glob("*.tar"))
    for file in files[:2]:
        place.put(f"in/{file.name}", file.read_bytes())
    manifest = tmp_path / "m.yaml"
    index = ["data", "index", "--name", "net", "--manifest", manifest, "--workers", 1]
    ranged = f"{place}/in/imagenet1k-train-{{0000..0002}}.tar"
    assert "imagenet1k-train-0002.tar: cannot be read (not found)" in refused(*index, ranged)
    place.put(f"in/{files[2].name}", files[2].read_bytes())
    image = encode_png(np.zeros((4, 4, 3), np.uint8))
    place.put(f"in/{files[0].name}", raw_tar(tmp_path / "a.tar", [("x.png", image), ("x.cls", b"1")]).read_bytes())
    before = s3.control()["GET"]
    assert "1 of 3 tars were read before and are unchanged" in invoke(*index, f"{place}/*/imagenet1k-*.tar").stderr
    assert s3.control()["GET"] - before <= 4  # two tars, and the listing
    about = yaml.safe_load(manifest.read_text())["datasets"]["net"]
    assert about["location"] == f"{place}/in"
    tars = load_manifest(manifest).split("net", "train").tars
    assert [(tar.file, tar.count) for tar in tars] == [(file.name, n) for file, n in zip(files, (1, 4, 4), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_every_engine_finds_what_one_process_finds(engine, tmp_path, monkeypatch):
    if engine == "ray":
        pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    named = timm(tmp_path / "wds", "train", 12)
    entries = []
    for workers, name in ((1, "processes"), (2, engine)):
        manifest = tmp_path / f"{workers}" / "m.yaml"
        manifest.parent.mkdir()
        invoke("data", "index", named, "--name", "set", "--manifest", manifest, "--workers", workers, "--engine", name)
        entries.append((manifest.parent / "set-train.index.json").read_bytes())
    assert entries[0] == entries[1]
    (tmp_path / "wds" / "imagenet1k-train-0001.tar").write_bytes(b"no tar")
    index = ("data", "index", named, "--name", "set", "--manifest", tmp_path / "other.yaml", "--engine", engine)
    assert "imagenet1k-train-0001.tar: damaged or truncated" in refused(*index, "--workers", 2)
