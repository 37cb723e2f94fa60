"""Logits that are computed from stored features by the teacher's last layer: the same bits everywhere, and refusals."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zarr
from conftest import CPU, invoke, make_recipe, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tampering import vouch_for_ledger

import offline_kd as okd
from offline_kd.cache.distortion import distortion
from offline_kd.cache.teacher import load_teacher
from offline_kd.cli import bench_last_layer
from offline_kd.distill.teacher_signal import live_signal, stored_signal
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.recipe import load_recipe
from offline_kd.store.chunks import encode_chunk
from offline_kd.store.codecs.last_layer import LastLayer
from offline_kd.store.opening import open_store
from offline_kd.store.reader import stored_object
from offline_kd.store.verification import verify
from offline_kd.support.errors import StoreCorrupt
from offline_kd.support.places import Folder

CODEC = {"name": "last_layer", "features": "penultimate"}
PQ = {"name": "pq", "subspaces": 32, "centroids": 16, "iterations": 2, "max_vectors": 600}
TERMS = [
    {"term": "ce"},
    {"term": "kd", "temperature": 4},
    {"term": "wttm", "gamma": 0.3},
    {"term": "dtkd", "temperature": 4},
    {"term": "itrd", "features": "penultimate", "weight": 0.1},
]


def recipe_of(weights, code, **changes):
    features = {"penultimate": {"module": "head", "at": "input", "code": code}}
    capture = {"codec": CODEC, "features": features, "views_per_group": 1, "fidelity_rows": 40}
    few = {"data": {"tars": [2]}, "views": {"count": 2}, "capture": capture, "objectives": {"all": TERMS}}
    return make_recipe(teacher={"weights": str(weights)}, **(few | changes))


def written(recipe, folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def folder(teacher_weights, tmp_path_factory) -> Path:
    """Stores `f32` and `pq`, by the codes of their features, with the recipes beside them."""
    place = tmp_path_factory.mktemp("last_layer")
    for code in ({"name": "f32"}, PQ):
        (place / code["name"]).mkdir()
        written(recipe_of(teacher_weights, code), place / code["name"])
    return place


@pytest.fixture(scope="module")
def stores(folder, data_root) -> Path:
    for code in ("f32", "pq"):
        recipe, root = folder / code / "recipe.yaml", ("--data-root", data_root)
        result = invoke("cache-teacher", recipe, "--store", folder / code / "store", *root)
        assert result.exit_code == 0, result.output
    return folder


# ---- numbers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 64, 1280]), st.sampled_from([1e-30, 1e-3, 1, 1e4]))
def test_logits_are_those_of_the_layer_and_the_same_bits_in_any_order_of_summation(seed, channels, scale):
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(7, channels, generator=generator).relu()
    features[3] = 0
    weight = torch.randn(5, channels, generator=generator) * torch.tensor([[1.0], [1e-6], [1e3], [0], [1]])
    codec, bias = LastLayer(name="last_layer", features="any"), torch.randn(5, generator=generator)

    def decoded(some, order):
        tables = codec.decoding_tables({"weight": weight[:, order].contiguous().numpy(), "bias": bias.numpy()})
        return codec.decode({"features": some[:, order]}, 5, tables)

    logits = decoded(features, torch.arange(channels))
    exact = features.double() @ weight.double().T + bias.double()
    size = features.double().abs().amax(1, keepdim=True) * weight.double().abs().amax(1) * channels
    assert ((logits - exact).abs() <= 2.0**-19 * size + 2.0**-24 * exact.abs()).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoded(features, torch.randperm(channels, generator=generator)), logits)
    for row in range(7):
        assert torch.equal(decoded(features[row : row + 1], torch.arange(channels)), logits[row : row + 1])


def test_numpy_computes_the_logits_as_the_page_about_the_format_says(stores):
    path = stores / "f32" / "store"
    arrays, store = zarr.open_group(path / "targets.zarr", mode="r"), okd.open_store(path)
    assert "logits" not in arrays
    rows = json.loads((path / "ledger/000000-00000-00001.json").read_text())["rows"]
    features = np.asarray(arrays["features/penultimate/values"])[:rows, 1]
    logits = features @ np.asarray(arrays["codec/weight"]).T + np.asarray(arrays["codec/bias"])
    of_package = store.logits(store.keys()[:rows], views=[1])[:, 0].numpy()
    np.testing.assert_allclose(logits, of_package, rtol=1e-4, atol=1e-4)


# ---- the teacher's ---------------------------------------------------------------------------------------------------


def test_terms_see_the_live_teachers_logits_within_what_the_store_states(stores, manifest, roots):
    for code in ("f32", "pq"):
        recipe, store = load_recipe(stores / code / "recipe.yaml"), open_store(stores / code / "store")
        terms, teacher = recipe.objectives["all"], load_teacher(recipe, manifest, roots, 10, CPU)
        images = training_images(recipe, manifest, roots)
        offline, online = stored_signal([store], terms, CPU), live_signal(teacher, recipe, terms, None, CPU)
        found = []
        for batch in make_loader(recipe, source_of(recipe, images, [store], terms), 0, CPU).epoch(0):
            stored, live = offline(batch), online(batch)
            found.append((live.logits, stored.logits))
            weight, bias = (torch.from_numpy(store.codec_tables[name]) for name in ("weight", "bias"))
            torch.testing.assert_close(stored.logits, stored.features["penultimate"] @ weight.T + bias)
        z_t, z = (torch.cat(some) for some in zip(*found, strict=True))
        measured, stated = distortion(z_t, z), store.manifest.fidelity[""]
        assert stated.max_error <= stated.max_error_allowed
        assert stated.total_variation["1"] == pytest.approx(measured["total_variation"]["1"], rel=0.25, abs=1e-6)
        assert (z - z_t).abs().max() < (1e-4 if code == "f32" else 0.5 * z_t.abs().max())
        assert (z.roll(1, dims=0) - z_t).abs().mean() > 3 * (z - z_t).abs().mean()  # what a shifted row would be


def test_a_student_trained_from_features_is_the_one_trained_with_the_live_teacher(stores, where, tmp_path):
    one = ("distill", stores / "f32" / "recipe.yaml", "--objective", "all", "--set", "training.epochs=1", *where)
    assert invoke(*one, "--store", stores / "f32" / "store", "--out", tmp_path / "offline").exit_code == 0
    assert invoke(*one, "--online", "--out", tmp_path / "online").exit_code == 0
    offline, online = (load_file(tmp_path / name / "student.safetensors") for name in ("offline", "online"))
    assert offline.keys() == online.keys()
    for name, tensor in offline.items():
        torch.testing.assert_close(tensor, online[name], rtol=1e-3, atol=1e-3)


def test_batches_lookups_and_resident_batches_have_the_same_bits(stores, manifest, roots):
    path = stores / "pq" / "store"
    recipe, store = load_recipe(stores / "pq" / "recipe.yaml"), okd.open_store(path)
    keys = store.keys()
    one_by_one = torch.cat([store.logits([key], views=[0]) for key in keys[:5]])
    assert torch.equal(one_by_one, store.logits(keys, views=[0])[:5])
    training = recipe.training.model_copy(update={"resident": "always"})
    images, terms = training_images(recipe, manifest, roots), recipe.objectives["all"]
    source = source_of(recipe, images, [store.reader], terms)
    streamed = make_loader(recipe, source, 0, CPU)
    resident = make_loader(recipe.model_copy(update={"training": training}), source, 0, CPU)
    assert resident.resident is not None
    for one, other in zip(streamed.epoch(0), resident.epoch(0), strict=True):
        assert torch.equal(one.teacher_logits, other.teacher_logits)


def test_of_two_stores_with_features_of_one_name_terms_see_the_first_ones_and_logits_each_its_own(
    stores, manifest, roots
):
    recipe = load_recipe(stores / "f32" / "recipe.yaml")
    both = [open_store(stores / code / "store") for code in ("f32", "pq")]
    terms, images = recipe.objectives["all"], training_images(recipe, manifest, roots)
    batch = next(iter(make_loader(recipe, source_of(recipe, images, both, terms), 0, CPU).epoch(0)))
    assert set(batch.features["penultimate"]) == {"values"}
    assert [set(one.features["penultimate"]) for one in batch.signal] == [{"values"}, {"codes"}]
    alone = [stored_signal([one], terms, CPU) for one in both]
    z = [ask(replace(batch, signal=[signal])).logits for ask, signal in zip(alone, batch.signal, strict=True)]
    assert 0 < (z[0] - z[1]).abs().mean() < 0.5 * z[0].std()


# ---- a store ---------------------------------------------------------------------------------------------------------


def test_flipped_bits_of_features_and_of_the_layer_are_found_and_done_again(stores, where, tmp_path):
    path = stores / "pq" / "store"
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    flipped = ["features/penultimate/codes/c/0/1/0", "codec/weight/c/0/0", "templates/penultimate/centroids/c/0/0/0/0"]
    for name in flipped:
        content = bytearray((copy / "targets.zarr" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "targets.zarr" / name).write_bytes(content)
    assert {fault.file for fault in verify(Folder(copy)).faults} == {f"targets.zarr/{name}" for name in flipped}
    with pytest.raises(StoreCorrupt):
        okd.open_store(copy).logits(okd.open_store(path).keys()[:1])
    assert invoke("store", "repair", copy, stores / "pq" / "recipe.yaml", *where).exit_code == 0
    assert verify(Folder(copy)).faults == []
    assert open_store(copy).digest == open_store(path).digest


def test_a_capture_that_was_killed_goes_on_to_the_same_store(stores, where, tmp_path):
    copy = Path(shutil.copytree(stores / "pq" / "store", tmp_path / "copy"))
    for name in ("manifest.json", "ledger/000000-00001-00002.json", "ledger/templates-codec.json"):
        (copy / name).unlink()
    result = invoke("cache-teacher", stores / "pq" / "recipe.yaml", "--store", copy, *where)
    assert result.exit_code == 0, result.output
    assert open_store(copy).digest == open_store(stores / "pq" / "store").digest


@pytest.mark.slow
def test_views_that_are_added_are_those_captured_at_once(stores, where, tmp_path):
    command = ("cache-teacher", stores / "f32" / "recipe.yaml", "--store", tmp_path / "grown", *where)
    assert invoke(*command, "--set", "views.count=1").exit_code == 0
    assert invoke(*command).exit_code == 0
    assert open_store(tmp_path / "grown").digest == open_store(stores / "f32" / "store").digest


def test_a_layer_that_is_not_the_teachers_is_found_when_it_is_asked_again(stores, where, tmp_path):
    """A faulty writer swaps two classes: every checksum is right."""
    path = Path(shutil.copytree(stores / "pq" / "store", tmp_path / "store"))
    store = open_store(path)
    spec = next(one for one in store.parts[""].tables["codec"] if one.name == "codec/weight")
    content = encode_chunk(spec, np.ascontiguousarray(store.codec_tables["weight"][[1, 0, *range(2, 10)]]))
    (path / "targets.zarr" / spec.object_key(0, 0)).write_bytes(content)
    entry = path / "ledger/templates-codec.json"
    about = json.loads(entry.read_text())
    about["objects"][spec.object_key(0, 0)] = stored_object(content).model_dump()
    entry.write_text(json.dumps(about))
    vouch_for_ledger(path)
    assert verify(Folder(path)).faults == []
    asked = ("--teacher", 20, "--recipe", stores / "pq" / "recipe.yaml", *where)
    assert invoke("store", "verify", stores / "pq" / "store", *asked).exit_code == 0
    assert "the teacher run again differs from the store" in refused("store", "verify", path, *asked)


def test_a_part_with_logits_has_their_features_and_one_without_says_what_it_lacks(stores, where, data_root, tmp_path):
    path = stores / "pq" / "store"
    whole = okd.open_store(path)
    pushed = invoke("store", "push", path, tmp_path / "logits", "--only", "logits")
    assert pushed.exit_code == 0, pushed.output
    part = okd.open_store(tmp_path / "logits")
    assert torch.equal(part.logits(whole.keys()), whole.logits(whole.keys()))
    assert verify(Folder(tmp_path / "logits")).faults == []
    assert invoke("store", "push", path, tmp_path / "features", "--only", "features").exit_code == 0
    kept = okd.open_store(tmp_path / "features")
    assert torch.equal(kept.features("penultimate", whole.keys()), whole.features("penultimate", whole.keys()))
    with pytest.raises(okd.OfflineKDError, match=r"holds \['features'\] only, not the tables of logits"):
        kept.logits(whole.keys()[:1])
    assert invoke("store", "push", path, tmp_path / "none", "--only", "decisions").exit_code == 0
    for name in ("logits", "features", "none"):
        made = load_recipe(tmp_path / name / "recipe.yaml")
        assert made.capture.codec.of_features == "penultimate"
        assert made.capture.features.keys() == {"penultimate"}
    assert "codec" in invoke("store", "info", tmp_path / "none").stdout


def test_pages_about_samples_show_these_logits(stores, where, tmp_path):
    path = stores / "pq" / "store"
    store = okd.open_store(path)
    assert invoke("store", "explore", path, "--out", tmp_path / "gallery", "--samples", "3", *where).exit_code == 0
    means = store.logits(store.keys()).softmax(-1).mean(1)
    with (tmp_path / "gallery" / "samples.csv").open(newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    for key, mean in zip(store.keys(), means, strict=True):
        assert int(rows[key]["top1"]) == mean.argmax()
        assert float(rows[key]["top1_probability"]) == pytest.approx(mean.max().item(), abs=1e-4)
    key = store.keys()[0]
    assert invoke("store", "inspect", path, "--out", tmp_path / "one.html", "--key", key, *where).exit_code == 0
    first = 100 * store.logits([key], views=[0])[0, 0].softmax(0).max().item()
    assert f"<b>{first:.1f} %</b>" in (tmp_path / "one.html").read_text()


def test_chosen_classes_of_another_teacher_are_added_as_rows_of_its_layer(stores, teacher_weights, where, tmp_path):
    """The digits backwards: class 0 is the teacher's 9."""
    path = Path(shutil.copytree(stores / "f32" / "store", tmp_path / "store"))
    backwards = {str(digit): 9 - digit for digit in range(10)}
    other = recipe_of(teacher_weights, {"name": "f16"}, name="other").model_dump(mode="json", exclude_none=True)
    other["teacher"]["classes"] = backwards
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    result = invoke("cache-teacher", tmp_path / "other.yaml", "--store", path, "--add", *where)
    assert result.exit_code == 0, result.output
    first, added = okd.open_store(path), okd.open_store(f"{path}#other")
    keys = first.keys()
    torch.testing.assert_close(added.logits(keys), first.logits(keys).flip(-1), rtol=0, atol=0.02)
    assert verify(Folder(path)).faults == []


@pytest.mark.parametrize("parts", [(8,), pytest.param((32, 16, 8), marks=pytest.mark.slow)])
def test_bench_codecs_measures_codes_of_the_features_beside_codecs_of_logits(stores, parts, monkeypatch):
    monkeypatch.setattr(bench_last_layer, "PARTS", parts)
    command = ("bench", "codecs", stores / "f32" / "store", "--codec", "{name: f16}", "--json")
    by_name = {one["codec"]: one for one in json.loads(invoke(*command).stdout)}
    expected = [f"pq {some} x {stages} + last_layer" for some in parts for stages in (1, 2)]
    assert list(by_name) == ["f16", *(f"{code} + last_layer" for code in ("f16", "int 8", "int 4")), *expected]
    lost = {name: one["distortion"]["total_variation"]["1"] for name, one in by_name.items()}
    assert lost["f16 + last_layer"] < 1e-3 < lost["int 4 + last_layer"] < lost["pq 8 x 1 + last_layer"]
    assert all(lost[f"pq {some} x 2 + last_layer"] < lost[f"pq {some} x 1 + last_layer"] for some in parts)
    assert by_name["pq 8 x 2 + last_layer"]["bytes_per_row"] < 20
    assert by_name["pq 8 x 2 + last_layer"]["table_bytes"] > by_name["f16 + last_layer"]["table_bytes"] > 5000
    assert "were kept whole" in refused("bench", "codecs", stores / "pq" / "store")


PENULTIMATE = {"module": "head", "at": "input"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capture": {"features": {}}}, r"features': .*of features 'penultimate', which are not .* Say here"),
        ({"capture": {"features": {"penultimat": PENULTIMATE}}}, r"Did you mean 'penultimat'\?"),
        ({"capture": {"features": {"penultimate": PENULTIMATE | {"pool": "none"}}}}, r"maps: take pool: avg"),
        (
            {"capture": {"features": {"penultimate": {"module": "body.5"}}}},
            r"is the output of 'body\.5', a ReLU; .*Found: \{module: head, at: input\}",
        ),
        ({"capture": {"features": {"penultimate": {"module": "head"}}}}, r"is the output of 'head', a Linear"),
        ({"teacher": {"model": "networks:probabilities"}}, r"logits are not what layer 'head' makes .* a softmax"),
    ],
)
def test_what_is_no_last_layer_is_refused_in_one_line_before_anything_is_written(
    changes, message, stores, where, tmp_path
):
    content = yaml.safe_load((stores / "f32" / "recipe.yaml").read_text())
    content["capture"] |= changes.get("capture", {})
    content["teacher"] |= changes.get("teacher", {})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    said = refused("cache-teacher", tmp_path / "recipe.yaml", "--store", tmp_path / "store", *where)
    assert re.search(message, said), said
    assert not (tmp_path / "store" / "store.json").exists()


def test_a_class_that_is_several_of_the_teachers_is_refused(teacher_weights, where, tmp_path):
    state = load_file(teacher_weights)
    more = {
        f"head.{name}": torch.cat([state[f"head.{name}"], state[f"head.{name}"][:1]]) for name in ("weight", "bias")
    }
    save_file(state | more, tmp_path / "eleven.safetensors")
    content = recipe_of(tmp_path / "eleven.safetensors", {"name": "f16"}).model_dump(mode="json", exclude_none=True)
    content["teacher"]["classes"] = {str(digit): digit for digit in range(9)} | {"9": [9, 10]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    said = refused("cache-teacher", tmp_path / "recipe.yaml", "--store", tmp_path / "store", *where)
    assert "classes [9, 10] of the teacher are one of the dataset" in said
