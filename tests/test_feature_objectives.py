"""Objectives on features against the authors' own numbers, and what must be true of them whatever the numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import offline_kd as okd
from offline_kd.objectives import (
    ContrastiveMemory,
    DatasetRows,
    crd,
    crd_normaliser,
    crd_scores,
    embedding,
    itrd,
    itrd_correlation,
    itrd_dropped,
    itrd_information,
    rkd_angle,
    rkd_distance,
    wttm,
)
from offline_kd.objectives.crd import _of_all, _of_wanted
from offline_kd.objectives.features import unit
from offline_kd.support.errors import TrainingError

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "features.npz", allow_pickle=False)
INDEX = json.loads(str(GOLDEN["index"]))
CPU = torch.device("cpu")


def cases(method):
    return [case for case in INDEX if case["method"] == method]


def name(case):
    return f"{case['id'][-4:]}-{case['dtype']}"


def value(case, key):
    """An input in the case's dtype."""
    found = torch.tensor(
        GOLDEN[f"{case['input']}/{key}" if f"{case['input']}/{key}" in GOLDEN else f"{case['id']}/{key}"]
    )
    return found.to(getattr(torch, case["dtype"])) if found.is_floating_point() else found


def near(found, case, key, *, scale=None, float64=3e-14, float32=1.2e-5):
    expected = torch.tensor(GOLDEN[f"{case['id']}/{key}"])
    scale = expected.abs().max() if scale is None else scale
    tolerance = float64 if case["dtype"] == "float64" else float32
    assert (found.detach() - expected.view_as(found)).abs().max() <= tolerance * scale, key


def rows_of(labels, seed=0):
    return DatasetRows(np.arange(len(labels), dtype=np.uint64), labels, seed)


def memory_of(case, **options):
    hp = case["hp"]
    rows = rows_of(torch.tensor(GOLDEN[f"{case['input']}/labels"]))
    head = ContrastiveMemory(
        hp["s_dim"],
        hp["t_dim"],
        rows,
        width=hp["feat_dim"],
        negatives=hp["nce_k"],
        temperature=hp.get("nce_t", 0.07),
        momentum=hp.get("nce_m", 0.5),
        mode=hp.get("mode", "exact"),
        **options,
    ).to(getattr(torch, case["dtype"]))
    with torch.no_grad():
        for side in "st":
            linear = getattr(head, f"embed_{side}")
            linear.weight.copy_(value(case, f"embed_{side}_weight"))
            linear.bias.copy_(value(case, f"embed_{side}_bias"))
            getattr(head, f"memory_{side}").copy_(value(case, f"memory_{side}"))
    return head


@pytest.mark.parametrize("case", cases("crd"), ids=name)
def test_crd_equals_the_authors_code_step_by_step(case):
    head = memory_of(case)
    for step in range(case["hp"]["steps"]):
        at = f"step{step}"
        f_s, f_t = (value(case, f"{at}/{one}").requires_grad_() for one in ("f_s", "f_t"))
        rows, contrast = value(case, f"{at}/idx"), value(case, f"{at}/contrast_idx")
        before = {side: getattr(head, f"memory_{side}").clone() for side in "st"}
        head.zero_grad()
        head.begin_step()
        loss = head(f_s, f_t, rows, contrast)
        loss.backward()
        if not case["well_behaved"]:
            assert loss.isfinite()
            assert all(one.grad.isfinite().all() for one in (f_s, f_t, *head.parameters()))
            return
        near(loss, case, f"{at}/loss")
        for side, features, other in (("s", f_s, "t"), ("t", f_t, "s")):
            linear = getattr(head, f"embed_{side}")
            near(features.grad, case, f"{at}/grad_f_{side}")
            near(linear.weight.grad, case, f"{at}/grad_embed_{side}_weight")
            near(linear.bias.grad, case, f"{at}/grad_embed_{side}_bias")
            scores = crd_scores(
                unit(linear(features)), before[other], contrast, temperature=case["hp"].get("nce_t", 0.07)
            )
            half = crd(scores, head._log_z["st".index(side)], num_rows=case["hp"]["n_data"])
            near(half, case, f"{at}/loss_{side}")
            if step == 0:
                near((scores - head._log_z["st".index(side)]).exp(), case, f"{at}/score_{side}")
        head.end_step()
        for number, side in enumerate("st"):
            near(head.log_z[number].exp(), case, f"{at}/z_{side}")
            memory, others = getattr(head, f"memory_{side}"), torch.ones(len(before[side]), dtype=torch.bool)
            near(memory[rows], case, f"{at}/memory_{side}_rows")
            others[rows] = False
            assert torch.equal(memory[others], before[side][others])


@pytest.mark.parametrize("case", cases("itrd"), ids=name)
def test_itrd_equals_the_authors_code(case):
    for part in ("corr", "mi"):
        f_s, f_t = value(case, "f_s").requires_grad_(), value(case, "f_t")
        weight, bias = (value(case, f"embed_{one}").requires_grad_() for one in ("weight", "bias"))
        weights = {"correlation_weight": float(part == "corr"), "information_weight": float(part == "mi")}
        loss = itrd(f_s, f_t, F.linear(f_s, weight, bias), alpha=case["hp"]["alpha"], **weights)
        loss.backward()
        if not case["well_behaved"]:
            assert loss.isfinite()
            assert all(one.grad is None or one.grad.isfinite().all() for one in (f_s, weight, bias))
            assert itrd_dropped(F.linear(f_s, weight, bias), f_t) > 0
            continue
        # The gradient of a student that agrees is nearly nothing: rounding, on the scale of the others.
        slack = {"float64": 4e-8} if part == "corr" and case["input"] == "in/018" else {}
        near(loss, case, f"loss_{part}", **slack)
        near(f_s.grad, case, f"grad_f_s_{part}", **slack)
        if f"{case['id']}/grad_embed_weight_{part}" in GOLDEN:
            scale = np.abs(GOLDEN[f"{case['id']}/grad_embed_weight_{part}"]).max()
            near(weight.grad, case, f"grad_embed_weight_{part}", **slack)
            # Of the correlation it is 0 but for rounding.
            near(bias.grad, case, f"grad_embed_bias_{part}", scale=scale if part == "corr" else None, **slack)
        else:
            assert part == "mi"
            assert case["hp"]["s_dim"] == case["hp"]["t_dim"]


@pytest.mark.parametrize("case", cases("wttm_crd_total") + cases("wttm_itrd_total"), ids=name)
def test_sums_with_wttm_equal_the_authors_code(case):
    hp = case["hp"]
    step = "step0/" if hp["other"] == "crd" else ""
    z_s, f_s, f_t, y = (
        value(case, "z_s").requires_grad_(),
        value(case, f"{step}f_s").requires_grad_(),
        *(value(case, one) for one in (f"{step}f_t", "y")),
    )
    if hp["other"] == "crd":
        other = memory_of(case)(f_s, f_t, value(case, "step0/idx"), value(case, "step0/contrast_idx"))
    else:
        embedded = F.linear(f_s, value(case, "embed_weight"), value(case, "embed_bias"))
        weights = {"correlation_weight": hp["corr_weight"], "information_weight": hp["mi_weight"]}
        other = itrd(f_s, f_t, embedded, alpha=hp["alpha"], **weights)
    near(other, case, "loss_other")
    teacher = wttm(z_s, value(case, "z_t"), gamma=hp["gamma"])
    loss = hp["ce_weight"] * F.cross_entropy(z_s, y) + hp["beta"] * teacher + hp["mu"] * other
    loss.backward()
    near(loss, case, "loss")
    near(z_s.grad, case, "grad_zs", float64=1e-12, float32=2e-5)
    near(f_s.grad, case, "grad_f_s")


def test_every_case_of_the_golden_file_is_checked():
    assert {case["method"] for case in INDEX} == {"crd", "itrd", "wttm_crd_total", "wttm_itrd_total"}
    assert sum(case["well_behaved"] for case in INDEX) == 66


# ---- properties, in float64 ------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=10)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def vectors(seed, batch=6, width=5, other=7):
    generator = drawn(seed)
    return (torch.randn(batch, size, generator=generator, dtype=torch.float64) for size in (width, other))


def small_memory(seed, rows=12, negatives=6, **options):
    labels = torch.arange(rows) % 3
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ContrastiveMemory(5, 7, rows_of(labels, seed), width=4, negatives=negatives, temperature=0.3, **options)
    return made.double()


def gradient_of(head, f_s, f_t, rows, contrast):
    leaf = f_s.clone().requires_grad_()
    loss = head(leaf, f_t, rows, contrast)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@few
@given(SEEDS)
def test_the_order_of_batch_negatives_and_rows_changes_nothing_of_crd(seed):
    head, (f_s, f_t), rows = small_memory(seed), vectors(seed), torch.randperm(12, generator=drawn(seed))[:6]
    contrast = head.negatives(rows, 0)
    loss, gradient = gradient_of(head, f_s, f_t, rows, contrast)
    assert loss > 0
    order = torch.randperm(6, generator=drawn(seed + 1))
    again, permuted = gradient_of(head, f_s[order], f_t[order], rows[order], contrast[order])
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(permuted, gradient[order])
    columns = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order])
    torch.testing.assert_close(gradient_of(head, f_s, f_t, rows, contrast[:, columns])[0], loss)
    renamed = torch.randperm(12, generator=drawn(seed + 2))
    for memory in (head.memory_s, head.memory_t):
        memory[renamed] = memory.clone()
    torch.testing.assert_close(gradient_of(head, f_s, f_t, renamed[rows], renamed[contrast])[0], loss)


@few
@given(SEEDS)
def test_crd_remembers_unit_vectors_of_the_rows_it_was_shown_and_keeps_z(seed):
    head, (f_s, f_t), rows = small_memory(seed), vectors(seed), torch.randperm(12, generator=drawn(seed))[:6]
    with torch.no_grad():
        head.embed_s.bias.zero_()
    contrast = head.negatives(rows, 0)
    loss, gradient = gradient_of(head, f_s, f_t, rows, contrast)
    head.begin_step()
    torch.testing.assert_close(gradient_of(head, 100 * f_s, f_t, rows, contrast)[0], loss)
    head.begin_step()
    # The student's gradient knows nothing of the teacher's features in this step.
    assert torch.equal(gradient_of(head, f_s, f_t.flip(0) ** 2, rows, contrast)[1], gradient)
    before, memory = head.memory_t.clone(), head.memory_t
    head.end_step()
    left = [row for row in range(12) if row not in rows.tolist()]
    assert torch.equal(memory[left], before[left])
    torch.testing.assert_close(memory[rows].norm(dim=1), torch.ones(6, dtype=torch.float64))
    z = head.log_z.clone()
    assert gradient_of(head, f_s, f_t, rows, contrast)[0] != loss
    head.end_step()
    assert torch.equal(head.log_z, z)
    assert z.isfinite().all()


def test_crd_remembers_nothing_of_an_evaluation_or_of_a_step_that_was_left_out():
    head, (f_s, f_t), rows = small_memory(0), vectors(0), torch.arange(6)
    before = {name: one for name, one in head.state_dict().items() if isinstance(one, torch.Tensor)}
    before = {name: one.clone() for name, one in before.items()}
    with torch.no_grad():
        head(f_s, f_t, rows)
    head.end_step()
    head(f_s, f_t, rows)
    head.begin_step()
    head.end_step()
    for key, one in before.items():
        torch.testing.assert_close(head.state_dict()[key], one, rtol=0, atol=0, equal_nan=True)
    assert head.updates == 0
    # Two parts of one batch are one step, and of a row that is shown twice the last is remembered.
    head(f_s[:4], f_t[:4], rows[:4])
    z = head._log_z
    head(f_s[4:], f_t[4:], torch.tensor([0, 0]))
    assert head._log_z is z
    expected = unit(0.5 * head.memory_s[0] + 0.5 * unit(head.embed_s(f_s[5])))
    head.end_step()
    assert head.updates == 1
    torch.testing.assert_close(head.memory_s[0], expected)


def test_a_vector_without_numbers_or_length_does_not_reach_the_memory():
    head, (f_s, f_t), rows = small_memory(0), vectors(0), torch.arange(6)
    before = head.memory_s.clone()
    f_s[0] = torch.nan
    f_s[1], head.embed_s.bias.data = 0, torch.zeros(4, dtype=torch.float64)
    head(f_s, f_t, rows)
    head.end_step()
    assert torch.equal(head.memory_s[0], before[0])
    assert head.memory_s.isfinite().all()
    assert not head.log_z[0].isfinite()  # still unset: the first batch had no numbers
    head(f_s[2:], f_t[2:], rows[2:])
    head.end_step()
    assert head.log_z.isfinite().all()


def test_a_memory_of_other_rows_is_refused_and_its_own_goes_on():
    head, (f_s, f_t), rows = small_memory(0), vectors(0), torch.arange(6)
    head(f_s, f_t, rows)
    head.end_step()
    again = small_memory(1)
    again.fingerprint, again.seed = head.fingerprint, head.seed
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(f_s, f_t, rows), head(f_s, f_t, rows))
    with pytest.raises(TrainingError, match=r"its memory is of 12 training rows .* here are 13"):
        small_memory(0, rows=13).load_state_dict(head.state_dict())
    relabelled = ContrastiveMemory(5, 7, rows_of(torch.arange(12) % 4), width=4, negatives=6)
    with pytest.raises(TrainingError, match="images or labels of the training split have changed"):
        relabelled.load_state_dict(head.state_dict())


def test_scores_of_all_rows_and_of_those_wanted_are_the_same():
    generator = drawn(0)
    anchors, memory = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 50))
    contrast = torch.randint(50, (3, 6), generator=generator)
    torch.testing.assert_close(_of_all(anchors, memory, contrast), _of_wanted(anchors, memory, contrast))
    # Few of many rows, and most of few: `crd_scores` chooses, which nothing but rounding tells.
    for rows in (20, 50):
        found = crd_scores(anchors, memory[:rows], contrast % rows, temperature=2.0)
        torch.testing.assert_close(found, _of_all(anchors, memory[:rows], contrast % rows) / 2)


def test_the_loop_of_the_page_makes_a_step_with_the_memory():
    (block,) = (one for one in blocks("docs/objectives.md") if "ContrastiveMemory" in one.text)
    torch.manual_seed(0)
    body = torch.nn.Linear(8, 64)
    names = {
        "torch": torch,
        "okd": okd,
        "key_hash": np.arange(6000, dtype=np.uint64),
        "labels": torch.arange(6000) % 10,
        "student": body,
        "student_features": body(torch.randn(4, 8)),
        "teacher_features": torch.randn(4, 256),
        "numbers": torch.tensor([3, 5, 7, 9]),
    }
    exec(compile(block.text, str(block), "exec"), names)
    assert 15 < names["loss"].item() < 30
    assert body.weight.grad.abs().sum() > 0


def test_crd_begins_near_its_known_value():
    """At the published size, nearly log K + 1 + log(Z / n) a side, with Z / n near exp(1 / (2 d T**2))."""
    n, generator = 50000, drawn(0)
    anchors = unit(torch.randn(8, 128, generator=generator))
    memory = (2 * torch.rand(n, 128, generator=generator) - 1) * math.sqrt(3 / 128)
    contrast = torch.randint(n, (8, 16385), generator=generator)
    scores = crd_scores(anchors, memory, contrast, temperature=0.07)
    log_z = crd_normaliser(scores, num_rows=n)
    assert (log_z.exp() / n).item() == pytest.approx(2.21, rel=0.03)
    assert 11.2 < crd(scores, log_z, num_rows=n).item() < 12


# ---- ITRD ------------------------------------------------------------------------------------------------------------


@few
@given(SEEDS, st.sampled_from([1.01, 1.5, 3.0]))
def test_the_correlation_of_itrd_is_blind_to_scale_and_shift_and_bounded(seed, alpha):
    (e, f_t), generator = vectors(seed, other=5), drawn(seed)
    scale, shift = 0.1 + torch.rand(5, generator=generator).double(), torch.randn(5, generator=generator).double()
    loss = itrd_correlation(e, f_t, alpha=alpha)
    torch.testing.assert_close(itrd_correlation(e, scale * f_t + shift, alpha=alpha), loss)
    least = math.log2(5) - 2 * alpha * math.log2(6)
    assert loss >= least
    assert itrd_correlation(f_t, f_t, alpha=alpha).item() == pytest.approx(least)
    order = torch.randperm(6, generator=generator)
    torch.testing.assert_close(itrd_correlation(e[order], f_t[order], alpha=alpha), loss)
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    itrd_correlation(e + bias, f_t, alpha=alpha).backward()
    assert bias.grad.abs().max() < 1e-12


@few
@given(SEEDS)
def test_the_information_of_itrd_is_blind_to_turns_and_lengths_and_bounded(seed):
    f_s, f_t = vectors(seed)
    loss = itrd_information(f_s, f_t)
    assert 0 <= loss <= 1
    turn = torch.linalg.qr(torch.randn(7, 7, generator=drawn(seed), dtype=torch.float64)).Q
    lengths = 0.1 + torch.rand(6, 1, generator=drawn(seed), dtype=torch.float64)
    order = torch.randperm(6, generator=drawn(seed))
    for student, teacher in (
        (f_s, f_t @ turn),
        (lengths * f_s, f_t),
        (f_s, lengths * f_t),
        (f_s[order], f_t[order]),
    ):
        torch.testing.assert_close(itrd_information(student, teacher), loss)
    torch.testing.assert_close(itrd_information(f_t @ turn, f_t), itrd_information(f_t, f_t))
    assert itrd_information(f_s, lengths * f_t[:1]).abs() < 1e-12
    assert itrd_information(f_s[:1], f_t[:1]) == 0


def test_channels_that_do_not_vary_are_left_out_and_counted():
    torch.manual_seed(0)
    e, f_t = (torch.randn(8, 5, requires_grad=one) for one in (True, False))
    dead = f_t.clone()
    dead[:, 1], dead[:, 3] = 0.1, 0
    kept = [0, 2, 4]
    torch.testing.assert_close(
        itrd_correlation(e, dead, alpha=1.5), itrd_correlation(e[:, kept], f_t[:, kept], alpha=1.5)
    )
    assert itrd_dropped(e, dead) == 2
    for student, teacher in ((e, torch.full((8, 5), 0.1)), (e[:1], f_t[:1]), (e * 0, f_t)):
        loss = itrd_correlation(student, teacher, alpha=1.5)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, e)[0], torch.zeros(8, 5))
    assert itrd_information(torch.zeros(4, 5), f_t[:4]) == 0


# ---- embeddings and relations ----------------------------------------------------------------------------------------


@few
@given(SEEDS)
def test_embeddings_are_compared_as_torch_compares_them(seed):
    s, t = vectors(seed, other=5)
    torch.testing.assert_close(embedding(s, t, distance="cosine"), 1 - F.cosine_similarity(s, t).mean())
    torch.testing.assert_close(embedding(s, t, distance="l2"), ((s - t) ** 2).mean())
    torch.testing.assert_close(embedding(s, t, distance="smooth_l1"), F.huber_loss(s, t))
    assert embedding(3 * t, t, distance="cosine").abs() < 1e-12
    assert all(embedding(t, t, distance=one).abs() < 1e-12 for one in ("l2", "smooth_l1", "cosine"))


def by_loops(s, t):
    """RKD's two losses as the paper writes them, with means for the sums."""

    def huber(x, y):
        return (x - y) ** 2 / 2 if abs(x - y) < 1 else abs(x - y) - 0.5

    def distances(x):
        found = [[float((a - b).norm()) for b in x] for a in x]
        positive = [one for row in found for one in row if one > 0]
        return [[one / (sum(positive) / len(positive)) for one in row] for row in found]

    def cosine(x, i, j, k):
        one, other = x[j] - x[i], x[k] - x[i]
        lengths = float(one.norm() * other.norm())
        return float(one @ other) / lengths if lengths else 0.0

    numbers, d_s, d_t = range(len(s)), distances(s), distances(t)
    pairs = [huber(d_s[i][j], d_t[i][j]) for i in numbers for j in numbers]
    triples = [huber(cosine(s, i, j, k), cosine(t, i, j, k)) for i in numbers for j in numbers for k in numbers]
    return sum(pairs) / len(pairs), sum(triples) / len(triples)


@few
@given(SEEDS)
def test_relations_are_those_of_the_paper_and_blind_to_motion_and_size(seed):
    s, t = vectors(seed, batch=4)
    s, t = 3 * s, t.clone()
    t[1] = t[0]  # two images that the teacher cannot tell apart
    s.requires_grad_()
    distance, angle = rkd_distance(s, t), rkd_angle(s, t)
    assert (distance.item(), angle.item()) == pytest.approx(by_loops(s.detach(), t))
    (distance + angle).backward()
    assert s.grad.isfinite().all()
    turn = torch.linalg.qr(torch.randn(5, 5, generator=drawn(seed), dtype=torch.float64)).Q
    moved = 7 * s.detach() @ turn + 2
    torch.testing.assert_close(rkd_distance(moved, t), distance.detach())
    torch.testing.assert_close(rkd_angle(moved, t), angle.detach())
    assert rkd_distance(7 * t + 1, t).abs() < 1e-12
    assert rkd_angle(7 * t + 1, t).abs() < 1e-12


def test_one_image_or_equal_images_have_no_relations():
    for s in (torch.ones(1, 3), torch.ones(4, 3)):
        s.requires_grad_()
        loss = rkd_distance(s, s.detach() * 2) + rkd_angle(s, s.detach() * 2)
        loss.backward()
        assert loss == 0
        assert torch.equal(s.grad, torch.zeros_like(s))
