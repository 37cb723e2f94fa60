"""Which image, and which sample, a row is about: what is found, whoever changed it and however carefully."""

import hashlib
import json
import os
import shutil

import google_crc32c
import hypothesis.strategies as st
import numpy as np
import pytest
import yaml
from conftest import CPU, ROOT, invoke, refused
from hypothesis import given, settings
from test_store import small_dataset
from test_stream import digits, first_epoch, loader_of

from offline_kd.cache.pipeline import Worker, cache_teacher
from offline_kd.cache.unique_keys import KnownKeys
from offline_kd.data import proofs
from offline_kd.data.manifest import Tar
from offline_kd.data.packing import encode_png, pack
from offline_kd.data.tars import MAX_KEY_BYTES, Sample, read_tar
from offline_kd.store.opening import open_store
from offline_kd.support.errors import DataError, StoreMismatch

FIXTURES = ROOT / "tests" / "fixtures"


def forged(image: bytes, like: bytes) -> bytes:
    """An image with the crc32c of another one: four bytes behind it make that so, and no decoder looks at them."""
    change = google_crc32c.value(image + bytes(4)) ^ google_crc32c.value(like)
    rows = []  # what each bit of the tail does to the sum, and which bit it is
    for bit in range(32):
        tail = (1 << bit).to_bytes(4, "little")
        rows.append((google_crc32c.value(bytes(4)) ^ google_crc32c.value(tail), 1 << bit))
    solution = 0
    for place in range(32):
        pivot = next(row for row in rows if row[0] >> place & 1)
        rows = [(one ^ pivot[0], bits ^ pivot[1]) if one >> place & 1 else (one, bits) for one, bits in rows]
        if change >> place & 1:
            change, solution = change ^ pivot[0], solution ^ pivot[1]
    made = image + solution.to_bytes(4, "little")
    assert google_crc32c.value(made) == google_crc32c.value(like)
    return made


def all_forged(samples: list[Sample]) -> list[Sample]:
    white = encode_png(np.full((8, 8), 255, dtype=np.uint8))
    return [Sample(one.key, one.label, forged(white, one.encoded), one.extension) for one in samples]


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_with_forged_checksums_are_not_those_that_the_teacher_saw(recipe, data_root, store_path, tmp_path):
    loader = loader_of(tmp_path, [all_forged(digits(data_root))])
    with pytest.raises(StoreMismatch, match=r"the image of sample '\d{4}' \(and 1437 more\) has sha256 [0-9a-f]{32}, "):
        first_epoch(recipe, loader, store_path)


@pytest.mark.parametrize("version", [1, 2])
def test_with_an_old_store_the_tar_itself_is_proven_though_it_was_proven_before(version, data_root, where, tmp_path):
    """Such a store cannot tell: forged images have the checksums that it knows."""
    recipe = yaml.safe_load((FIXTURES / "store_v2" / "recipe.yaml").read_text())
    recipe["teacher"].pop("weights")
    if version == 1:
        recipe["teacher"].pop("model_args")
    recipe["capture"], recipe["objectives"].pop("letkd")
    recipe["views"]["count"] = {1: 4, 2: 2}[version]
    recipe["capture"] = {"codec": {"name": "f16"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(data_root / "digits", tmp_path / "data" / "digits")
    store = FIXTURES / "store_v1" if version == 1 else FIXTURES / "store_v2" / "store"
    command = ("distill", tmp_path / "recipe.yaml", "--store", store, "--objective", "kd", "--device", "cpu")
    options = (*where[:2], "--data-root", tmp_path / "data")
    result = invoke(*command, "--out", tmp_path / "right", *options)
    assert result.exit_code == 0, result.output
    assert "which can be forged" in " ".join(result.stderr.split())
    changed = tmp_path / "data" / "digits" / "train-000002.tar"
    pack(all_forged(read_tar(changed)[0]), tmp_path / "packed", "train", 10_000)
    changed.write_bytes((tmp_path / "packed" / "train-000000.tar").read_bytes())
    message = refused(*command, "--out", tmp_path / "wrong", *options)
    assert "train-000002.tar: sha256 is" in message


def test_a_tar_is_hashed_once_on_a_machine_until_it_changes(data_root, tmp_path, monkeypatch):
    file = tmp_path / "some.tar"
    shutil.copy(data_root / "digits" / "train-000002.tar", file)
    content = file.read_bytes()
    tar, hashed = Tar(file=file.name, count=414, sha256=hashlib.sha256(content).hexdigest()), []
    sha256 = hashlib.sha256

    def counted(content: bytes = b"", **options: bool):
        hashed.append(len(content))
        return sha256(content, **options)

    monkeypatch.setattr(hashlib, "sha256", counted)
    for times in (1, 1):  # the second time as another process, which finds what the first one wrote
        proofs._read.cache_clear()
        assert len(read_tar(file, expected=tar, prove="once")[0]) == 414
        assert hashed.count(len(content)) == times
    about = file.stat()
    changed = bytearray(content)
    changed[700] ^= 1
    with file.open("r+b") as opened:  # the same file, with the same size and time
        opened.write(changed)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(DataError, match=r"some\.tar: sha256 is"):
        read_tar(file, expected=tar, prove="once")
    file.write_bytes(content)
    assert len(read_tar(file, expected=tar, prove="once")[0]) == 414


@pytest.mark.parametrize("damage", [b"", b"\xff" * 1000, b"nothing\n\n", None])
def test_whatever_the_memory_of_proofs_holds_tars_are_read(damage, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_KD_CACHE", str(tmp_path / "cache"))
    if damage is None:
        (tmp_path / "cache").write_text("a file in place of the folder")
    else:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "proofs").write_bytes(damage)
    file = data_root / "digits" / "train-000002.tar"
    for _ in range(2):
        proofs._read.cache_clear()
        assert len(read_tar(file, prove="once")[0]) == 414


def test_info_says_what_a_store_can_prove(store_path):
    said = {
        path: json.loads(invoke("store", "info", path, "--json").stdout)["proof of images"]
        for path in (store_path, FIXTURES / "store_v2" / "store")
    }
    assert "the sha256 of every image" in said[store_path]
    assert "crc32c of every image, which can be forged" in said[FIXTURES / "store_v2" / "store"]


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_in_two_tars_is_found_where_two_writers_saw_one_each(recipe, manifest, data_root, tmp_path):
    samples = read_tar(data_root / "digits" / "train-000000.tar")[0]
    dataset = small_dataset(tmp_path, data_root, {"train": [samples[:50], samples[49:90]], "test": [samples[:100]]})
    changed = manifest.model_copy(update={"datasets": {"digits": dataset}})
    # At the same time in one place, none would have seen the other's block either.
    for index in range(2):
        writer = Worker(index, 2, own_blocks_only=True)
        assert cache_teacher(recipe, changed, [tmp_path], tmp_path / f"store{index}", CPU, worker=writer) is None
    shutil.copytree(tmp_path / "store1", tmp_path / "store0", dirs_exist_ok=True)
    key = samples[49].key
    places = r"train0-000000\.tar \(row 49\), train1-000000\.tar \(row 0\)"
    with pytest.raises(DataError, match=rf"store0: key '{key}' is that of 2 samples: {places}"):
        cache_teacher(recipe, changed, [tmp_path], tmp_path / "store0", CPU)
    assert not (tmp_path / "store0" / "manifest.json").exists()


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=8, unique=True), max_size=20), st.randoms())
def test_known_keys_are_those_of_all_other_blocks(blocks, moment):
    known, owners = KnownKeys(), {}
    order = [*range(len(blocks)), *range(len(blocks))]  # a block may come again, and is no other one then
    moment.shuffle(order)
    for number in order:
        keys = np.array(blocks[number], dtype=np.uint64)
        expected = [row for row, key in enumerate(blocks[number]) if owners.get(key, number) != number]
        first_time = number not in known.blocks
        found = known.add(number, keys)
        assert found.tolist() == (expected if first_time else [])
        for key in blocks[number]:
            owners.setdefault(key, number)
    assert len(known.runs) <= 8


def test_a_key_that_is_too_long_for_a_store_is_one_line(recipe, manifest, data_root, tmp_path):
    samples = read_tar(data_root / "digits" / "train-000000.tar")[0][:60]
    just_right = [Sample("a" * (MAX_KEY_BYTES - 4) + one.key, one.label, one.encoded, "png") for one in samples[:2]]
    too_long = Sample("b" * (MAX_KEY_BYTES + 1), samples[2].label, samples[2].encoded, "png")
    splits = {"train": [[*just_right, *samples[2:]]], "test": [samples]}
    changed = manifest.model_copy(update={"datasets": {"digits": small_dataset(tmp_path, data_root, splits)}})
    cache_teacher(recipe, changed, [tmp_path], tmp_path / "store", CPU)
    from offline_kd.store.lookup import stored_keys

    assert stored_keys(open_store(tmp_path / "store")) == [one.key for one in splits["train"][0]]
    splits["train"] = [[too_long, *samples[3:]]]
    with pytest.raises(DataError, match=r"key 'bbb.*': has 257 bytes, a key has 1 to 256"):
        small_dataset(tmp_path, data_root, splits)
