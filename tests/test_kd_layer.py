"""The KD layer is the authors' layer, and goes into any student without touching its code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from offline_kd.models.kd_layer import KDLayer, insert_kd_layer, penultimate
from offline_kd.models.networks import build, parameter_count
from offline_kd.models.taps import TapPoint, feature_maps, fold_tokens, tapped
from offline_kd.objectives import decisions, subclass_decisions
from offline_kd.store.decisions import decide, project, subclass_ids
from offline_kd.support.errors import ModelError

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "losses.npz", allow_pickle=False)
INDEX = json.loads(str(GOLDEN["index"]))
PENULTIMATE = [case for case in INDEX if case["method"] == "kdlayer_penult"]
INTERMEDIATE = [case for case in INDEX if case["method"] == "kdlayer_inter"]


class Case:
    """Arrays of one golden case as Tensors, by name."""

    def __init__(self, case):
        self.id = case["id"]

    def __getitem__(self, name):
        return torch.tensor(GOLDEN[f"{self.id}/{name}"])


def layer_of(case, golden):
    hp = case["hp"]
    weight = golden["param/bow_weight"].flatten(1)
    layer = KDLayer(weight.shape[1], weight.shape[0], value_ratio=hp["value_ratio"]).to(weight.dtype)
    with torch.no_grad():
        layer.templates.weight.copy_(weight)
        layer.templates.scale.copy_(golden["param/bow_scale"])
        layer.values.weight.copy_(golden["param/value_weight"].flatten(1))
        layer.values.scale.copy_(golden["param/value_scale"])
        layer.norm.weight.copy_(golden["param/bn_weight"])
        layer.norm.bias.copy_(golden["param/bn_bias"])
    return layer


def near(found, expected, dtype, *, gradient=False):
    tolerance = 1e-11 if dtype == "float64" else 2e-5 if gradient else 1e-5
    scale = expected.abs().max().clamp(min=1e-12)
    assert ((found - expected).abs().max() / scale).item() <= tolerance


def check_gradients(layer, features, golden, dtype):
    for name, tensor in (
        ("bow_weight", layer.templates.weight),
        ("bow_scale", layer.templates.scale),
        ("bn_weight", layer.norm.weight),
        ("bn_bias", layer.norm.bias),
        ("value_weight", layer.values.weight),
        ("value_scale", layer.values.scale),
        ("f_student", features),
    ):
        expected = golden[f"grad/{name}"]
        near(tensor.grad, expected.view_as(tensor), dtype, gradient=True)


@pytest.mark.parametrize("case", PENULTIMATE, ids=lambda case: case["id"][-4:])
def test_the_penultimate_layer_equals_the_authors(case):
    golden, dtype, hp = Case(case), case["dtype"], case["hp"]
    layer = layer_of(case, golden)
    layer.norm.running_mean.copy_(golden["param/bn_running_mean"])
    layer.norm.running_var.copy_(golden["param/bn_running_var"])
    layer.eval()
    near(layer(golden["in/f_student"])[0].detach(), golden["out/eval_features"], dtype)
    layer.train()
    features = golden["in/f_student"].requires_grad_()
    out, scores = layer(features)
    near(scores.detach(), golden["out/scores"], dtype)
    near(out.detach(), golden["out/features"], dtype)
    # The decisions, from the teacher's map and its templates.
    hard = hp["assignment"] == "hard"
    chosen = decide(golden["in/f_teacher"], golden["param/centroids"], top=1 if hard else hp["K"], temperature=1.0)
    assert torch.equal(chosen.ids[..., 0].long(), golden["out/cluster_ids"])
    probs = torch.ones_like(chosen.probs) if hard else chosen.probs
    dense = torch.zeros_like(golden["out/soft_targets"]).scatter(-1, chosen.ids.long(), probs.to(features.dtype))
    # float32 distances differ in the last bits between the authors' formula and ours, and are exponentiated
    torch.testing.assert_close(dense, golden["out/soft_targets"], rtol=0, atol=1e-11 if dtype == "float64" else 1e-5)
    loss_quest = decisions(scores, chosen.ids, probs)
    near(loss_quest.detach(), golden["out/loss_quest"], dtype)
    logits = F.linear(out.mean(dim=(2, 3)), golden["param/fc_weight"], golden["param/fc_bias"])
    loss = F.cross_entropy(logits, golden["in/y"]) + loss_quest
    near(loss.detach(), golden["out/loss_total"], dtype)
    loss.backward()
    check_gradients(layer, features, golden, dtype)
    near(layer.norm.running_mean, golden["out/bn_running_mean_after"], dtype)
    near(layer.norm.running_var, golden["out/bn_running_var_after"], dtype)


@pytest.mark.parametrize("case", INTERMEDIATE, ids=lambda case: case["id"][-4:])
def test_the_intermediate_layer_equals_the_authors(case):
    golden, hp = Case(case), case["hp"]
    layer = layer_of(case, golden).train()
    features = golden["in/f_student"].requires_grad_()
    out, scores = layer(features)
    teacher = golden["in/f_teacher"]
    if hp["downscale"]:
        teacher = F.adaptive_avg_pool2d(teacher, features.shape[2:])
    projected = project(teacher, golden["table/lda_scalings"], golden["table/lda_xbar"], hp["lda_components"])
    near(projected.permute(0, 2, 3, 1).flatten(0, 2).float(), golden["out/lda_features"], "float32")
    own = subclass_ids(
        projected, golden["in/y"], golden["table/centers"].view(hp["num_classes"], -1, hp["lda_components"])
    )
    ids = golden["in/y"][:, None, None] * hp["subclasses_per_class"] + own
    assert torch.equal(ids, golden["out/subclass_ids"])
    loss_sub = subclass_decisions(scores, ids, golden["table/scores"])
    near(loss_sub.detach(), golden["out/loss_sub"], "float32")
    (loss_sub + (out * golden["in/upstream_grad"]).sum()).backward()
    check_gradients(layer, features, golden, "float32")


SEEDS = st.integers(0, 2**31 - 1)


def made(seed, channels=6, templates=9, **options):
    torch.manual_seed(seed)
    layer = KDLayer(channels, templates, **options).double()
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.norm.bias)
    return layer, torch.randn(3, channels, 4, 5, dtype=torch.float64)


@given(SEEDS, st.floats(0.01, 100))
def test_scores_are_bounded_by_the_scale_and_blind_to_the_length_of_features(seed, factor):
    layer, x = made(seed)
    features, scores = layer(x)
    assert (scores.abs() <= layer.templates.scale.abs() + 1e-9).all()
    again, same = layer(factor * x)
    torch.testing.assert_close(same, scores)
    torch.testing.assert_close(again - factor * x, features - x)


@given(SEEDS)
def test_without_value_the_map_passes_unchanged(seed):
    layer, x = made(seed, value_ratio=0.0)
    assert torch.equal(layer(x)[0], x)


@given(SEEDS)
def test_the_order_of_templates_does_not_matter(seed):
    layer, x = made(seed)
    features, scores = layer(x)
    order = torch.randperm(9)
    with torch.no_grad():
        for tensor in (layer.templates.weight, layer.norm.weight, layer.norm.bias):
            tensor.copy_(tensor[order].clone())
        layer.values.weight.copy_(layer.values.weight[:, order].clone())
    other, permuted = layer(x)
    torch.testing.assert_close(other, features)
    torch.testing.assert_close(permuted, scores[:, order])


@given(SEEDS)
def test_the_decision_loss_is_a_divergence(seed):
    torch.manual_seed(seed)
    probs = torch.rand(2, 3, 3, 7, dtype=torch.float64).softmax(-1)
    ids = torch.rand(2, 3, 3, 7).argsort(-1)
    scores = torch.zeros(2, 3, 3, 7, dtype=torch.float64).scatter(-1, ids, probs.log()).permute(0, 3, 1, 2)
    assert decisions(scores + 3, ids, probs).item() == pytest.approx(0, abs=1e-12)
    assert decisions(torch.randn_like(scores), ids, probs) > 0
    table = torch.rand(5, 5, dtype=torch.float64).softmax(-1)
    sub = torch.randint(5, (2, 3, 3))
    assert subclass_decisions(table[sub].log().permute(0, 3, 1, 2), sub, table).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "last", "channels", "side"),
    [
        ("cifar:resnet20", "layer3", 64, 8),
        ("cifar:wrn_16_2", "relu", 128, 8),
        ("cifar:vgg8", "relu4", 512, 4),
        ("cifar:mobilenetv2", "conv2", 1280, 2),
        ("cifar:shufflenetv1", "layer3", 960, 4),
        ("cifar:shufflenetv2", "relu", 1024, 4),
        ("cifar:resnet50", "layer4", 2048, 4),
        ("torchvision:mobilenet_v3_small", "features", 576, 2),
    ],
)
def test_the_penultimate_map_is_found_and_a_layer_put_behind_it(name, last, channels, side):
    size = 32 if name.startswith("cifar") else 64
    example = torch.randn(2, 3, size, size)
    student = build(name, 100)
    before, plain = parameter_count(student), student.eval()(example)
    assert penultimate(student, example) == last
    layer, grid = insert_kd_layer(student, "penultimate", 50, value_ratio=0.0, example=example)
    assert grid == (side, side)
    assert parameter_count(student) == before + 2 * 50 * channels + 2 * 50 + 2
    torch.testing.assert_close(student(example), plain)
    assert layer.scores is None
    student.train()(example)
    assert layer.scores.shape == (2, 50, side, side)


def test_a_student_with_kd_layers_is_saved_loaded_and_exported(tmp_path):
    example = torch.randn(2, 3, 32, 32)

    def student():
        torch.manual_seed(0)
        model = build("cifar:resnet8", 10)
        insert_kd_layer(model, "layer3.0", 40, value_ratio=1.0, example=example)
        insert_kd_layer(model, "penultimate", 30, value_ratio=1.0, example=example)
        return model

    one = student()
    one.train()(example)
    torch.save(one.state_dict(), tmp_path / "student.pt")
    other = student()
    other.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    expected = one.eval()(example)
    assert torch.equal(other.eval()(example), expected)
    exported = torch.export.export(one, (example,))
    torch.testing.assert_close(exported.module()(example), expected)


def test_a_layer_behind_no_map_is_refused_with_the_nearest_name():
    student, example = build("cifar:resnet8", 10), torch.randn(1, 3, 32, 32)
    with pytest.raises(ModelError, match="Did you mean 'layer3'"):
        insert_kd_layer(student, "layer33", 10, value_ratio=1.0, example=example)
    with pytest.raises(ModelError, match="no module 'fc'"):
        insert_kd_layer(student, "fc", 10, value_ratio=1.0, example=example)


# ---- taps ------------------------------------------------------------------------------------------------------------


def test_taps_read_maps_before_and_after_activation_and_pool_them():
    model, x = build("cifar:wrn_16_1", 10).eval(), torch.randn(2, 3, 32, 32)
    points = [
        TapPoint(module="relu"),
        TapPoint(module="relu", at="input"),
        TapPoint(module="block3.layer.0", grid=(4, 4)),
    ]
    with tapped(model, points) as maps:
        model(x)
        after, before, pooled = maps
    assert torch.equal(after, before.relu())
    assert before.min() < 0
    assert pooled.shape == (2, 64, 4, 4)
    assert not model.get_submodule("relu")._forward_hooks


def test_tokens_of_a_vision_transformer_are_folded_without_the_class_token():
    model = build("timm:vit_tiny_patch16_224", 10, {"img_size": 64, "depth": 2}).eval()
    maps = feature_maps(model, torch.randn(1, 3, 64, 64))
    assert maps["blocks.1"] == (1, 192, 4, 4)
    tokens = torch.arange(17.0).view(1, 17, 1)
    assert fold_tokens(tokens, "t").flatten().tolist() == list(range(1, 17))
    with pytest.raises(ModelError, match="no square grid"):
        fold_tokens(torch.zeros(1, 45, 3), "t")


def test_unknown_taps_and_taps_without_a_map_are_refused():
    model, x = build("cifar:resnet8", 10), torch.randn(1, 3, 32, 32)
    with pytest.raises(ModelError, match=r"Did you mean 'layer3\.0'"), tapped(model, [TapPoint(module="layer3.O")]):
        pass
    with pytest.raises(ModelError, match="neither a map"), tapped(model, [TapPoint(module="fc")]):
        model(x)
