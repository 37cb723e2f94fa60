"""Templates are K-means at its best, decisions come back from the store as the teacher made them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU
from sklearn.cluster import KMeans as Reference
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from offline_kd.cache.kmeans import _highest, kmeans
from offline_kd.cache.lda import class_means, fit_lda, fit_subclasses, nearest_prototype, normalised_table
from offline_kd.cache.teacher import load_teacher
from offline_kd.distill.training import training_images
from offline_kd.models.taps import TapPoint
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
from offline_kd.support.errors import DataError

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
