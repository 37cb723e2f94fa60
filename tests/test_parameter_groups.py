"""Parameters in groups: layers with rates of their own, tensors without decay."""

import pytest
import torch
from test_training_options import ADAMW, recipe_with
from torch import nn

from offline_kd.distill.optimisation import make_optimizer, set_learning_rate
from offline_kd.models.kd_layer import insert_kd_layer
from offline_kd.models.networks import build
from offline_kd.support.errors import RecipeError


def settings(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter, by name."""
    names = {id(one): name for name, one in network.named_parameters()}
    return {
        names[id(one)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for one in group["params"]
    }


def grouped(network: nn.Module, **optimizer: object) -> torch.optim.Optimizer:
    return make_optimizer(recipe_with(optimizer=ADAMW | optimizer).training, network)


def test_layers_have_the_rates_that_timm_gives_them():
    import timm
    from timm.optim import param_groups_layer_decay

    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=12, num_classes=10
    )
    ours = grouped(network, layer_decay=0.5, no_decay=["bias", "norm", "*pos_embed", "cls_token"])
    set_learning_rate(ours, 0.02)
    theirs = torch.optim.AdamW(
        [
            {"params": group["params"], "weight_decay": group["weight_decay"], "lr": 0.02 * group["lr_scale"]}
            for group in param_groups_layer_decay(network, 0.3, network.no_weight_decay(), layer_decay=0.5)
        ]
    )
    assert settings(network, ours) == settings(network, theirs)
    assert len({rate for rate, _ in settings(network, ours).values()}) == 5
    assert ours.param_groups[0]["lr"] == 0.02  # what metrics.jsonl says


def test_kd_layers_change_no_layer_of_the_student_and_have_the_whole_rate():
    import timm

    network = timm.create_model("resnet10t", num_classes=10)
    plain = settings(network, grouped(network, layer_decay=0.5))
    for after in ("layer2.0", "layer2"):
        insert_kd_layer(network, after, 7, value_ratio=1.0, example=torch.zeros(1, 3, 32, 32))
    ours = settings(network, grouped(network, layer_decay=0.5, no_decay=["norm"]))
    found = {name.replace(".module", ""): rate for name, (rate, _) in ours.items() if ".kd_layer." not in name}
    assert found == {name: rate for name, (rate, _) in plain.items()}
    assert ours["layer2.kd_layer.templates.weight"] == (0.01, 0.3)
    assert ours["layer2.kd_layer.norm.weight"] == (0.01, 0.0)


def test_groups_that_cannot_be_made_are_one_line():
    network = build("networks:small", 10)
    with pytest.raises(RecipeError, match=r"no_decay: 'head.wieght' is neither .* Did you mean 'head.weight'\?"):
        grouped(network, no_decay=["head.wieght"])
    with pytest.raises(RecipeError, match="layer_decay: a Small does not tell which layers are how deep"):
        grouped(network, layer_decay=0.5)
