"""Features in the store: coded as the format page says, as near to the teacher's as is stated, and kept whole."""

import json
import re
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
import zarr
from conftest import CPU, invoke, make_recipe, refused
from documents import blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as Reference
from torch import nn

import offline_kd as okd
from offline_kd.cache import asking
from offline_kd.cache.feature_codes import fit_product
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.distill.loader import Loader
from offline_kd.distill.teacher_signal import live_signal, stored_signal, wanted_of
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.objectives.features import FeatureTerm
from offline_kd.recipe import feature_terms
from offline_kd.store.features import (
    Features,
    FeaturesIdentity,
    arrays_of,
    pack_features,
    relative_errors,
    unpack_features,
)
from offline_kd.store.opening import open_store
from offline_kd.store.verification import verify
from offline_kd.support.errors import StoreCorrupt, StoreMismatch
from offline_kd.support.places import Folder

PQ = {"name": "pq", "subspaces": 4, "centroids": 16, "iterations": 5}
FINE = {"name": "pq", "subspaces": 3, "centroids": 64}
FEATURES = {
    "pooled": {"module": "body.5", "code": PQ},
    "map": {"module": "body.5", "pool": "none", "grid": [2, 2], "code": PQ | {"stages": 2}},
    "exact": {"module": "head", "at": "input", "code": {"name": "f32"}},
    "short": {"module": "body.5", "pool": "none", "code": {"name": "f16"}},
    "coarse": {"module": "body.5", "code": {"name": "int", "bits": 5}},
}
SHAPES = {"pooled": (16,), "map": (16, 2, 2), "exact": (256,), "short": (16, 4, 4), "coarse": (16,)}


class Near(FeatureTerm):
    """The mean square of what features are: enough to be asked for."""

    term: Literal["near"] = "near"

    def __call__(self, student_logits, signal, batch):
        return signal.features[self.features].square().mean() + 0 * student_logits.sum()


TERMS = [Near(features=name) for name in FEATURES]


def features_recipe(weights, **changes):
    few = {"data": {"tars": [0, 2]}, "views": {"count": 2}, "objectives": {"ce": [{"term": "ce"}]}}
    capture = {"views_per_group": 1, "fidelity_rows": 60, "features": FEATURES}
    return make_recipe(teacher={"weights": str(weights)}, **(few | {"capture": capture} | changes))


@pytest.fixture(scope="module")
def recipe(teacher_weights):
    return features_recipe(teacher_weights)


@pytest.fixture(scope="module")
def path(recipe, manifest, roots, tmp_path_factory):
    place = tmp_path_factory.mktemp("features") / "store"
    cache_teacher(recipe, manifest, roots, place, CPU)
    return place


def written(recipe, folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return folder / "recipe.yaml"


def loader_of(recipe, manifest, roots, store, **options) -> Loader:
    return make_loader(
        recipe, source_of(recipe, training_images(recipe, manifest, roots), [store], TERMS), 0, CPU, **options
    )


# ---- codes -----------------------------------------------------------------------------------------------------------

CODES = [
    {"name": "f32"},
    {"name": "f16"},
    {"name": "int", "bits": 8},
    {"name": "int", "bits": 3},
    {"name": "pq", "subspaces": 3, "centroids": 5},
    {"name": "pq", "subspaces": 1, "centroids": 256, "stages": 3},
]


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(CODES), st.sampled_from(["avg", "none"]), st.sampled_from([1e-3, 1, 1e3]))
def test_what_is_packed_comes_back_as_near_as_its_code_can(seed, code, pool, scale):
    generator = torch.Generator().manual_seed(seed)
    config = Features.model_validate({"module": "any", "pool": pool, "code": code})
    shape = (5, 6) if pool == "avg" else (5, 6, 2, 3)
    features = scale * torch.randn(shape, generator=generator).relu()
    tables = {}
    if code["name"] == "pq":
        size = code.get("stages", 1), code["subspaces"], code["centroids"], 6 // code["subspaces"]
        tables = {"centroids": scale * torch.randn(size, generator=generator)}
    packed = pack_features(config, features, tables)
    about = FeaturesIdentity(config=config, channels=6, height=2, width=3)
    kept = arrays_of(about)
    assert packed.keys() == kept.keys()
    for name, array in packed.items():
        assert array.numpy().dtype == np.dtype(kept[name].dtype)
        places = shape[2:] if kept[name].size else ()
        assert tuple(array.shape) == (5, *([kept[name].size] if kept[name].size else []), *places)
    decoded = unpack_features(config, packed, tables)
    error = (decoded - features).abs()
    if code["name"] == "f32":
        assert torch.equal(decoded, features)
    elif code["name"] == "f16":
        assert (error <= features.abs() * 2**-11 + 2**-25).all()
    elif code["name"] == "int":
        spread = features.flatten(1).amax(1) - features.flatten(1).amin(1)
        most = spread / (2 ** (code["bits"] + 1) - 4) + 1e-5 * spread
        assert (error.flatten(1).amax(1) <= most).all()
        assert packed["codes"].max() < 255
    else:
        assert_codes_are_nearest(features, packed["codes"], tables["centroids"])
        assert torch.equal(decoded, torch.from_numpy(decode_pq(packed["codes"].numpy(), tables["centroids"].numpy())))


def assert_codes_are_nearest(features, codes, centroids):
    stages, parts, _, length = centroids.shape
    vectors = features.reshape(len(features), features.shape[1], -1).transpose(1, 2)
    rest = vectors.reshape(-1, parts, length).double()
    codes = codes.reshape(len(codes), stages, parts, -1).permute(0, 3, 1, 2).reshape(-1, stages, parts).long()
    for stage in range(stages):
        distances = (rest[:, :, None] - centroids[stage].double()).norm(dim=3)  # [n, parts, K]
        chosen = distances.gather(2, codes[:, stage, :, None])[..., 0]
        assert (chosen <= distances.amin(2) * (1 + 1e-5) + 1e-6).all()
        rest = rest - centroids[stage].double()[torch.arange(parts), codes[:, stage]]


def decode_pq(codes: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """As the page about the format says it: the sum over stages of the templates, part after part."""
    stages, parts, _, length = centroids.shape
    out = np.zeros((codes.shape[0], parts * length, *codes.shape[2:]), dtype=np.float32)
    for stage in range(stages):
        for part in range(parts):
            chosen = centroids[stage, part][codes[:, stage * parts + part]]
            out[:, part * length : (part + 1) * length] += np.moveaxis(chosen, -1, 1)
    return out


def test_the_error_of_pq_is_within_one_percent_of_scikit_learns():
    rng = np.random.default_rng(0)
    middles = 4 * rng.standard_normal((40, 12))
    vectors = (middles[rng.integers(40, size=4000)] + rng.standard_normal((4000, 12))).astype(np.float32)
    code = Features.model_validate({"module": "any", "code": {**FINE, "iterations": 100}}).code
    centroids, statistics = fit_product(vectors.copy(), code, CPU, "templates")
    parts = np.split(vectors, 3, axis=1)
    fits = [Reference(64, n_init=1, random_state=0, max_iter=100).fit(part) for part in parts]
    assert statistics["inertia_per_vector"] * 4000 <= 1.01 * sum(one.inertia_ for one in fits)
    config = Features.model_validate({"module": "any", "code": FINE})
    x = torch.from_numpy(vectors)
    decoded = unpack_features(config, pack_features(config, x, {"centroids": centroids}), {"centroids": centroids})
    squared = (decoded - x).square().sum(1).mean().item()
    assert squared == pytest.approx(statistics["inertia_per_vector"], rel=1e-3)
    two = code.model_copy(update={"stages": 2})
    _, of_two = fit_product(vectors.copy(), two, CPU, "templates")
    assert of_two["inertia_per_vector"] < 0.5 * squared


# ---- through the store -----------------------------------------------------------------------------------------------


def test_stored_features_are_the_live_teachers_within_what_the_store_states(recipe, path, manifest, roots):
    store, teacher = open_store(path), load_teacher(recipe, manifest, roots, 10, CPU)
    offline, online = stored_signal([store], TERMS, CPU), live_signal(teacher, recipe, TERMS, None, CPU)
    stated = store.manifest.fidelity[""].features
    errors = {name: [] for name in FEATURES}
    for epoch in range(2):
        for batch in loader_of(recipe, manifest, roots, store).epoch(epoch):
            stored, live = offline(batch).features, online(batch).features
            assert stored.keys() == live.keys() == FEATURES.keys()
            for name, features in stored.items():
                assert features.dtype == torch.float32
                assert features.shape == live[name].shape == (len(batch), *SHAPES[name])
                assert torch.equal(batch.teacher_features[name], features)
                assert torch.equal(offline(batch).take(slice(2, 5)).features[name], features[2:5])
                errors[name].append(relative_errors(live[name], features))
    found = {name: torch.cat(some).mean().item() for name, some in errors.items()}
    assert {name: stated[name]["relative_l2"] for name in found} == pytest.approx(found, rel=0.15, abs=1e-6)
    assert found["exact"] < 1e-5
    assert found["short"] < 1e-3
    assert found["coarse"] < 0.05
    assert found["map"] < found["pooled"] + 0.1 < 0.5
    assert all(0.9 < one["cosine"] <= 1.001 and 0 <= one["same_neighbour"] <= 1 for one in stated.values())
    assert stated["exact"]["same_neighbour"] == 1


def test_numpy_decodes_what_the_store_holds_as_the_page_says(path):
    arrays, store = zarr.open_group(path / "targets.zarr", mode="r"), okd.open_store(path)
    keys = store.keys()
    rows = len(keys)
    first = np.r_[0 : json.loads((path / "ledger/000000-00000-00001.json").read_text())["rows"]]
    for name in ("pooled", "map"):
        codes = np.asarray(arrays[f"features/{name}/codes"])[first, 1]
        decoded = decode_pq(codes, np.asarray(arrays[f"templates/{name}/centroids"]))
        assert np.abs(decoded - store.features(name, keys[: len(first)], views=[1])[:, 0].numpy()).max() < 1e-6
    codes, low, step = (np.asarray(arrays[f"features/coarse/{name}"])[first, 0] for name in ("codes", "low", "step"))
    of_package = store.features("coarse", keys[: len(first)], views=[0])[:, 0].numpy()
    np.testing.assert_allclose(low[:, None] + codes * step[:, None], of_package, rtol=1e-6, atol=1e-6)
    assert store.features("exact", keys[rows - 2 :][::-1]).shape == (2, 2, 256)
    assert torch.equal(store.features("exact", keys[-1:], views=[0]), store.features("exact", keys, views=[0])[-1:])
    with pytest.raises(StoreMismatch, match=r"holds no features 'poled'.*Did you mean 'pooled'\?"):
        store.features("poled", keys[:1])


def test_the_inspect_page_sets_the_features_of_views_beside_each_other(path, where, tmp_path):
    page = tmp_path / "page.html"
    assert invoke("store", "inspect", path, "--out", page, *where, "--key", "0000").exit_code == 0
    lines = re.findall(r"(\w+): length ([\d.]+), cosine to the first view ([\d.]+)", page.read_text())
    assert [name for name, _, _ in lines] == list(FEATURES)
    features = okd.open_store(path).features("exact", ["0000"])[0]
    ((length, cosine),) = [(float(length), float(cosine)) for name, length, cosine in lines if name == "exact"]
    assert length == pytest.approx(features[1].norm().item(), rel=0.01)
    assert cosine == pytest.approx(torch.cosine_similarity(features[0], features[1], dim=0).item(), abs=0.001)


def test_batches_of_a_resident_run_have_the_same_features(recipe, path, manifest, roots):
    store = open_store(path)
    training = recipe.training.model_copy(update={"resident": "always"})
    streamed = loader_of(recipe, manifest, roots, store)
    resident = loader_of(recipe.model_copy(update={"training": training}), manifest, roots, store)
    assert resident.resident is not None
    for epoch in range(2):
        for one, other in zip(streamed.epoch(epoch), resident.epoch(epoch), strict=True):
            assert one.key_hash.tolist() == other.key_hash.tolist()
            for name in FEATURES:
                assert torch.equal(one.teacher_features[name], other.teacher_features[name])


def test_the_loop_of_the_page_reads_features(path, data_root):
    (block,) = (one for one in blocks("docs/features.md") if one.language == "python")
    text = block.text.replace("stores/mine", str(path)).replace("penultimate", "exact")
    names: dict[str, object] = {"okd": okd}
    exec(compile(text.replace('data="digits"', f'data="{data_root}/digits"'), str(block), "exec"), names)
    assert names["batch"].teacher_features["exact"].shape[1:] == SHAPES["exact"]


def test_only_terms_on_features_are_served_with_them(recipe, path):
    store = open_store(path)
    assert [term.features for term in feature_terms([*TERMS, *recipe.objectives["ce"]])] == list(FEATURES)
    (wanted,) = wanted_of([store], TERMS[:1])
    assert (wanted.logits, list(wanted.features)) == (False, ["pooled"])
    first, second = wanted_of([store, store], TERMS)
    assert (len(first.features), len(second.features)) == (5, 0)
    with pytest.raises(StoreMismatch, match="holds no features 'other'"):
        wanted_of([store], [Near(features="other")])


def test_every_flipped_bit_of_features_is_found_and_the_block_is_done_again(recipe, path, where, tmp_path):
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    flipped = ["features/pooled/codes/c/1/0/0", "templates/map/centroids/c/0/0/0/0"]
    for name in flipped:
        content = bytearray((copy / "targets.zarr" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "targets.zarr" / name).write_bytes(content)
    assert {fault.file for fault in verify(Folder(copy)).faults} == {f"targets.zarr/{name}" for name in flipped}
    assert "2 FAULTS" in invoke("store", "verify", copy).stderr
    result = invoke("store", "repair", copy, written(recipe, tmp_path), *where)
    assert result.exit_code == 0, result.output
    assert verify(Folder(copy)).faults == []
    assert open_store(copy).digest == open_store(path).digest


@pytest.mark.slow  # crash_points.py kills captures of features
def test_a_capture_that_was_killed_goes_on_to_the_same_store(recipe, path, where, tmp_path):
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    for name in ("manifest.json", "ledger/000001-00001-00002.json", "ledger/templates-pooled.json"):
        (copy / name).unlink()
    (copy / "targets.zarr/features/short/values/c/1/1/0/0/0").unlink()
    assert invoke("cache-teacher", written(recipe, tmp_path), "--store", copy, *where).exit_code == 0
    assert open_store(copy).digest == open_store(path).digest
    assert not list(copy.glob("scratch-*"))


def test_features_that_are_not_the_teachers_keep_a_store_from_being_finished(
    recipe, manifest, roots, tmp_path, monkeypatch
):
    """A faulty writer that shifts features by one sample: every checksum is right, the teacher disagrees."""
    honest = asking.pack_features
    monkeypatch.setattr(
        asking, "pack_features", lambda *about: {name: one.roll(1, dims=0) for name, one in honest(*about).items()}
    )
    capture = recipe.capture.model_copy(update={"features": {"pooled": recipe.capture.features["pooled"]}})
    few = {"capture": capture, "data": recipe.data.model_copy(update={"tars": [2]})}
    with pytest.raises(StoreCorrupt, match="of the features 'pooled' are those that the teacher gives again"):
        cache_teacher(recipe.model_copy(update=few), manifest, roots, tmp_path / "store", CPU)
    assert not (tmp_path / "store" / "manifest.json").exists()


# ---- added, chosen, sent ---------------------------------------------------------------------------------------------


def test_features_added_later_are_pushed_in_part_described_and_serve_a_loop(
    recipe, manifest, roots, where, data_root, tmp_path
):
    few = {"data": {"tars": [2]}, "views": {"count": 1}, "objectives": {"ce": [{"term": "ce"}]}}
    weights = recipe.teacher.weights
    none = make_recipe(teacher={"weights": weights}, capture={"views_per_group": 1, "fidelity_rows": 9}, **few)
    path = tmp_path / "store"
    cache_teacher(none, manifest, roots, path, CPU)
    before, described = open_store(path), (path / "store.json").read_bytes()
    assert b"features" not in described + (path / "manifest.json").read_bytes()
    auto = {"module": "body.5", "code": {"name": "auto", "error_budget": 0.2, "centroids": 32, "iterations": 3}}
    capture = {"views_per_group": 1, "fidelity_rows": 9, "features": {"late": auto}}
    more = make_recipe(teacher={"weights": weights}, capture=capture, **few)
    command = ("cache-teacher", written(more, tmp_path), "--store", path, *where)
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    grown = open_store(path)
    code = grown.identity.features["late"].config.code
    assert code.name == "pq"
    assert 16 % code.subspaces == 0
    assert f"features 'late': pq of {code.subspaces} parts" in result.stderr
    assert grown.manifest.fidelity[""].features["late"]["relative_l2"] < 0.25
    assert (path / "store.json").read_bytes() == described
    assert open_store(path, digest=before.digest).identity.features == {}
    assert verify(Folder(path)).faults == []
    assert invoke(*command).exit_code == 0  # nothing to do, and the code that was chosen stays
    assert open_store(path).digest == grown.digest
    assert "features 'late'" in invoke("store", "info", path).stdout
    assert "features 'late'" in (path / "README.md").read_text()
    assert "late" in yaml.safe_load((path / "recipe.yaml").read_text())["capture"].get("features", {})

    part = tmp_path / "part"
    assert invoke("store", "push", path, part, "--only", "features").exit_code == 0
    assert "features only" in invoke("store", "info", part).stdout
    assert verify(Folder(part)).faults == []
    opened = okd.open_store(part, data=data_root / "digits")
    with pytest.raises(okd.OfflineKDError, match="not logits/values"):
        opened.logits(opened.keys()[:1])
    assert torch.equal(opened.features("late", opened.keys()), okd.open_store(path).features("late", opened.keys()))
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
    for batch in okd.open_store(path).loader(data_root / "digits", batch_size=128, features=["late"]).epoch(0):
        loss = (student(batch.images / 255) - batch.teacher_features["late"]).square().mean()
    loss.backward()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": {"module": "body.5", "code": PQ | {"subspaces": 7}}}, r"cannot be cut into 7 parts.*\[1, 2, 4, 8, 16\]"),
        ({"a": {"module": "body.6x"}}, r"no module 'body.6x'\. Did you mean"),
        ({"a": {"module": "body.5", "grid": [2, 2]}}, "a grid is of maps, which pool: none keeps"),
        ({"a": {"module": "body.5", "code": {"name": "pq"}}}, r"capture\.features\.a\.code\.pq\.subspaces"),
        ({"a": {"module": "body.5", "code": {"name": "qp"}}}, "unknown name 'qp'. Known: auto, f16, f32, int, pq"),
        ({"codec": {"module": "body.5"}}, "'codec' is what the tables of codecs are called"),
        ({"same": {"module": "body.5"}}, "'same' is what decisions are called"),
        ({"a": {"module": "body.5", "code": PQ | {"max_vectors": 9}}}, "16 templates from 9 feature vectors"),
    ],
)
def test_features_that_cannot_be_are_refused_in_one_line(features, message, recipe, where, tmp_path):
    content = recipe.model_dump(mode="json", exclude_none=True)
    decisions = {"same": {"kind": "templates", "module": "body.5", "templates": 4}}
    content["capture"] |= {"features": features, "decisions": decisions if "same" in features else {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    said = refused("cache-teacher", tmp_path / "recipe.yaml", "--store", tmp_path / "store", *where)
    assert re.search(message, said), said


def test_a_store_whose_features_are_another_recipes_is_refused(recipe, path, where, tmp_path):
    file, out = written(recipe, tmp_path), ("--objective", "ce", "--store", path, "--out", tmp_path / "run", *where)
    said = refused("distill", file, *out, "--set", "capture.features.pooled.code.subspaces=8")
    assert "capture.features.pooled.code.subspaces: 4 in the store, 8 in the recipe" in said
    content = recipe.model_dump(mode="json", exclude_none=True)
    content["capture"] |= {
        "features": {},
        "decisions": {"map": {"kind": "templates", "module": "body.5", "templates": 4}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    copy = shutil.copytree(path, tmp_path / "copy")
    said = refused("cache-teacher", tmp_path / "recipe.yaml", "--store", copy, *where)
    assert "capture.decisions.map: the store has features of that name" in said
