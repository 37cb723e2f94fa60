"""Every objective against the authors' own numbers, and the identities that tie the objectives together."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from offline_kd.objectives import dist, dkd, dtkd, dtkd_fallbacks, kd, nkd, power_sum, ttm, wttm
from offline_kd.objectives.dtkd import dtkd_temperatures

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "losses.npz", allow_pickle=False)
LOGIT_CASES = [case for case in json.loads(str(GOLDEN["index"])) if "input" in case]


def warm(hp):
    return min(hp["epoch"] / hp["warmup"], 1)


def with_ce(distill, hp, z_s, y):
    return hp.get("ce_weight", 0) * F.cross_entropy(z_s, y) + distill


EVALUATE = {
    "kd": lambda z_s, z_t, y, hp: kd(z_s, z_t, temperature=hp["T"]),
    "ttm": lambda z_s, z_t, y, hp: ttm(z_s, z_t, gamma=hp["gamma"]),
    "wttm": lambda z_s, z_t, y, hp: wttm(z_s, z_t, gamma=hp["gamma"]),
    "dtkd": lambda z_s, z_t, y, hp: dtkd(z_s, z_t, temperature=hp["T"]),
    "dkd": lambda z_s, z_t, y, hp: dkd(z_s, z_t, y, alpha=hp["alpha"], beta=hp["beta"], temperature=hp["T"]),
    "dist": lambda z_s, z_t, y, hp: dist(z_s, z_t, beta=hp["beta"], gamma=hp["gamma"], temperature=hp["tau"]),
    "nkd": lambda z_s, z_t, y, hp: nkd(z_s, z_t, y, gamma=hp["gamma"], temperature=hp["temp"]),
    "kd_total": lambda z_s, z_t, y, hp: with_ce(hp["kd_weight"] * kd(z_s, z_t, temperature=hp["T"]), hp, z_s, y),
    "ttm_total": lambda z_s, z_t, y, hp: with_ce(hp["beta"] * ttm(z_s, z_t, gamma=hp["gamma"]), hp, z_s, y),
    "wttm_total": lambda z_s, z_t, y, hp: with_ce(hp["beta"] * wttm(z_s, z_t, gamma=hp["gamma"]), hp, z_s, y),
    "dkd_total": lambda z_s, z_t, y, hp: with_ce(
        warm(hp) * dkd(z_s, z_t, y, alpha=hp["alpha"], beta=hp["beta"], temperature=hp["T"]), hp, z_s, y
    ),
    "dtkd_total": lambda z_s, z_t, y, hp: with_ce(
        warm(hp) * (hp["alpha"] * dtkd(z_s, z_t, temperature=hp["T"]) + hp["beta"] * kd(z_s, z_t, temperature=hp["T"])),
        hp,
        z_s,
        y,
    ),
}


def teacher_of_case(case, dtype):
    """The teacher's logits: stored, or for the truncated cases rebuilt from top-k and an evenly spread tail."""
    if "topk" not in case["method"]:
        return torch.tensor(GOLDEN[f"{case['input']}/z_t"]).to(dtype)
    values = {name: torch.tensor(GOLDEN[f"{case['id']}/{name}"]) for name in ("topk_idx", "topk_logp", "tail_logmass")}
    batch, classes = GOLDEN[f"{case['input']}/z_t"].shape
    k = values["topk_idx"].shape[1]
    logits = (values["tail_logmass"].reshape(-1, 1) - math.log(classes - k)).expand(batch, classes)
    logits = logits.to(dtype).scatter(1, values["topk_idx"].long(), values["topk_logp"].to(dtype))
    if case["method"].startswith("dtkd"):
        logits = logits + torch.tensor(GOLDEN[f"{case['id']}/lse"]).reshape(-1, 1)
    return logits


@pytest.mark.parametrize("case", LOGIT_CASES, ids=lambda case: f"{case['id'][-4:]}-{case['method']}-{case['dtype']}")
def test_objectives_equal_the_authors_code(case):
    dtype = getattr(torch, case["dtype"])
    z_s = torch.tensor(GOLDEN[f"{case['input']}/z_s"]).to(dtype).requires_grad_()
    y = torch.tensor(GOLDEN[f"{case['input']}/y"])
    method = case["method"].removesuffix("_topk_uniform_tail")
    loss = EVALUATE[method](z_s, teacher_of_case(case, dtype), y, case["hp"])
    loss.backward()
    if not case["well_behaved"]:
        assert loss.isfinite()
        assert z_s.grad.isfinite().all()
        return
    expected = GOLDEN[f"{case['id']}/loss"].item()
    loss_rtol, grad_rtol = (1e-11, 1e-12) if dtype == torch.float64 else (7e-4, 2e-5)
    assert loss.item() == pytest.approx(expected, rel=loss_rtol, abs=1e-6 if dtype == torch.float32 else 1e-14)
    if f"{case['id']}/grad_zs" in GOLDEN:
        gradient = torch.tensor(GOLDEN[f"{case['id']}/grad_zs"])
        assert (z_s.grad - gradient).abs().max() <= grad_rtol * gradient.abs().max()
    if f"{case['id']}/power_sum" in GOLDEN and "topk" not in case["method"]:
        weight = power_sum(teacher_of_case(case, dtype), case["hp"]["gamma"])
        torch.testing.assert_close(weight, torch.tensor(GOLDEN[f"{case['id']}/power_sum"]), rtol=1e-5, atol=0)
    if f"{case['id']}/t_student" in GOLDEN and "topk" not in case["method"]:
        t_teacher, t_student = dtkd_temperatures(z_s, teacher_of_case(case, dtype), temperature=case["hp"]["T"])
        torch.testing.assert_close(t_teacher, torch.tensor(GOLDEN[f"{case['id']}/t_teacher"]), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            t_student.detach(), torch.tensor(GOLDEN[f"{case['id']}/t_student"]), rtol=1e-5, atol=0
        )


def test_every_logit_method_of_the_golden_file_is_checked():
    assert {case["method"].removesuffix("_topk_uniform_tail") for case in LOGIT_CASES} == set(EVALUATE)
    assert sum(case["well_behaved"] for case in LOGIT_CASES) > 130


# ---- identities, in float64 ------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**31 - 1)
TEMPERATURES = st.floats(1.05, 20)


def rows(seed, batch=5, classes=12, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    z_s = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    z_t = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (batch,), generator=generator)
    return z_s, z_t, y


def gradient(objective, z_s):
    z_s = z_s.clone().requires_grad_()
    objective(z_s).backward()
    return z_s.grad


def assert_near(a, b, tolerance=1e-9):
    a = torch.as_tensor(a)
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


@given(SEEDS)
def test_kd_ttm_and_wttm_agree_at_temperature_one(seed):
    z_s, z_t, _ = rows(seed)
    assert_near(ttm(z_s, z_t, gamma=1.0), kd(z_s, z_t, temperature=1.0))
    assert_near(wttm(z_s, z_t, gamma=1.0), kd(z_s, z_t, temperature=1.0))


@given(SEEDS, TEMPERATURES)
def test_renyi_split_of_ttm(seed, temperature):
    """D(p_T || q) = T D(p_T || q_T) - (T - 1) H_g(q) + (T - 1) H(p_T), with g = 1 / T."""
    z_s, z_t, _ = rows(seed)
    p_t = F.softmax(z_t / temperature, dim=1)
    renyi = torch.log(power_sum(z_s, 1 / temperature)) / (1 - 1 / temperature)
    shannon = -(p_t * p_t.log()).sum(1)
    matched = kd(z_s, z_t, temperature=temperature) / temperature**2
    split = temperature * matched - (temperature - 1) * (renyi.mean() - shannon.mean())
    assert_near(ttm(z_s, z_t, gamma=1 / temperature), split)


@given(SEEDS, TEMPERATURES, st.floats(0.05, 0.95))
def test_ce_plus_ttm_is_tempered_kd_with_a_renyi_entropy_bonus(seed, temperature, lam):
    z_s, z_t, y = rows(seed)
    ce = F.cross_entropy(z_s, y)
    p_t = F.softmax(z_t / temperature, dim=1)
    renyi = torch.log(power_sum(z_s, 1 / temperature)) / (1 - 1 / temperature)
    shannon = -(p_t * p_t.log()).sum(1)
    beta = lam * temperature / (1 - lam)
    right = (1 - lam) * ce + lam * kd(z_s, z_t, temperature=temperature)
    right = right - lam * temperature * (temperature - 1) * (renyi - shannon).mean()
    assert_near(ce + beta * ttm(z_s, z_t, gamma=1 / temperature), right / (1 - lam), 1e-8)


@given(SEEDS, TEMPERATURES)
def test_wttm_is_ttm_times_a_constant_when_all_teacher_rows_hold_the_same_probabilities(seed, temperature):
    z_s, z_t, _ = rows(seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([z_t[0, torch.randperm(z_t.shape[1], generator=generator)] for _ in z_t])
    weight = power_sum(shuffled, 1 / temperature)[0]
    assert_near(wttm(z_s, shuffled, gamma=1 / temperature), weight * ttm(z_s, shuffled, gamma=1 / temperature))


ALL = {
    "kd": lambda z_s, z_t, y: kd(z_s, z_t, temperature=4.0),
    "ttm": lambda z_s, z_t, y: ttm(z_s, z_t, gamma=0.3),
    "wttm": lambda z_s, z_t, y: wttm(z_s, z_t, gamma=0.3),
    "dkd": lambda z_s, z_t, y: dkd(z_s, z_t, y, alpha=1.0, beta=8.0, temperature=4.0),
    "dist": lambda z_s, z_t, y: dist(z_s, z_t, beta=1.0, gamma=1.0, temperature=4.0),
    "nkd": lambda z_s, z_t, y: nkd(z_s, z_t, y, gamma=1.5, temperature=1.0),
    "dtkd": lambda z_s, z_t, y: dtkd(z_s, z_t, temperature=4.0),
}


@given(SEEDS)
@pytest.mark.parametrize("name", ALL)
def test_permuting_the_classes_of_both_changes_nothing(name, seed):
    z_s, z_t, y = rows(seed)
    order = torch.randperm(z_s.shape[1], generator=torch.Generator().manual_seed(seed))
    assert_near(ALL[name](z_s, z_t, y), ALL[name](z_s[:, order], z_t[:, order], order.argsort()[y]))


@given(SEEDS)
@pytest.mark.parametrize("name", [name for name in ALL if name != "dtkd"])
def test_adding_a_constant_to_a_row_changes_nothing_and_gradients_sum_to_zero(name, seed):
    z_s, z_t, y = rows(seed)
    shift = torch.randn(len(z_s), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_near(ALL[name](z_s + shift[:, :1], z_t + shift[:, 1:], y), ALL[name](z_s, z_t, y))
    assert_near(gradient(lambda z: ALL[name](z, z_t, y), z_s).sum(1), torch.zeros(len(z_s), dtype=torch.float64))


def test_dtkd_does_depend_on_the_offset_of_the_logits():
    z_s, z_t, y = rows(0)
    assert abs(ALL["dtkd"](z_s, z_t + 5, y) - ALL["dtkd"](z_s, z_t, y)) > 1e-3


@given(SEEDS)
def test_ttm_gradient_is_student_minus_transformed_teacher(seed):
    z_s, z_t, _ = rows(seed)
    expected = (F.softmax(z_s, 1) - F.softmax(0.3 * z_t, 1)) / len(z_s)
    assert_near(gradient(lambda z: ttm(z, z_t, gamma=0.3), z_s), expected)
    weighted = power_sum(z_t, 0.3)[:, None] * expected
    assert_near(gradient(lambda z: wttm(z, z_t, gamma=0.3), z_s), weighted)


@given(SEEDS)
def test_power_sums_lie_between_one_and_their_uniform_value(seed):
    _, z_t, _ = rows(seed)
    weight = power_sum(z_t, 0.2)
    assert (weight >= 1 - 1e-12).all()
    assert (weight <= z_t.shape[1] ** 0.8 + 1e-9).all()


@given(SEEDS, TEMPERATURES)
def test_dtkd_temperatures_share_out_the_reference_and_equalise_the_maxima(seed, temperature):
    z_s, z_t, _ = rows(seed)
    z_s, z_t = z_s - z_s.amin(1, keepdim=True) + 0.1, z_t - z_t.amin(1, keepdim=True) + 0.1
    t_teacher, t_student = dtkd_temperatures(z_s, z_t, temperature=temperature)
    assert_near(t_teacher + t_student, torch.full_like(t_teacher, 2 * temperature))
    assert_near(z_t.amax(1, keepdim=True) / t_teacher, z_s.amax(1, keepdim=True) / t_student)
    assert (t_teacher * t_student <= temperature**2 + 1e-9).all()


@given(SEEDS)
def test_dtkd_with_equal_maxima_has_the_value_of_kd_and_its_gradient_off_the_maximum(seed):
    z_s, z_t, _ = rows(seed)
    z_s = z_s - z_s.amax(1, keepdim=True) + 6
    z_t = z_t - z_t.amax(1, keepdim=True) + 6
    assert_near(dtkd(z_s, z_t, temperature=4.0), kd(z_s, z_t, temperature=4.0))
    plain = gradient(lambda z: kd(z, z_t, temperature=4.0), z_s)
    dynamic = gradient(lambda z: dtkd(z, z_t, temperature=4.0), z_s)
    at_maximum = F.one_hot(z_s.argmax(1), z_s.shape[1]).bool()
    assert_near(dynamic[~at_maximum], plain[~at_maximum])
    assert_near(gradient(lambda z: dtkd(z, z_t, temperature=4.0, detach_temperatures=True), z_s), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtkd_survives_a_zero_head_and_maxima_of_opposite_sign_and_counts_them(dtype):
    z_t = torch.tensor([[5.0, 1.0, -2.0], [-1.0, -3.0, -2.0], [2.0, 1.0, 0.5], [0.0, -1.0, -2.0]], dtype=dtype)
    z_s = torch.tensor([[0.0, 0.0, 0.0], [4.0, 1.0, 0.0], [1.0, 3.0, 0.0], [1.0, 0.0, -1.0]], dtype=dtype)
    assert dtkd_fallbacks(z_s, z_t).item() == 3
    z_s.requires_grad_()
    loss = dtkd(z_s, z_t, temperature=4.0)
    loss.backward()
    assert loss.item() >= 0
    assert z_s.grad.isfinite().all()
    fallen = torch.tensor([0, 1, 3])
    rest = dtkd(z_s[2:3], z_t[2:3], temperature=4.0)
    assert_near(loss * 4, kd(z_s[fallen], z_t[fallen], temperature=4.0) * 3 + rest, 1e-5)


@given(SEEDS)
def test_logsumexp_sharpness_solves_the_condition_that_the_paper_states(seed):
    z_s, z_t, _ = rows(seed)
    z_t = 1.5 * z_t
    t_teacher, t_student = dtkd_temperatures(z_s, z_t, temperature=4.0, sharpness="logsumexp")
    assert_near(t_teacher + t_student, torch.full_like(t_teacher, 8.0))
    centred_s, centred_t = z_s - z_s.mean(1, keepdim=True), z_t - z_t.mean(1, keepdim=True)
    assert_near(torch.logsumexp(centred_t / t_teacher, 1), torch.logsumexp(centred_s / t_student, 1), 1e-6)


@given(SEEDS)
def test_dkd_with_beta_one_minus_the_label_probability_is_kd(seed):
    z_s, z_t, y = rows(seed)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(y)):
        beta = 1 - F.softmax(z_t[row] / 4, dim=0)[y[row]].item()
        one = slice(row, row + 1)
        total += dkd(z_s[one], z_t[one], y[one], alpha=1.0, beta=beta, temperature=4.0) / len(y)
    assert_near(total, kd(z_s, z_t, temperature=4.0))


@given(SEEDS)
def test_divergences_are_not_negative_and_vanish_where_they_should(seed):
    z_s, z_t, y = rows(seed)
    positive_s, positive_t = z_s - z_s.amin(1, keepdim=True) + 1, z_t - z_t.amin(1, keepdim=True) + 1
    for value in (ALL["kd"](z_s, z_t, y), ALL["dkd"](z_s, z_t, y), ALL["dtkd"](positive_s, positive_t, y)):
        assert value >= -1e-12
    for name in ("kd", "dkd", "dtkd"):
        assert_near(ALL[name](z_t, z_t, y), 0.0)
    assert_near(ttm(0.3 * z_t + 7, z_t, gamma=0.3), 0.0)
    assert_near(wttm(0.3 * z_t + 7, z_t, gamma=0.3), 0.0)
    assert abs(dist(z_t, z_t, beta=1.0, gamma=1.0, temperature=4.0)) < 1e-3
    assert nkd(z_t, z_t, y, gamma=1.5, temperature=1.0) > 0


def test_ttm_matches_a_value_worked_by_hand():
    """p_t = (1/2, 1/2), p_s = (1/4, 3/4): 1/2 log(2) + 1/2 log(2/3) = 1/2 log(4/3)."""
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    assert ttm(student, teacher, gamma=0.25).item() == pytest.approx(0.5 * math.log(4 / 3))


def test_ttm_keeps_classes_far_below_the_maximum():
    """A class 120 nats below the best underflows as a float32 probability; its power 0.1 is e**-12 all the same."""
    student = torch.zeros(1, 2, dtype=torch.float32, requires_grad=True)
    teacher = torch.tensor([[120.0, 0.0]])
    loss = ttm(student, teacher, gamma=0.1)
    exact = ttm(student.double(), teacher.double(), gamma=0.1)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert power_sum(teacher, 0.1).item() == pytest.approx(1 + math.exp(-12), rel=1e-6)


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([1.0, 30.0, 1000.0]))
@pytest.mark.parametrize("name", ALL)
def test_losses_and_gradients_stay_finite_in_float32_at_any_scale(name, seed, scale):
    z_s, z_t, y = (value.float() if value.is_floating_point() else value for value in rows(seed, scale=scale))
    z_s = z_s.requires_grad_()
    loss = ALL[name](z_s, z_t, y)
    loss.backward()
    assert loss.isfinite()
    assert z_s.grad.isfinite().all()
