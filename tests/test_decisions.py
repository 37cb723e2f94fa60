"""Templates are K-means at its best, decisions come back from the store as the teacher made them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, ROOT, invoke, make_recipe, refused
from sklearn.cluster import KMeans as Reference
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from offline_kd.cache import asking as cache
from offline_kd.cache.kmeans import _highest, kmeans
from offline_kd.cache.lda import class_means, fit_lda, fit_subclasses, nearest_prototype, normalised_table
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.manifest import Dataset, Split
from offline_kd.data.packing import pack
from offline_kd.data.tars import read_tar
from offline_kd.distill.student import new_student
from offline_kd.distill.teacher_signal import TeacherSignal, live_signal, stored_signal
from offline_kd.distill.training import distill, make_loader, source_of, training_images
from offline_kd.models.taps import TapPoint
from offline_kd.objectives import decisions as decision_loss
from offline_kd.objectives.decisions import Decisions, SubclassTerm
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import load_recipe
from offline_kd.store import decisions as templates
from offline_kd.store.decisions import (
    SubclassDecisions,
    TemplateDecisions,
    decide,
    largest,
    pack_decisions,
    rounded_to_tf32,
    split_for_tf32,
    unpack_probs,
)
from offline_kd.store.join import tables_on
from offline_kd.store.opening import open_store
from offline_kd.support.errors import DataError, RecipeError, StoreCorrupt

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "losses.npz", allow_pickle=False)
LDA = next(case["id"] for case in json.loads(str(GOLDEN["index"])) if case["method"] == "lda_decisions")


def blobs(seed, n=6000, dimensions=12, centers=40, spread=1.0):
    rng = np.random.default_rng(seed)
    middles = 4 * rng.standard_normal((centers, dimensions))
    return (middles[rng.integers(centers, size=n)] + spread * rng.standard_normal((n, dimensions))).astype(np.float32)


# ---- K-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "num", "spread"), [(0, 16, 1.0), (1, 64, 1.0), (2, 100, 3.0)])
def test_inertia_is_within_one_percent_of_scikit_learn(seed, num, spread):
    vectors = blobs(seed, spread=spread)
    found = kmeans(vectors, num, iterations=100, seed=seed, device=CPU)
    reference = Reference(num, n_init=1, random_state=seed, max_iter=100).fit(vectors)
    assert found.inertia <= 1.01 * reference.inertia_
    assert found.dead == 0
    assert found.counts.sum() == len(vectors)
    distances = ((vectors[:, None] - found.centroids.numpy()) ** 2).sum(-1).min(1)
    assert found.inertia == pytest.approx(distances.sum(), rel=1e-4)
    assert found.distance_percentiles["50"] == pytest.approx(np.median(distances), rel=1e-3)


def test_inertia_on_real_features_is_within_one_percent_of_scikit_learn(recipe, manifest, roots):
    teacher = load_teacher(recipe, manifest, roots, 10, CPU)
    images = training_images(recipe, manifest, roots)[0].images
    _, (maps,) = teacher.logits_and_maps(images, [TapPoint(module="body.5")])
    vectors = maps.permute(0, 2, 3, 1).flatten(0, 2).numpy().copy()
    found = kmeans(vectors, 64, iterations=100, seed=0, device=CPU)
    reference = Reference(64, n_init=1, random_state=0, max_iter=100).fit(vectors)
    assert found.inertia <= 1.01 * reference.inertia_


def test_the_seed_fixes_the_result_and_chunks_do_not_matter(monkeypatch):
    vectors = blobs(3)
    one = kmeans(vectors, 30, iterations=10, seed=5, device=CPU)
    again = kmeans(vectors, 30, iterations=10, seed=5, device=CPU)
    assert torch.equal(one.centroids, again.centroids)
    monkeypatch.setitem(templates.CHUNK_ELEMENTS, "cpu", 30 * 100)
    chunked = kmeans(vectors, 30, iterations=10, seed=5, device=CPU)
    torch.testing.assert_close(chunked.centroids, one.centroids)
    assert not torch.equal(kmeans(vectors, 30, iterations=1, seed=6, device=CPU).centroids, one.centroids)


def test_a_centroid_that_lost_its_vectors_moves_to_the_furthest_one():
    vectors = np.concatenate([np.zeros((50, 2)), np.ones((1, 2)), 100 * np.ones((1, 2))]).astype(np.float32)
    found = kmeans(vectors, 3, iterations=20, init="random", seed=0, device=CPU)
    assert found.dead == 0
    assert found.inertia == pytest.approx(0, abs=1e-4)
    assert sorted(found.counts.tolist()) == [1, 1, 50]


def test_the_nearest_vectors_of_each_template_are_remembered():
    vectors = blobs(7, n=500)
    found = kmeans(vectors, 8, iterations=30, seed=0, device=CPU)
    for template in range(8):
        distances = ((vectors - found.centroids[template].numpy()) ** 2).sum(1)
        assert set(found.nearest[template]) == set(np.argsort(distances)[:8])


@pytest.mark.parametrize("columns", [48, 2048, 4096])
def test_the_highest_of_many_is_the_first_of_equal_ones(columns):
    values = torch.randint(columns // 8, (200, columns), generator=torch.Generator().manual_seed(0)).float()
    highest, column = _highest(values)
    assert torch.equal(highest, values.amax(1))
    assert column.tolist() == values.numpy().argmax(1).tolist()


def test_more_templates_than_vectors_are_refused():
    with pytest.raises(DataError, match="10 templates from 9 feature vectors"):
        kmeans(blobs(0, n=9), 10, iterations=1, device=CPU)


# ---- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "scale"), [(16, 0.3), (128, 0.3), (1024, 0.5), (1024, 5.0), (4096, 0.5), (8192, 5.0)])
def test_decisions_are_the_softmax_of_distances(num, scale):
    generator = torch.Generator().manual_seed(num)
    features = scale * torch.randn(3, 6, 4, 5, generator=generator)
    centroids = scale * torch.randn(num, 6, generator=generator)
    chosen = decide(features, centroids, top=4, temperature=1.0)
    x = features.permute(0, 2, 3, 1).double()
    exact = (-(x[..., None, :] - centroids.double()).square().sum(-1)).softmax(-1)
    probs, _ = exact.topk(4)
    torch.testing.assert_close(chosen.probs.double(), probs, rtol=1e-4, atol=1e-6)
    assert (exact.gather(-1, chosen.ids) >= probs - 1e-6).all()
    torch.testing.assert_close(chosen.dropped.double(), 1 - probs.sum(-1), rtol=1e-3, atol=2e-6)


def trained_features(num=4096, dimensions=64, rows=256):
    """A map and templates as networks give them: not negative, far from each other; some locations are between many."""
    generator = torch.Generator().manual_seed(0)
    templates = 4 * torch.randn(num, dimensions, generator=generator).relu()
    x = templates[torch.randint(num, (rows,), generator=generator)] + torch.randn(rows, dimensions, generator=generator)
    x[::4] = templates.mean(dim=0) + 0.3 * torch.randn(len(x[::4]), dimensions, generator=generator)
    return x.view(4, 8, -1, dimensions).permute(0, 3, 1, 2), templates


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_templates_that_are_too_far_to_count_do_not_change_a_bit(temperature):
    """The same steps without the lower limit of the exponents, without groups."""
    features, centroids = trained_features()
    found = decide(features, centroids, top=4, temperature=temperature)
    x = features.permute(0, 2, 3, 1).flatten(0, 2)
    weights = torch.cat([centroids, -centroids.square().sum(1, keepdim=True) / 2], 1).T
    closeness = F.pad(x, (0, 1), value=1.0) @ (2 * temperature * weights)
    assert temperature < 1 or (closeness.amax(1) - closeness.amin(1)).min() > 60
    candidates = closeness.topk(8).indices
    others = (1 - closeness.softmax(1).gather(1, candidates).sum(1)).clamp(min=0)
    exact = -temperature * (x[:, None] - centroids[candidates]).square().sum(2)
    exact, order = exact.sort(descending=True)
    log_total = exact.logsumexp(1) - (-others).log1p()
    probs = (exact - log_total[:, None]).exp()
    assert torch.equal(found.ids.flatten(0, 2), candidates.gather(1, order)[:, :4])
    assert torch.equal(found.probs.flatten(0, 2), probs[:, :4])
    assert torch.equal(found.dropped.flatten(), probs[:, 4:].sum(1) + others)
    assert temperature == 1 or found.dropped.max() > 0.05


def test_decisions_of_many_chunks_are_those_of_one(monkeypatch):
    features, centroids = trained_features()
    whole = decide(features, centroids, top=4, temperature=0.1)
    monkeypatch.setitem(templates.CHUNK_ELEMENTS, "cpu", 1)
    parts = decide(features[:, :, :7, :5], centroids, top=4, temperature=0.1)
    assert torch.equal(parts.ids, whole.ids[:, :7, :5])
    torch.testing.assert_close(parts.probs, whole.probs[:, :7, :5], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.dropped, whole.dropped[:, :7, :5], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("num_templates", [64, 1024, 4096])
def test_of_templates_at_one_distance_the_first_comes_first(num_templates):
    features, centroids = trained_features(num_templates // 4)
    fourfold = centroids.repeat(4, 1)
    found = decide(features, fourfold, top=8, temperature=1.0)
    assert (found.ids.unflatten(-1, (2, 4)).diff() == len(centroids)).all()
    assert torch.equal(found.ids[..., 0], decide(features, centroids, top=1, temperature=1.0).ids[..., 0])


@pytest.mark.parametrize("columns", [2048, 4096, 8192])
@pytest.mark.parametrize("num", [1, 5, 8, 16, 20])
def test_the_largest_are_found_wherever_they_are(columns, num):
    generator = torch.Generator().manual_seed(num)
    values = torch.randn(6, columns, generator=generator)
    values[0, 64:128] += 10  # all in one group
    values[1, :: columns // 64] += 10  # one in every group, all at one place
    values[2] = torch.arange(columns)
    values[3] = -torch.arange(columns)
    values[4] = 0
    found = largest(values, num)
    assert torch.equal(values.gather(1, found), values.topk(num).values)
    assert all(len(set(row)) == num for row in found.tolist())


def test_distances_keep_their_digits_on_a_gpu_that_rounds_to_tf32():
    features, centroids = trained_features()
    x = features.permute(0, 2, 3, 1).flatten(0, 2)

    def product(rows, columns):
        """As a tensor core does it: factors of 10 stored bits, and sums of more."""
        return rounded_to_tf32(rows).double() @ rounded_to_tf32(columns).double()

    expected, norms = x.double() @ centroids.T.double(), x.norm(dim=1)[:, None] * centroids.norm(dim=1)
    assert ((product(x, centroids.T) - expected).abs() / norms).max() > 2**-16
    assert ((product(*split_for_tf32(x, centroids.T)) - expected).abs() / norms).max() < 2**-21


@pytest.mark.parametrize(("num_templates", "precision"), [(256, "highest"), (4096, "high")])
def test_decisions_on_a_gpu_never_wait_for_it(num_templates, precision, monkeypatch):
    """Fake tensors raise wherever the host would need a value of the device. `high` lets matmuls round to TF32."""
    config = TemplateDecisions(kind="templates", module="any", templates=num_templates)
    splits = []
    monkeypatch.setattr(templates, "split_for_tf32", lambda *factors: splits.append(1) or split_for_tf32(*factors))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with FakeTensorMode():
            features = torch.empty(2, 16, 8, 8, device="cuda")
            tables = {"centroids": torch.empty(num_templates, 16, device="cuda")}
            labels = torch.zeros(2, dtype=torch.int64, device="cuda")
            packed = templates.pack(config, features, labels, tables)
    finally:
        torch.set_float32_matmul_precision(before)
    assert bool(splits) == (precision == "high")
    assert {name: (tuple(one.shape), one.device.type) for name, one in packed.items()} == {
        "id": ((2, 8, 8, 4), "cuda"),
        "prob": ((2, 8, 8, 4), "cuda"),
        "dropped": ((2,), "cuda"),
    }


def test_what_is_packed_comes_back():
    generator = torch.Generator().manual_seed(0)
    chosen = decide(
        torch.randn(2, 4, 3, 3, generator=generator), torch.randn(64, 4, generator=generator), top=4, temperature=1.0
    )
    packed = pack_decisions(chosen)
    probs = unpack_probs(packed["prob"])
    assert (probs - chosen.probs).abs().max() < 3.1e-5
    assert (packed["id"] == chosen.ids).logical_or(packed["prob"] == 0).all()
    assert packed["prob"].max() <= 2**14 - 1
    torch.testing.assert_close(packed["dropped"], chosen.dropped.flatten(1).amax(1))


# ---- sub-classes -----------------------------------------------------------------------------------------------------


def test_lda_and_the_score_table_equal_the_authors():
    x = GOLDEN[f"{LDA}/in/features_f16"].astype(np.float32)
    y = GOLDEN[f"{LDA}/in/y"].astype(np.int64)
    scalings, xbar = fit_lda(x, y, 4)
    torch.testing.assert_close(xbar, torch.tensor(GOLDEN[f"{LDA}/out/xbar"]), rtol=1e-9, atol=1e-9)
    expected = torch.tensor(GOLDEN[f"{LDA}/out/scalings"])
    signs = (scalings * expected).sum(0).sign()
    torch.testing.assert_close(scalings * signs, expected, rtol=1e-6, atol=1e-8)
    projected = (torch.from_numpy(x).double() - xbar) @ expected
    torch.testing.assert_close(projected[:100], torch.tensor(GOLDEN[f"{LDA}/out/transformed_first100"]))
    pred = torch.tensor(GOLDEN[f"{LDA}/out/pred"].astype(np.int64))
    centers = torch.tensor(GOLDEN[f"{LDA}/out/centers"])
    prototypes = class_means(projected, pred, 15, centers)
    torch.testing.assert_close(prototypes, torch.tensor(GOLDEN[f"{LDA}/out/prototypes"]))
    counts = torch.zeros(15, 15, dtype=torch.float64)
    counts.index_put_((pred, nearest_prototype(projected, prototypes)), torch.ones(len(pred)).double(), accumulate=True)
    torch.testing.assert_close(normalised_table(counts), torch.tensor(GOLDEN[f"{LDA}/out/scores"]))


def test_lda_equals_scikit_learn_and_whitens_the_classes():
    vectors, labels = blobs(4, n=3000, centers=5), np.arange(3000) % 5
    vectors += 2 * np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)[labels]
    scalings, xbar = fit_lda(vectors, labels, 4)
    reference = LinearDiscriminantAnalysis(solver="svd").fit(vectors, labels)
    ours = (vectors - xbar.numpy()) @ scalings.numpy()
    theirs = reference.transform(vectors)[:, :4]
    ours *= np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
    within = sum(np.cov(ours[labels == label].T, bias=True) for label in range(5)) / 5
    np.testing.assert_allclose(within, np.eye(4), atol=1e-4)


def test_subclasses_have_rows_that_sum_to_one_and_recognise_themselves():
    labels = np.repeat(np.arange(4), 500)
    vectors = blobs(5, n=2000, centers=20)
    vectors += 3 * np.random.default_rng(1).standard_normal((4, 12)).astype(np.float32)[labels]
    config = SubclassDecisions(kind="subclasses", module="body", per_class=3, components=9, iterations=20)
    found = fit_subclasses(vectors, labels, config, num_classes=4, device=CPU)
    assert found.scalings.shape == (12, 3)  # at most classes - 1 directions
    assert found.table.shape == (12, 12)
    torch.testing.assert_close(found.table.sum(1), torch.ones(12))
    assert found.table.diagonal().mean() > 0.5
    with pytest.raises(DataError, match="class 1 has 2 feature vectors for 3 sub-classes"):
        fit_subclasses(vectors[:502], labels[:502], config, num_classes=2, device=CPU)


# ---- through the store -----------------------------------------------------------------------------------------------

DECISIONS = {
    "last": {"kind": "templates", "module": "body.5", "templates": 48, "top": 4, "iterations": 8},
    "hard": {"kind": "templates", "module": "body.5", "templates": 48, "top": 1, "grid": [2, 2]},
    "first": {"kind": "subclasses", "module": "body.2", "per_class": 3, "components": 9, "grid": [4, 4]},
}
OBJECTIVES = {
    "letkd1": [{"term": "ce"}, {"term": "decisions", "decisions": "last"}],
    "letkd2": [
        {"term": "ce"},
        {"term": "decisions", "decisions": "last", "after": "body.5"},
        {"term": "subclass_decisions", "decisions": "first", "after": "body.4"},
        {"term": "wttm", "weight": 1, "gamma": 0.3},
    ],
    "assigned": [{"term": "ce"}, {"term": "decisions", "decisions": "last", "assignment": "hard"}],
    "wrong_grid": [{"term": "ce"}, {"term": "decisions", "decisions": "hard"}],
}


@pytest.fixture(scope="module")
def letkd(teacher_weights):
    return make_recipe(
        teacher={"weights": str(teacher_weights)},
        capture={"decisions": DECISIONS},
        student={"model_args": {"width": 4}},
        objectives=OBJECTIVES,
    )


@pytest.fixture(scope="module")
def letkd_store(letkd, manifest, roots, tmp_path_factory):
    path = tmp_path_factory.mktemp("letkd") / "store"
    cache_teacher(letkd, manifest, roots, path, CPU)
    return path


@pytest.fixture
def letkd_file(letkd, tmp_path):
    file = tmp_path / "letkd.yaml"
    file.write_text(yaml.safe_dump(letkd.model_dump(mode="json", exclude_none=True)))
    return file


def test_decisions_from_the_store_are_those_of_the_live_teacher(letkd, letkd_store, manifest, roots):
    """Loss against random scores, per location: the store's top 4 against all 48 of the live teacher."""
    store = open_store(letkd_store)
    loader = training_images(letkd, manifest, roots)
    teacher = load_teacher(letkd, manifest, roots, 10, CPU)
    terms = letkd.objectives["letkd2"]
    stream = make_loader(letkd, source_of(letkd, loader, [store], terms), 0, CPU)
    offline, online = stored_signal([store], terms, CPU), live_signal(teacher, letkd, terms, store, CPU)
    centroids = tables_on(store, "last", CPU)["centroids"]
    for epoch in range(0, 9, 4):
        for batch in stream.epoch(epoch):
            stored, live = offline(batch), online(batch)
            assert torch.equal(stored.decisions["first"]["subclass"].long(), live.decisions["first"]["subclass"])
            _, (maps,) = teacher.logits_and_maps(batch.images, [TapPoint(module="body.5")])
            every = decide(maps, centroids, top=48, temperature=1.0)
            scores = torch.randn(len(batch.labels), 48, 4, 4, generator=torch.Generator().manual_seed(epoch))
            probs = stored.decisions["last"]["prob"]
            of_store = per_location(scores, stored.decisions["last"]["id"], probs)
            truncated = decide(maps, centroids, top=4, temperature=1.0)
            of_top = per_location(scores, truncated.ids, truncated.probs)
            assert (of_store - of_top).abs().mean() < 1e-4
            # Four probabilities, each rounded by up to 1/32766, times log p and a score, together up to 15.
            assert (of_store - of_top).abs().max() < 4 / 32766 * 15
            # What was dropped bounds the rest: total variation is exactly the dropped mass.
            of_all = per_location(scores, every.ids, every.probs)
            dropped = truncated.dropped
            reach = (scores.amax(1) - scores.amin(1)) + 2 * np.log(48)
            entropy = -(torch.xlogy(dropped, dropped) + torch.xlogy(1 - dropped, 1 - dropped))
            assert ((of_store - of_all).abs() <= dropped * reach + entropy + 1e-3).all()


@pytest.mark.slow
def test_decisions_of_a_real_teacher_on_photographs_come_back(real_data, manifest, tmp_path):
    """300 CIFAR-10 images, 8 views, the pretrained ResNet-56, 64 templates of its last map."""
    samples = read_tar(real_data / "cifar10" / "train-000000.tar.gz")[0][:300]
    tars = pack(samples, tmp_path / "cifar10", "train", 300)
    classes = manifest.dataset("cifar10").classes
    small = Dataset(folder="cifar10", classes=classes, splits={name: Split(tars=tars) for name in ("train", "test")})
    teachers = {"cifar10_resnet56": manifest.teachers["cifar10_resnet56"].model_copy(update={"expected": None})}
    changed = manifest.model_copy(update={"datasets": {"cifar10": small}, "teachers": teachers})
    about = {"kind": "templates", "module": "layer3", "templates": 64, "iterations": 10}
    recipe = load_recipe(ROOT / "pipelines/cifar10/resnet56_resnet20_letkd.yaml").model_copy(
        update={
            "data": make_recipe(data={"dataset": "cifar10"}).data,
            "capture": make_recipe(capture={"decisions": {"last": about}, "views_per_group": None}).capture,
            "objectives": {"letkd1": [Decisions(term="decisions", decisions="last")]},
        }
    )
    roots = [tmp_path, real_data]
    cache_teacher(recipe, changed, roots, tmp_path / "store", CPU)
    store = open_store(tmp_path / "store")
    teacher = load_teacher(recipe, changed, roots, 10, CPU)
    stream = make_loader(
        recipe,
        source_of(recipe, training_images(recipe, changed, roots), [store], recipe.objectives["letkd1"]),
        0,
        CPU,
    )
    offline = stored_signal([store], recipe.objectives["letkd1"], CPU)
    centroids = tables_on(store, "last", CPU)["centroids"]
    for batch in list(stream.epoch(3))[:2]:
        kept = offline(batch).decisions["last"]
        _, (maps,) = teacher.logits_and_maps(batch.images, [TapPoint(module="layer3")])
        truncated = decide(maps, centroids, top=4, temperature=1.0)
        scores = torch.randn(len(batch.labels), 64, 8, 8, generator=torch.Generator().manual_seed(0))
        of_store = decision_loss(scores, kept["id"], kept["prob"]).item()
        assert of_store == pytest.approx(decision_loss(scores, truncated.ids, truncated.probs).item(), abs=1e-4)
        every = decide(maps, centroids, top=64, temperature=1.0)
        dropped = truncated.dropped.mean().item()
        of_all = decision_loss(scores, every.ids, every.probs).item()
        reach = (scores.amax() - scores.amin()).item() + 2 * np.log(64)
        assert abs(of_store - of_all) <= dropped * reach + 2 * np.sqrt(dropped) + 1e-4


def per_location(scores, ids, probs):
    """`[B, H, W]`, by the very function that training uses."""
    batch, _, height, width = scores.shape
    flat = scores.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
    top = ids.shape[-1]
    values = [
        decision_loss(one[None], i[None], p[None])
        for one, i, p in zip(flat, ids.reshape(-1, 1, 1, top), probs.reshape(-1, 1, 1, top), strict=True)
    ]
    return torch.stack(values).view(batch, height, width)


@pytest.mark.parametrize("objective", ["letkd1", "letkd2", "assigned"])
def test_students_train_from_decisions_as_with_the_live_teacher(objective, letkd_file, letkd_store, where, tmp_path):
    options = ("--store", letkd_store, "--objective", objective, *where)
    assert invoke("distill", letkd_file, "--out", tmp_path / "offline", *options).exit_code == 0
    assert invoke("distill", letkd_file, "--out", tmp_path / "online", "--online", *options).exit_code == 0
    offline, online = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("offline", "online"))
    assert offline["kd_layer_parameters"] > 2 * 48 * 8
    assert offline["parameters"] == online["parameters"]
    one, other = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("offline", "online")
    )
    for name in one[0]:
        if name.startswith("loss_"):
            assert one[-1][name] == pytest.approx(other[-1][name], rel=1e-2)
    assert one[-1]["loss_decisions"] < one[0]["loss_decisions"]


def test_capture_with_decisions_resumes_and_its_digest_covers_the_templates(
    letkd, letkd_store, manifest, roots, tmp_path
):
    again = tmp_path / "again"
    cache_teacher(letkd, manifest, roots, again, CPU)
    assert open_store(again).digest == open_store(letkd_store).digest
    for name in ("manifest.json", "ledger/000001-00003-00006.json", "ledger/templates-first.json"):
        (again / name).unlink()
    cache_teacher(letkd, manifest, roots, again, CPU)
    store = open_store(again)
    assert store.digest == open_store(letkd_store).digest
    assert not list(again.glob("scratch-*"))
    statistics = {name: store.tables_statistics(name) for name in letkd.capture.decisions}
    assert statistics["last"]["vectors"] == 1438 * 16
    assert statistics["last"]["dead"] == 0
    assert 0 < statistics["last"]["utilisation"] <= 1
    fidelity = store.manifest.fidelity[""].decisions
    assert all(part["agreement"] > 0.999 for part in fidelity.values())
    assert 0 < fidelity["last"]["mean_first_probability"] <= 1
    assert 0 <= fidelity["last"]["mean_dropped"] <= fidelity["last"]["max_dropped"] < 1
    assert "decisions 'last'" in (again / "README.md").read_text()
    assert statistics["first"]["components"] == 8  # the tap has 8 channels


def test_decisions_that_are_not_the_teachers_keep_a_store_from_being_finished(
    letkd, letkd_store, manifest, roots, tmp_path, monkeypatch
):
    """A faulty writer that shifts decisions by one sample: every checksum is right, the teacher disagrees."""
    honest = cache.pack

    def shifted(*arguments):
        return {name: values.roll(1, dims=0) for name, values in honest(*arguments).items()}

    monkeypatch.setattr(cache, "pack", shifted)
    with pytest.raises(StoreCorrupt, match=r"of the decisions '.*' are those that the teacher takes again"):
        cache_teacher(letkd, manifest, roots, tmp_path / "store", CPU)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_damaged_templates_are_found(letkd_file, letkd_store, where, tmp_path):
    path = Path(shutil.copytree(letkd_store, tmp_path / "copy"))
    file = path / "targets.zarr/templates/first/table/c/0/0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    message = refused(
        "distill", letkd_file, "--store", path, "--objective", "letkd2", "--out", tmp_path / "run", *where
    )
    assert "templates/first/table/c/0/0: sha256" in message


def test_decision_arrays_are_small(letkd_store):
    """Near the entropy floor: 16 places of log2(48) bits are 11.2 bytes."""
    sizes, rows = open_store(letkd_store).manifest.bytes_by_array, 1438 * 9
    assert sizes["decisions/hard/id"] / rows < 4 * np.log2(48) / 8 * 1.2
    assert "decisions/hard/prob" not in sizes


def test_sub_classes_do_not_give_hidden_labels_away(letkd, letkd_store, manifest, roots):
    term = SubclassTerm(term="subclass_decisions", decisions="first", after="body.4")
    store = open_store(letkd_store)
    table = tables_on(store, "first", CPU)["table"]
    scores = torch.randn(4, 30, 4, 4, requires_grad=True)
    decided = {"subclass": torch.zeros(4, 4, 4, dtype=torch.uint8), "table": table}
    said, logits = TeacherSignal(decisions={"first": decided}), torch.zeros(4, 10)

    def value(labels):
        return term(logits, said, LossBatch(labels, scores={"body.4": scores}))

    value(torch.tensor([3, -1, 5, -1])).backward()
    assert scores.grad[[1, 3]].abs().max() == 0
    assert scores.grad[[0, 2]].abs().max() > 0
    assert value(torch.full((4,), -1)).item() == 0


def test_wrong_decisions_are_messages(letkd_file, letkd_store, recipe_file, store_path, where, tmp_path, letkd):
    out = ("--out", tmp_path / "run", *where)
    with_store = ("distill", letkd_file, "--store", letkd_store, *out)
    message = refused(*with_store, "--objective", "wrong_grid")
    assert "were made on a grid of [2, 2], the student's map behind 'penultimate' is [4, 4]" in message
    message = refused(*with_store, "--objective", "letkd1", "--set", "capture.decisions.last.templates=20")
    assert re.search(r"capture.decisions.last.templates: \d+ in the store, 20 in the recipe", message)
    message = refused("distill", letkd_file, "--store", store_path, "--objective", "letkd1", *out)
    assert "holds no decisions 'last'" in message
    message = refused(*with_store, "--objective", "letkd1", "--set", "objectives.letkd1.1.decisions=lsat")
    assert "Did you mean 'last'?" in message
    message = refused(*with_store, "--objective", "letkd1", "--set", "objectives.letkd1.1.after=body.55")
    assert "no module 'body.55' of the student gives a feature map. Did you mean 'body.5'?" in message
    capture = ("cache-teacher", letkd_file, "--store", tmp_path / "new", *where)
    message = refused(*capture, "--set", "capture.decisions.last.module=body.6x")
    assert "the network has no module 'body.6x'" in message
    message = refused(*capture, "--set", "capture.decisions.last.module=head")
    assert "tap 'head': gives [1, 10], neither a map [B, D, H, W] nor tokens" in message
    message = refused(*capture, "--set", "capture.decisions.last.max_vectors=20", "--set", "data.tars=[2]")
    assert "48 templates from" in message
    with pytest.raises(RecipeError, match="cannot use decisions 'first' of kind 'subclasses'"):
        letkd.decisions_of(letkd.objectives["letkd1"][1].model_copy(update={"decisions": "first"}))
    message = refused("distill", letkd_file, "--online", "--objective", "letkd1", *out)
    assert "give --store beside --online" in message


def test_a_tap_whose_map_changes_its_size_or_is_not_finite_is_refused(letkd_file, teacher_weights, where, tmp_path):
    command = ("cache-teacher", letkd_file, *where, "--store")
    message = refused(*command, tmp_path / "a", "--set", "teacher.model=networks:changing_map")
    assert "gives" in message
    assert "before it gave" in message
    message = refused(*command, tmp_path / "b", "--set", "teacher.model=networks:infinite_map")
    assert "tap 'body.5': features of sample '" in message


def test_kd_layers_inside_and_behind_a_stage_go_together(letkd, manifest, roots):
    """In the order of a recipe the outer layer may come first; it changes the names of what is inside."""
    both = [
        Decisions(term="decisions", decisions="last"),
        SubclassTerm(term="subclass_decisions", decisions="first", after="layer3.0"),
    ]
    deep = letkd.model_copy(
        update={"student": letkd.student.model_copy(update={"model": "cifar:resnet8", "model_args": {}})}
    )
    loader = training_images(deep, manifest, roots)
    student = new_student(deep, loader, 0, CPU, both)
    student.network.train()(torch.randn(2, 3, 8, 8))
    assert student.kd_layers["penultimate"].scores.shape == (2, 48, 2, 2)
    assert student.kd_layers["layer3.0"].scores.shape == (2, 30, 2, 2)
    with pytest.raises(RecipeError, match="two KD layers behind one module"):
        new_student(deep, loader, 0, CPU, [both[0], both[0].model_copy(update={"after": "layer3"})])


def test_an_unsupervised_kd_layer_is_a_weight_of_zero(letkd, letkd_store, manifest, roots, tmp_path):
    terms = [letkd.objectives["letkd1"][0], letkd.objectives["letkd1"][1].model_copy(update={"weight": 0.0})]
    free = letkd.model_copy(update={"objectives": {"free": terms}})
    result = distill(free, manifest, roots, tmp_path / "run", CPU, stores=[str(letkd_store)])
    assert result.kd_layer_parameters > 0
    assert TeacherSignal().decisions == {}


def test_the_inspect_page_shows_views_classes_and_templates(letkd_store, where, tmp_path):
    page = tmp_path / "page.html"
    command = ("store", "inspect", letkd_store, "--out", page, *where, "--key")
    assert invoke(*command, "0000").exit_code == 0
    text = page.read_text()
    assert text.count('<div class="view">') == 8
    assert text.count('class="bar"') == 40
    assert "templates of last over view 0" in text
    assert 1 <= text.split("<h2>Templates of last")[1].split("<h2>")[0].count('class="template"') <= 12
    assert "http" not in text.replace("http-equiv", "")
    assert "holds no sample '12345678'. Keys look like '0000'" in refused(*command, "12345678")


def test_the_command_line_lists_what_can_be_tapped():
    output = invoke("taps", "cifar:resnet8", "--size", "32").stdout
    assert "layer3.0" in output
    assert "64 x 8 x 8" in output
    assert "no network 'cifar:resnt8'" in refused("taps", "cifar:resnt8")
