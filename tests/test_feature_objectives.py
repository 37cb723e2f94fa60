"""Objectives on features against the authors' own numbers, and what must be true of them whatever the numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

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
from offline_kd.objectives.negatives import Negatives
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.device_rng import device_hash
from offline_kd.support.errors import DataError, TrainingError

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "features.npz", allow_pickle=False)
INDEX = json.loads(str(GOLDEN["index"]))
CPU = torch.device("cpu")


def cases(method):
    return [case for case in INDEX if case["method"] == method]


def name(case):
    return f"{case['id'][-4:]}-{case['dtype']}"


def value(case, key):
    """An input in the case's dtype, or a result."""
    found = torch.tensor(GOLDEN[f"{case['input']}/{key}" if f"{case['input']}/{key}" in GOLDEN else f"{case['id']}/{key}"])
    return found.to(getattr(torch, case["dtype"])) if found.is_floating_point() else found


def near(found, case, key, *, scale=None, float64=3e-14, float32=1.2e-5):
    expected = torch.tensor(GOLDEN[f"{case['id']}/{key}"])
    scale = expected.abs().max() if scale is None else scale
    tolerance = float64 if case["dtype"] == "float64" else float32
    assert (found.detach() - expected.view_as(found)).abs().max() <= tolerance * scale, key


def memory_of(case, **options):
    hp = case["hp"]
    rows = DatasetRows(torch.tensor(GOLDEN[f"{case['input']}/labels"]), "made", 0)
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
    z_s, f_s, f_t, y = value(case, "z_s").requires_grad_(), value(case, "f_s").requires_grad_(), *(
        value(case, one) for one in ("f_t", "y")
    )
    if hp["other"] == "crd":
        other = memory_of(case)(f_s, f_t, value(case, "idx"), value(case, "contrast_idx"))
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
