"""The teacher's last layer, by which a store of features serves objectives on logits; taken once it is proven.

Proven on real views: of the features that come into it, the layer must make the logits that the network gives.
"""

import torch
from torch import Tensor, nn

from offline_kd.cache.sample import sampled
from offline_kd.data.blocks import BlockLoader
from offline_kd.models.teacher import Teacher
from offline_kd.store.codecs.codec import ARITHMETIC
from offline_kd.store.features import FeatureTap, pooled
from offline_kd.store.reader import Arrays
from offline_kd.store.schema import StoreIdentity
from offline_kd.support.errors import RecipeError, TeacherError

VIEWS, MAX_TARS = 256, 64  # on which it is proven


def last_layer(
    teacher: Teacher, identity: StoreIdentity, loader: BlockLoader, device: torch.device
) -> tuple[Arrays, dict[str, float]]:
    """The tables of the codec, by full name, and on how many views they are proven.

    Raises:
        RecipeError: the codec's features are not what comes into a linear layer that gives the teacher's classes.
        TeacherError: the network's logits are others than this layer's.
    """
    codec = identity.codec
    config = identity.features[codec.of_features].config
    weight, bias = _layer(teacher, config, f"capture.features.{codec.of_features}", identity.num_classes)
    arrays = {"weight": weight.numpy(), "bias": bias.numpy()}
    tables = {name: table.to(device) for name, table in codec.decoding_tables(arrays).items()}

    def ask(pixels: Tensor) -> Tensor:
        """`[B, 2, C]`: the network's logits, and the layer's."""
        logits, (maps,) = teacher.logits_and_maps(pixels, [config])
        of_layer = codec.decode({"features": pooled(config, maps)}, identity.num_classes, tables)
        return torch.stack([logits, of_layer], dim=1)

    num_rows = min(VIEWS, loader.split.count)
    found = sampled(teacher, ask, identity.views.with_count(1), loader, num_rows, device, MAX_TARS)
    said = torch.cat(list(found)).flatten(0, 1)
    network, layer = said[:, 0], said[:, 1]
    difference = (network - layer).abs().max().item()
    allowed = ARITHMETIC[identity.teacher.precision] * max(1.0, network.abs().max().item())
    if not difference <= allowed:
        raise TeacherError(
            f"teacher '{teacher.name}': its logits are not what layer '{config.module}' makes of what comes into it. "
            f"In {len(said)} views they lie between {_range(network)}, the layer's between {_range(layer)}, and they "
            f"differ by up to {difference:.4g}; arithmetic explains {allowed:.4g}. Something follows the layer, as a "
            "softmax does, or it computes in a way of its own: take another codec."
        )
    return {f"codec/{name}": table for name, table in arrays.items()}, {"rows": len(said)}


def _range(values: Tensor) -> str:
    return f"{values.min().item():.4g} and {values.max().item():.4g}"


def _layer(teacher: Teacher, config: FeatureTap, where: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """`[C, D]` weights and `[C]` bias float32, on the CPU, of the linear layer whose input is tapped: the rows of the
    dataset's classes.
    """
    classes = teacher.classes or [[index] for index in range(num_classes)]
    several = next((one for one in classes if len(one) > 1), None)
    if several:
        raise RecipeError(
            f"teacher.classes: classes {several} of the teacher are one of the dataset, whose logit no linear layer "
            "gives. Take another codec than last_layer, or one of the teacher's classes for each."
        )
    rows = [row for (row,) in classes]
    last = {
        name: module
        for name, module in teacher.network.named_modules()
        if isinstance(module, nn.Linear)
        and (module.out_features > max(rows) if teacher.classes else module.out_features == num_classes)
    }
    if config.at != "input" or config.module not in last:
        kind = type(teacher.network.get_submodule(config.module)).__name__
        say_so = ", ".join(f"{{module: {name}, at: input}}" for name in last) or "none, so take another codec"
        raise RecipeError(
            f"{where}: is the {config.at} of '{config.module}', a {kind}; codec last_layer needs what comes into the "
            f"linear layer that gives the logits of the {num_classes} classes. Found: {say_so}."
        )
    layer = last[config.module]
    weight = layer.weight.detach().float().cpu()
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().cpu()
    return weight[rows].contiguous(), bias[rows].contiguous()
