"""Sets of labels: bits, terms of objectives, mean average precision."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch.distributions import Bernoulli, kl_divergence

from offline_kd.data.label_sets import (
    are_known,
    hidden_where,
    label_tensor,
    names_in,
    pack_sets,
    packed_bytes,
    problem_of_sets,
    unpack_sets,
)
from offline_kd.distill.loss import loss_batch
from offline_kd.models.average_precision import average_precision, mean_average_precision
from offline_kd.objectives import bce, binary_kd, example_terms
from offline_kd.objectives.bce import BCE
from offline_kd.objectives.binary_kd import BinaryKD
from offline_kd.objectives.gradient import gradient
from offline_kd.objectives.term import LossBatch
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.topk import TopK

FLOATS = st.floats(-30, 30, allow_nan=False, width=32)


# ---- bits ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_sets_are_what_they_were_when_they_are_unpacked(data):
    classes = data.draw(st.integers(2, 40))
    sets = data.draw(st.lists(st.sets(st.integers(0, classes - 1)), min_size=1, max_size=5))
    packed = pack_sets([sorted(one) for one in sets], classes)
    assert packed.shape == (len(sets), packed_bytes(classes))
    assert problem_of_sets(packed, classes) == ""
    rows = unpack_sets(label_tensor(packed), classes)
    assert [set(row.nonzero().flatten().tolist()) for row in rows] == sets
    assert are_known(label_tensor(packed)).all()
    assert names_in(packed[0], [str(index) for index in range(classes)]) == [str(one) for one in sorted(sets[0])]


@pytest.mark.parametrize("classes", [4, 7, 8, 9])
def test_a_hidden_set_is_not_an_empty_one(classes):
    packed = label_tensor(pack_sets([[], [0], [classes - 1]], classes))
    seen = hidden_where(packed, torch.tensor([True, False, True]))
    assert are_known(seen).tolist() == [True, False, True]
    assert unpack_sets(seen, classes).sum(dim=1).tolist() == [0, 0, 1]
    assert "1 sets of labels were never written, the first at row 1" in problem_of_sets(seen.numpy(), classes)


def test_classes_beyond_the_last_are_found():
    packed = pack_sets([[0], [1]], 3)
    packed[1] |= 1 << 5
    assert "1 sets have classes beyond the last, the first at row 1" in problem_of_sets(packed, 3)


def rows_of(sets, other=None, share=None, known=None):
    packed = label_tensor(pack_sets(sets, 3))
    labels = packed if known is None else hidden_where(packed, torch.tensor(known))
    others = labels if other is None else label_tensor(pack_sets(other, 3))
    shares = torch.ones(len(sets)) if share is None else torch.tensor(share)
    return SimpleNamespace(labels=labels, other_labels=others, share=shares)


def test_sets_of_mixed_images_are_mixed_by_their_shares():
    found = loss_batch(rows_of([[0], [0, 1], []], [[0], [2], [1]], [0.25, 0.75, 0.5]), 3, mixes=True)
    assert found.mixing is None
    expected = [[1.0, 0, 0], [0.75, 0.75, 0.25], [0, 0.5, 0]]
    torch.testing.assert_close(found.labels, torch.tensor(expected))


def test_bce_averages_over_the_samples_whose_labels_are_known():
    batch = loss_batch(rows_of([[0, 2], [], [1]], known=[True, True, False]), 3, mixes=False)
    z = torch.tensor([[1.0, -2, 0.5], [0.3, 0, -1], [5.0, 5, 5]], requires_grad=True)
    value = BCE(term="bce")(z, SimpleNamespace(), batch)
    wrong = [-1.0, -2.0, -0.5, 0.3, 0.0, -1.0]  # how far a logit is on the wrong side, of the two known samples
    assert value.item() == pytest.approx(sum(math.log1p(math.exp(x)) for x in wrong) / 6, rel=1e-6)
    assert BCE(term="bce").count(batch) == 2
    value.backward()
    assert z.grad is not None
    assert z.grad[2].tolist() == [0, 0, 0]
    hidden = loss_batch(rows_of([[0]], known=[False]), 3, mixes=False)
    assert BCE(term="bce")(z[:1], SimpleNamespace(), hidden).item() == 0


def test_label_smoothing_draws_sets_to_a_half():
    z = torch.randn(4, 3, dtype=torch.float64)
    y = (torch.arange(12).view(4, 3) % 2).double()
    smoothed = BCE(term="bce")(z, SimpleNamespace(), LossBatch(y, label_smoothing=0.2))
    torch.testing.assert_close(smoothed, bce(z, torch.where(y > 0, 0.9, 0.1).double()))


# ---- binary KD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_binary_kd_is_the_divergence_of_bernoullis(temperature):
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (4 * torch.randn(16, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    apart = kl_divergence(Bernoulli(logits=z_t / temperature), Bernoulli(logits=z_s / temperature))
    found = binary_kd(z_s, z_t, temperature=temperature)
    torch.testing.assert_close(found, temperature**2 * apart.mean(), rtol=1e-12, atol=0)
    # Its gradient, of which nothing is left but a difference of probabilities.
    true = temperature * ((z_s / temperature).sigmoid() - (z_t / temperature).sigmoid()) / z_s.numel()
    term = BinaryKD(term="binary_kd", temperature=temperature)
    torch.testing.assert_close(gradient(term, z_s, z_t, z_s.argmax(1)), true, rtol=1e-9, atol=1e-15)


def test_gradients_of_terms_of_sets_are_those_of_finite_differences():
    z_s, z_t = (torch.randn(3, 4, dtype=torch.float64, requires_grad=one) for one in (True, False))
    assert torch.autograd.gradcheck(lambda z: binary_kd(z, z_t, temperature=2.0), z_s)
    assert torch.autograd.gradcheck(lambda z: bce(z, (z_t > 0).double()), z_s)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=2, max_size=6), st.sampled_from([1.0, 2.0, 4.0]))
def test_binary_kd_is_zero_at_equal_logits_and_never_negative(pairs, temperature):
    z_s, z_t = torch.tensor(pairs, dtype=torch.float64).T
    assert binary_kd(z_t[None], z_t[None], temperature=temperature).item() == 0
    assert binary_kd(z_s[None], z_t[None], temperature=temperature).item() >= -1e-12


def test_a_constant_added_to_a_row_changes_what_sigmoids_say():
    z = torch.randn(4, 5)
    assert binary_kd(z + 1, z, temperature=1.0) > 0.01
    assert example_terms()["kd"](z + 1, SimpleNamespace(logits=z), LossBatch(z.argmax(1))).abs() < 1e-5


@pytest.mark.parametrize(("student", "teacher"), [(1e4, 1e4), (1e4, -1e4), (-1e4, 1e4), (0.0, 1e4), (1e4, 0.0)])
def test_logits_of_any_size_have_finite_values_and_gradients(student, teacher):
    z_s, z_t = torch.full((2, 3), student, requires_grad=True), torch.full((2, 3), teacher)
    for value in (binary_kd(z_s, z_t, temperature=2.0), bce(z_s, (z_t > 0).float())):
        (found,) = torch.autograd.grad(value, z_s)
        assert value.isfinite()
        assert found.isfinite().all()
    wrong = binary_kd(torch.full((1, 1), student), torch.full((1, 1), teacher), temperature=1.0).item()
    if student == -teacher:
        assert wrong == pytest.approx(1e4)


def test_terms_say_what_they_need_of_a_codec():
    term = BinaryKD(term="binary_kd", temperature=4)
    assert term.needs.label == "set"
    assert Float16(name="f16").serves(term.needs) == ""
    assert TopK(name="topk", k=5, tail_temperature=4).serves(term.needs)


# ---- mean average precision ----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_average_precision_is_that_of_scikit_learn_with_ties_too(data):
    count = data.draw(st.integers(1, 30))
    scores = np.array(data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=count, max_size=count)))
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    positive[data.draw(st.integers(0, count - 1))] = True
    assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores), abs=1e-12)


def test_mean_average_precision_is_that_of_scikit_learn_over_classes_with_images():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(500, 12)).astype(np.float32)
    positive = generator.random((500, 12)) < np.linspace(0.01, 0.6, 12)
    expected = average_precision_score(positive, scores, average="macro")
    assert mean_average_precision(scores, positive) == pytest.approx(expected, abs=1e-9)
    positive[:, 3] = False
    others = [one for one in range(12) if one != 3]
    expected = average_precision_score(positive[:, others], scores[:, others], average="macro")
    assert mean_average_precision(scores, positive) == pytest.approx(expected, abs=1e-9)
    assert mean_average_precision(scores, np.zeros_like(positive)) is None
