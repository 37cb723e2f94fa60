"""Tars: packed to the same bytes, read only when whole, and bad ones named to the sample."""

import gzip
import io
import os
import pickle
import re
import struct
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import invoke, refused
from PIL import ExifTags, Image

from offline_kd.data.blocks import BlockLoader, load_block
from offline_kd.data.checking import check_dataset
from offline_kd.data.decoding import decode_image
from offline_kd.data.folders import look_through
from offline_kd.data.manifest import Dataset, Manifest, Split, Tar, load_manifest
from offline_kd.data.manifest_merging import manifest_entry, merge_dataset
from offline_kd.data.packing import (
    cifar_samples,
    digits_samples,
    encode_png,
    pack,
)
from offline_kd.data.tars import Sample, hash_key, read_tar
from offline_kd.support.errors import DataError


def pixels(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def samples(count: int = 6) -> list[Sample]:
    return [Sample(f"{index:04d}", index % 3, encode_png(pixels(index)), "png") for index in range(count)]


def raw_tar(path, members: list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members_of(count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for sample in samples(count)
        for member in ((f"{sample.key}.cls", b"0"), (f"{sample.key}.png", sample.encoded))
    ]


def test_packing_twice_gives_the_same_bytes_and_what_was_packed(tmp_path):
    first = pack(samples(), tmp_path / "a", "train", 4)
    second = pack(samples(), tmp_path / "b", "train", 4)
    assert first == second
    assert [tar.count for tar in first] == [4, 2]
    assert not list(tmp_path.rglob("*.partial"))
    read = [sample for tar in first for sample in read_tar(tmp_path / "a" / tar.file, expected=tar)[0]]
    assert read == samples()
    block = load_block(tmp_path / "a" / first[0].file, first[0], 3)
    for index in range(4):
        assert np.array_equal(block.images[index].permute(1, 2, 0).numpy(), pixels(index))


def test_the_manifest_names_the_digits_that_packing_makes(manifest, data_root, roots):
    counts = check_dataset(manifest.dataset("digits"), roots, lambda tars: tars)
    assert counts == {"train": 1438, "test": 359}
    train = {sample.key for sample in digits_samples()["train"]}
    assert train.isdisjoint(sample.key for sample in digits_samples()["test"])


def test_digits_keep_their_pixels(data_root, manifest, roots):
    from sklearn.datasets import load_digits

    block = BlockLoader(manifest.dataset("digits"), manifest.split("digits", "test"), roots)[0]
    originals = load_digits().images[4::5]
    assert np.array_equal(np.round(block.images[:, 0].numpy() / 255 * 16), originals)


@pytest.mark.parametrize("extension", ["png", "webp", "jpg"])
@pytest.mark.parametrize("compressed", [False, True])
def test_png_webp_and_jpeg_are_read_from_plain_and_gzipped_tars(tmp_path, extension, compressed):
    buffer = io.BytesIO()
    options = {"lossless": True} if extension == "webp" else {}
    Image.fromarray(pixels(1)).save(buffer, format="JPEG" if extension == "jpg" else extension, **options)
    path = raw_tar(tmp_path / "t.tar", [("a/b-1.cls", b" 2\n"), (f"a/b-1.{extension}", buffer.getvalue())])
    if compressed:
        (tmp_path / "t.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "t.tar.gz"
    block = load_block(path, Tar(file=path.name, count=1), 3)
    assert block.keys == ["a/b-1"]
    assert block.labels.tolist() == [2]
    if extension != "jpg":
        assert np.array_equal(block.images[0].permute(1, 2, 0).numpy(), pixels(1))


def test_grey_images_become_three_equal_channels():
    grey = pixels(0)[:, :, 0]
    assert np.array_equal(np.asarray(decode_image(encode_png(grey))), np.repeat(grey[:, :, None], 3, axis=2))


def check_refused(path, pattern, *, count=6, classes=3):
    with pytest.raises(DataError, match=pattern):
        load_block(path, Tar(file=path.name, count=count), classes)


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    whole = raw_tar(tmp_path / "whole.tar", members_of(6)).read_bytes()
    whole = whole.rstrip(b"\0")  # the padding of a tar holds nothing that could be lost
    packed = gzip.compress(whole)
    for name, content in (("t.tar", whole), ("t.tar.gz", packed)):
        for share in (0.0, 0.1, 0.5, 0.9):
            (tmp_path / name).write_bytes(content[: int(len(content) * share)])
            check_refused(tmp_path / name, r"damaged or truncated|samples, the manifest says 6|expected one image")
    at_a_member = raw_tar(tmp_path / "member.tar", members_of(4))
    check_refused(at_a_member, "holds 4 samples, the manifest says 6")


def test_a_changed_tar_is_named_with_both_hashes(tmp_path):
    tar = pack(samples(), tmp_path, "train", 6)[0]
    content = bytearray((tmp_path / tar.file).read_bytes())
    content[700] ^= 1
    (tmp_path / tar.file).write_bytes(content)
    with pytest.raises(DataError, match=rf"sha256 is [0-9a-f]{{64}}, the manifest says {tar.sha256}"):
        load_block(tmp_path / tar.file, tar, 3)


@pytest.mark.parametrize(
    ("members", "pattern"),
    [
        (members_of(3) + members_of(1), "key '0000' is used twice, by samples 0 and 3"),
        (members_of(1) + members_of(1), "duplicate file name"),
        ([("img.5.png", b"x"), ("img.5.cls", b"0")], "A key ends at the first dot"),
        ([("a\tb.png", b"x"), ("a\tb.cls", b"0")], "its key holds a control character"),
        ([("b" * 257 + ".png", b"x"), ("b" * 257 + ".cls", b"0")], "its key has 257 bytes, a key has 1 to 256"),
        ([("../a.png", b"x"), ("../a.cls", b"0")], "its key begins or ends with '/', or leads through"),
        ([("a.png", encode_png(pixels(0)))], "found .png"),
        ([("a.cls", b"0")], "found .cls"),
        ([("a.png", encode_png(pixels(0))), ("a.cls", b"cat")], "the label is b'cat'"),
        ([("a.png", encode_png(pixels(0))), ("a.cls", b"3")], r"label 3, but the dataset has 3 classes"),
        ([("a.png", encode_png(pixels(0))[:60]), ("a.cls", b"0")], "sample 'a': the image cannot be decoded"),
        ([("a.png", b"no image"), ("a.cls", b"0")], "sample 'a': the image cannot be decoded"),
        (
            [("a.cls", b"0"), ("a.png", encode_png(pixels(0))), ("b.cls", b"0"), ("b.png", encode_png(pixels(0, 9)))],
            "sample 'b': the image is 9x9, the first of the tar is 8x8",
        ),
    ],
)
def test_bad_samples_are_named(tmp_path, members, pattern):
    count = len({name for name, _ in members if name.endswith("cls")}) or 1
    path = raw_tar(tmp_path / "t.tar", members)
    check_refused(path, pattern, count=count)


def test_checking_a_dataset_names_the_first_difference(tmp_path):
    tars = pack(samples(), tmp_path / "set", "train", 3)
    dataset = Dataset(folder="set", classes=["a", "b", "c"], splits={"train": Split(tars=tars)})
    assert check_dataset(dataset, [tmp_path], lambda tars: tars) == {"train": 6}
    with pytest.raises(DataError, match=r"no sample of 1 of 4 classes, such as 3 \('d'\)"):
        check_dataset(dataset.model_copy(update={"classes": ["a", "b", "c", "d"]}), [tmp_path], lambda tars: tars)
    with pytest.raises(DataError, match="label 2, the manifest names 2 classes"):
        check_dataset(dataset.model_copy(update={"classes": ["a", "b"]}), [tmp_path], lambda tars: tars)
    twice = Dataset(folder="set", classes=["a", "b", "c"], splits={"train": Split(tars=[tars[0], tars[0]])})
    with pytest.raises(DataError, match=r"its key was used before, in train-000000\.tar"):
        check_dataset(twice, [tmp_path], lambda tars: tars)
    (tmp_path / "set" / tars[1].file).unlink()
    with pytest.raises(DataError, match=r"train-000001.tar: not found in"):
        check_dataset(dataset, [tmp_path], lambda tars: tars)


def test_packing_refuses_bad_keys_and_nothing(tmp_path):
    with pytest.raises(DataError, match="comes twice"):
        pack([samples()[0], samples()[0]], tmp_path, "t", 10)
    with pytest.raises(DataError, match=re.escape("key 'a.b'")):
        pack([Sample("a.b", 0, b"", "png")], tmp_path, "t", 10)
    with pytest.raises(DataError, match="nothing to pack"):
        pack([], tmp_path, "t", 10)


def test_an_image_folder_is_packed_byte_for_byte(tmp_path):
    for name in ("cat/a.png", "cat/a.jpg", "dog/deep er/b!.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(len(name))).save(tmp_path / name)
    found = look_through(tmp_path)
    listed = list(found.samples("train"))
    assert found.classes == ["cat", "dog"]
    hashes = [hash_key(sample.key) for sample in listed]
    assert hashes == sorted(hashes)  # so that every tar has images of many classes
    listed.sort(key=lambda sample: sample.key)
    assert [sample.label for sample in listed] == [0, 0, 1]
    assert listed[0].key == "cat/a"
    assert re.fullmatch(r"cat/a_[0-9a-f]{8}", listed[1].key)
    assert listed[2].key == "dog/deep_er/b_"
    assert listed[2].encoded == (tmp_path / "dog/deep er/b!.png").read_bytes()
    (tmp_path / "cat" / "a.png").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"cat/a.png: was changed while the folder was packed"):
        list(found.samples("train"))


def test_a_small_split_may_lack_a_class_and_the_largest_may_not(tmp_path, capsys):
    tars = {
        "train": pack(samples(), tmp_path / "set", "train", 6),
        "val": pack([replace(one, label=0) for one in samples()[:2]], tmp_path / "set", "val", 6),
    }
    about = {"folder": "set", "classes": ["a", "b", "c"]}
    dataset = Dataset(**about, splits={part: Split(tars=some) for part, some in tars.items()})
    assert check_dataset(dataset, [tmp_path], lambda tars: tars) == {"train": 6, "val": 2}
    assert "split 'val': no sample of 2 of 3 classes, such as 1 ('b')" in capsys.readouterr().err


def folder_of(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(len(name))).save(root / name)
    return root


def test_a_folder_of_splits_is_packed_whole_and_never_as_classes(tmp_path):
    photos = folder_of(tmp_path / "photos", "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png")
    pack = ("data", "pack", "imagefolder", "--out", tmp_path / "data" / "photos")
    entry = yaml.safe_load(invoke(*pack, "--source", photos).stdout)["datasets"]["photos"]
    dataset = Dataset.model_validate(entry)
    assert dataset.classes == ["cat", "dog"]
    assert list(dataset.splits) == ["train", "val"]
    assert check_dataset(dataset, [tmp_path / "data"], lambda tars: tars) == {"train": 2, "val": 2}
    assert "holds splits (train, val), not classes" in refused(*pack, "--source", photos, "--split", "train")
    one = yaml.safe_load(invoke(*pack, "--source", photos / "val", "--split", "val").stdout)["datasets"]["photos"]
    assert one["splits"] == {"val": entry["splits"]["val"]}
    folder_of(photos, "val/cow/e.png")
    assert "class 'cow' has 1 picture in val and none in train" in refused(*pack, "--source", photos)
    loose = folder_of(tmp_path / "loose", "train/cat/a.png", "train/dog/b.png", "test/x.png")
    assert "test: 0 class folders" in refused(*pack, "--source", loose)
    unusual = folder_of(tmp_path / "unusual", "fold0/a/1.png", "fold0/b/2.png", "fold1/a/3.png", "fold1/b/4.png")
    assert list(look_through(unusual).splits) == ["fold0", "fold1"]
    vehicles = folder_of(tmp_path / "vehicles", "car/a.png", "train/b.png", "train/steam/c.png")
    found = look_through(vehicles)
    assert (list(found.splits), found.classes) == (["train"], ["car", "train"])


def huge_png() -> bytes:
    """A header that promises 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT"]
    written = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def saved(kind: str, size: int = 8, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(size, size)).save(buffer, kind, **options)
    return buffer.getvalue()


def test_packing_lists_all_bad_pictures_at_once_and_leaves_them_out_when_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = folder_of(tmp_path / "photos", "cat/a.png", "cat/b.JPG", "dog/c.png")
    files = {
        "cat/notes.txt": b"hello",
        "cat/Thumbs.db": b"\xd0\xcf\x11\xe0",
        "cat/.hidden.png": saved("PNG"),
        "dog/.checkpoints/x.png": saved("PNG"),
        "dog/jpeg without a name": saved("JPEG"),
        "dog/deep/PNG.tmp": saved("PNG"),
        "README.md": b"about",
        "__MACOSX/dog/c.png": b"",
    }
    bad = {
        "cat/empty.jpg": (b"", "an empty file"),
        "cat/cut.png": (saved("PNG", 64)[:900], "truncated"),
        "dog/text.jpeg": (b"no picture", "no picture inside"),
        "dog/moving.gif": (saved("GIF"), "a GIF is not read"),
        "dog/phone.heic": (b"\0\0\0\x18ftypheic", "a heic is not read"),
        "dog/huge.png": (huge_png(), "more than 134,217,728 pixels"),
    }
    for name, content in [*files.items(), *((name, content) for name, (content, _) in bad.items())]:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(content)
    (photos / "dog/lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (photos / "dog/linked.png").symlink_to(photos / "cat/a.png")
    (photos / "dog/more").symlink_to(photos / "cat")
    os.mkfifo(photos / "dog/pipe.png")
    pack = ("data", "pack", "imagefolder", "--source", "photos", "--out", "data/photos", "--write", "manifest.yaml")
    result = invoke(*pack)
    assert result.exit_code == 1
    for name, problem in [
        *((name, problem) for name, (_, problem) in bad.items()),
        ("dog/lost.jpg", "a link to nothing"),
    ]:
        assert re.search(rf"^photos/{name}: .*{problem}", result.stderr, re.MULTILINE), result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: photos: 7 bad pictures: ")
    assert last.endswith("Repair or remove them, or leave them out: --bad-images skip.")
    assert not (tmp_path / "data").exists()

    said = invoke(*pack, "--bad-images", "skip").stderr
    left_out = next(line for line in said.splitlines() if "no picture:" in line)
    for what in (".txt (1)", ".db (1)", "hidden (2)", "outside of class folders (1)", "links to folders (1)"):
        assert what in left_out
    assert "neither file nor folder (1)" in left_out
    check = invoke("data", "check", "photos", "--manifest", "manifest.yaml", "--data-root", "data")
    assert "photos: train 6 samples, all good" in check.output
    assert "--bad-images: for imagefolder only" in refused("data", "pack", "digits", "--bad-images", "skip")
    inside = ("data", "pack", "imagefolder", "--source", "photos", "--out", "photos/packed")
    assert "lies in the folder of the pictures" in refused(*inside)


def test_names_that_keys_cannot_hold_stay_apart(tmp_path):
    names = ("\u65e5/a.png", "\u672c/a.png", "\u4e2d/a.png", "\u4e2d/\U0001f600.png", f"\u4e2d/{'x' * 250}.png")
    photos = look_through(folder_of(tmp_path / "photos", *names))
    listed = {one.key: one for one in photos.samples("train")}
    assert len(listed) == 5
    assert {photos.classes[one.label] for one in listed.values()} == {"\u65e5", "\u672c", "\u4e2d"}
    pack(listed.values(), tmp_path / "data", "train", 10)


def test_pictures_are_as_large_as_they_are_upright(tmp_path):
    folder_of(tmp_path, "cat/a.png", "dog/b.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels(1)[:5]).save(tmp_path / "cat/turned.jpg", exif=exif)
    sizes = {one.path.name: one.size for one in look_through(tmp_path).splits["train"]}
    assert sizes == {"a.png": (8, 8), "b.png": (8, 8), "turned.jpg": (8, 5)}


MANIFEST = """# About this file
manifest_version: 1
datasets:
  first:  # of many
    folder: first
    classes: &names [a, b]
    splits:
      train:
        tars:
        - {file: x.tar, count: 1}
  # between
  second: {folder: second, classes: *names, splits: {train: {tars: [{file: y.tar, count: 1}]}}}

# the end
teachers: {}
"""


def test_packing_writes_into_a_manifest_and_leaves_its_other_lines(tmp_path):
    """One split after the other: the second does not take the place of the first."""
    photos = folder_of(tmp_path / "photos", "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    file = tmp_path / "manifest.yaml"
    file.write_text(MANIFEST)
    pack = ("data", "pack", "imagefolder", "--write", file)
    for split in ("train", "val"):
        one = (*pack, "--source", photos / split, "--split", split, "--out", tmp_path / "data" / "new")
        assert invoke(*one).exit_code == 0
    assert list(load_manifest(file).dataset("new").splits) == ["train", "val"]
    check = ("data", "check", "new", "--manifest", file, "--data-root", tmp_path / "data")
    assert "new: train 2 samples, val 2 samples, all good" in invoke(*check).output
    before, after = MANIFEST.split("\n\n")
    assert file.read_text().startswith(before)
    assert file.read_text().endswith(after)

    # Into a dataset that is there: its other splits stay, and classes that others refer to.
    assert invoke(*pack, "--source", photos, "--out", tmp_path / "data" / "first").exit_code == 0
    merged = load_manifest(file)
    assert {name: split.count for name, split in merged.dataset("first").splits.items()} == {"train": 2, "val": 2}
    assert merged.dataset("second") == Manifest.model_validate(yaml.safe_load(MANIFEST)).dataset("second")
    assert "# of many" in file.read_text()
    again = file.read_text()
    assert invoke(*pack, "--source", photos, "--out", tmp_path / "data" / "first").exit_code == 0
    assert file.read_text() == again

    # Where it cannot be done, nothing is changed.
    others = folder_of(tmp_path / "others", "a/1.png", "c/2.png")
    wrong = (*pack, "--source", others, "--out", tmp_path / "data" / "first")
    assert "other classes: 'b' is now 'c'" in refused(*wrong)
    assert "is in folder 'second', not in 'elsewhere'" in merge_error(file, "second", "elsewhere", ["a", "b"])
    assert file.read_text() == again
    one_line = tmp_path / "one_line.yaml"
    one_line.write_text(
        "datasets: {second: {folder: s, classes: [a, b], splits: {t: {tars: [{file: x, count: 1}]}}}}\n"
    )
    before = one_line.read_text()
    assert "cannot be merged into as it is written" in merge_error(one_line, "new", "new", ["a", "b"])
    assert one_line.read_text() == before
    fresh = ("data", "pack", "digits", "--out", tmp_path / "data" / "digits", "--write", tmp_path / "fresh.yaml")
    assert invoke(*fresh).exit_code == 0
    assert list(load_manifest(tmp_path / "fresh.yaml").dataset("digits").splits) == ["train", "test"]


def merge_error(file, name, folder, classes) -> str:
    with pytest.raises(DataError) as caught:
        merge_dataset(file, name, manifest_entry(folder, classes, {"train": [Tar(file="x.tar", count=1)]}))
    return str(caught.value)


def test_a_dataset_without_splits_is_not_all_good(tmp_path):
    file = tmp_path / "manifest.yaml"
    file.write_text("datasets: {photos: {folder: photos, classes: [a, b], splits: {}}}\n")
    assert "'datasets.photos.splits'" in refused("data", "check", "photos", "--manifest", file)


def test_official_cifar_archives_are_packed_in_official_order(tmp_path, monkeypatch):
    """A small archive in CIFAR-100's own layout, with its own md5s in place of the published ones."""
    import hashlib

    from torchvision import datasets

    folder = tmp_path / datasets.CIFAR100.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    content = {name: rng.integers(0, 256, (count, 3072), dtype=np.uint8) for name, count in (("train", 7), ("test", 3))}
    md5 = {}
    for name, rows in content.items():
        raw = pickle.dumps({"data": rows, "fine_labels": [index % 3 for index in range(len(rows))]})
        (folder / name).write_bytes(raw)
        md5[name] = hashlib.md5(raw).hexdigest()
    raw = pickle.dumps({"fine_label_names": ["apple", "baby", "bear"]})
    (folder / "meta").write_bytes(raw)
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(
        datasets.CIFAR100,
        "meta",
        {"filename": "meta", "key": "fine_label_names", "md5": hashlib.md5(raw).hexdigest()},
    )
    splits, classes = cifar_samples("cifar100", tmp_path)
    assert classes == ["apple", "baby", "bear"]
    train = list(splits["train"])
    assert [sample.key for sample in train[:2]] == ["000000", "000001"]
    decoded = torch.from_numpy(np.stack([np.asarray(decode_image(sample.encoded)) for sample in train])).permute(
        0, 3, 1, 2
    )
    assert np.array_equal(decoded.numpy().reshape(7, -1), content["train"])
    (folder / "train").write_bytes(b"damaged")
    with pytest.raises(DataError, match="missing or damaged"):
        cifar_samples("cifar100", tmp_path)


def test_the_command_line_packs_lists_and_checks(tmp_path, manifest):
    result = invoke("data", "pack", "digits", "--out", tmp_path / "digits")
    assert result.exit_code == 0
    entry = yaml.safe_load(result.stdout)["datasets"]["digits"]
    assert Dataset.model_validate(entry).splits == manifest.dataset("digits").splits
    options = ("--manifest", "data_manifest.yaml", "--data-root", tmp_path)
    assert (
        "digits: train 1,438 samples, test 359 samples, all good" in invoke("data", "check", "digits", *options).output
    )
    assert "cifar10_resnet56" in invoke("data", "list", *options).output
    assert "Did you mean 'digits'?" in refused("data", "check", "digts", *options)
    assert "give --source" in refused("data", "pack", "cifar100")
    first = tmp_path / "digits" / "train-000001.tar"
    first.write_bytes(first.read_bytes()[:-2000])
    assert "train-000001.tar: sha256 is" in refused("data", "check", "digits", *options)


@pytest.mark.slow
def test_every_real_dataset_is_the_one_the_manifest_names(real_data):
    for name in ("imagenet_sample", "cifar10"):
        result = invoke("data", "check", name, "--data-root", real_data)
        assert result.exit_code == 0, result.output
        assert "all good" in result.output
