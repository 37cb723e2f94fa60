"""Stores of schema versions 2 to 4 that were written before are read, trained from, grown and captured again."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, invoke

from offline_kd.store.opening import all_digests, open_store
from offline_kd.support.downloads import Downloads

FIXTURE = ROOT / "tests" / "fixtures" / "store_v2"
STORE = FIXTURE / "store"
STORE_3, STORE_4 = (ROOT / "tests" / "fixtures" / name / "store" for name in ("store_v3", "store_v4"))
DIGEST_3 = "2b49f14f5b4c918b72858717d83efc3ec543490663f2622102c4d2ef54e514a5"
DIGEST_4 = "52df384bd49693f5c0a4c0019c356078744578424ee1d6e1f8f3e44d540c405c"
DIGEST = "73a894c6e8c7bf8441f8383816dadcf1eeb7ef9c9627384eaa0be70374c52865"
AT_FIRST = "ae26f6c757501d144a86d685b32cfc4388c8a2088d6b312818faf0759ba3f3bf"
CPU_OF_FIXTURE = "AVX512"


def ran(*arguments: object) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output


def capture(store: Path, recipe: str, where: list[str], *options: str) -> None:
    teacher = "first" if recipe == "recipe.yaml" else "second"
    weights = f"teacher.weights={FIXTURE / teacher}.safetensors"
    ran("cache-teacher", FIXTURE / recipe, "--store", store, "--device", "cpu", "--set", weights, *options, *where)


def test_the_store_opens_with_its_digest_and_with_the_one_it_had_before_it_grew():
    store = open_store(STORE, digest=DIGEST)
    assert store.identity.views.num_views == 2
    assert list(store.identity.decisions) == ["last", "sub"]
    assert open_store(STORE, digest=AT_FIRST).identity.views.num_views == 1
    assert open_store(STORE, targets="second").identity.codec.name == "f16"


def test_of_version_3_it_says_the_same_of_every_sample_and_knows_more_of_it():
    store, other = open_store(STORE_3, digest=DIGEST_3), open_store(STORE)
    same = sorted(set(store.arrays) & set(other.arrays))
    assert set(store.arrays) - set(same) == {"key", "image_digest"}
    assert set(other.arrays) - set(same) == {"image_crc"}
    for group in range(2):
        one, two = store.read(0, group, same), other.read(0, group, same)
        assert all(one[name].tobytes() == two[name].tobytes() for name in same)


def test_version_4_differs_from_3_in_its_pages_of_hashes_alone():
    store = open_store(STORE_4, digest=DIGEST_4)
    pages = store.manifest.pages
    assert len(pages) == 4  # of two view groups of two teachers, of one tar
    assert sorted(store.manifest.entries) == [f"templates-{name}.json" for name in ("codec", "last", "sub")]
    for folder in ("ledger", "targets.zarr", "additions"):
        for file in (path for path in (STORE_3 / folder).rglob("*") if path.is_file()):
            before = file.read_bytes().replace(b"key, in ASCII", b"key, in UTF-8")
            assert (STORE_4 / file.relative_to(STORE_3)).read_bytes() == before
    first = (STORE_4 / "hashes" / "000000-00001-00002.second.bin").read_bytes()
    assert first == hashlib.sha256((STORE_4 / "ledger" / "000000-00001-00002.second.json").read_bytes()).digest()
    (_, first_views), *_ = list(all_digests(store).items())[::-1]
    assert first_views == {"": 1}  # as of the other versions
    for digest, views in all_digests(store).items():
        assert open_store(STORE_4, digest=digest).identity.views.num_views == views[""]


@pytest.mark.parametrize("store", [STORE, STORE_3, STORE_4])
def test_the_store_verifies_against_itself_and_against_the_dataset(store, where):
    ran("store", "verify", store)
    ran("store", "verify", store, "--quick")
    ran("store", "verify", store, "--dataset", *where)


@pytest.mark.parametrize("version", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_store_of_an_earlier_version_grows_as_what_it_is_and_keeps_its_digests(version, where, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(STORE if version == 2 else STORE_3, path)
    capture(path, "recipe.yaml", where, "--set", "views.count=3")
    grown = open_store(path)
    assert grown.identity.views.num_views == 3
    assert (grown.created.schema_version, grown.manifest.schema_version) == (version, version)
    assert ("image_crc" in grown.arrays) == ("key" not in grown.arrays) == (version == 2)
    assert not (path / "hashes").exists()
    assert open_store(path, digest=DIGEST if version == 2 else DIGEST_3).identity.views.num_views == 2
    ran("store", "verify", path, "--dataset", *where)


@pytest.mark.parametrize("objective", ["kd", "letkd"])
def test_a_student_trains_from_the_store(objective, where, tmp_path):
    recipe = FIXTURE / "recipe.yaml"
    ran("distill", recipe, "--store", STORE, "--objective", objective, "--out", tmp_path, "--device", "cpu", *where)


def test_captured_anew_the_store_verifies_and_on_the_same_machine_has_the_same_digest(where, tmp_path):
    path = tmp_path / "store"
    capture(path, "recipe.yaml", where, "--set", "views.count=1")
    capture(path, "recipe.yaml", where)
    capture(path, "second.yaml", where, "--add")
    ran("store", "verify", path)
    before, anew = open_store(STORE_4), open_store(path)
    for group in range(2):
        # Of no arithmetic that machines round differently.
        names = [name for name in before.arrays if not name.startswith(("logits/", "decisions/"))]
        old, new = before.read(0, group, names), anew.read(0, group, names)
        assert all(np.array_equal(old[name], new[name]) for name in names)
    versions = [json.loads((one / "store.json").read_text())["versions"] for one in (STORE_4, path)]
    if versions[0] == versions[1] and torch.backends.cpu.get_cpu_capability() == CPU_OF_FIXTURE:
        assert anew.digest == DIGEST_4


def test_an_object_is_hashed_once_whether_it_is_fetched_or_was_downloaded_before(tmp_path, monkeypatch):
    hashed: list[str] = []
    sha256 = hashlib.sha256

    def counted(content: bytes = b"", **options: bool):
        made = sha256(content, **options)
        hashed.append(made.hexdigest())
        return made

    downloads = Downloads(tmp_path, 2**20)
    names = ["key_hash", "logits/code"]
    committed = open_store(STORE).entry("", 0, 0).objects
    objects = [one.sha256 for key, one in committed.items() if key.startswith(("key_hash/", "logits/"))]
    assert len(objects) == 2
    monkeypatch.setattr(hashlib, "sha256", counted)
    for _ in ("fetched", "from the downloads"):
        # A new reader each time: one keeps what it read.
        store = replace(open_store(STORE), downloads=downloads)
        hashed.clear()
        store.read(0, 0, names)
        assert sorted(one for one in hashed if one in objects) == sorted(objects)
        assert len(hashed) == len(set(hashed)) == 3  # and the ledger entry


def test_a_damaged_download_is_noticed_and_fetched_anew(tmp_path):
    downloads = Downloads(tmp_path, 2**20)
    right = replace(open_store(STORE), downloads=downloads).read(0, 0, ["label"])["label"]
    sha256 = next(one.sha256 for key, one in open_store(STORE).entry("", 0, 0).objects.items() if "label/" in key)
    file = tmp_path / sha256
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = replace(open_store(STORE), downloads=downloads).read(0, 0, ["label"])["label"]
    assert np.array_equal(right, again)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
