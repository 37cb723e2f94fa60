"""Taps: reading the feature maps of named modules while a network runs.

A tap is a module's name, and whether its input or its output is read: the input of an activation module is the map
before activation. The name "" is PyTorch's for the network itself. Maps `[B, D, H, W]` are taken as they are; token
sequences `[B, T, D]` (vision transformers) are folded into their square grid, without the class and register tokens
that come before.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from offline_kd.support.errors import ModelError, did_you_mean
from offline_kd.support.strict import Strict

MAX_PREFIX_TOKENS = 8


class TapPoint(Strict):
    """Where a map is read, and the grid `[height, width]` it is averaged to (a student's, if that is coarser)."""

    module: str = Field(description="of the teacher; `offline-kd taps MODEL` lists them")
    at: Literal["input", "output"] = Field("output", description="which map of the module: what comes in, or goes out")
    grid: tuple[int, int] | None = Field(None, description="height and width that the map is averaged to")

    @property
    def named(self) -> str:
        """For messages."""
        return f"tap '{self.module}'" if self.module else "the network itself"

    @property
    def takes_vectors(self) -> bool:
        """Whether vectors `[B, D]`, which have no places, are read as maps of one place."""
        return False


@contextmanager
def tapped(model: nn.Module, points: Sequence[TapPoint]) -> Iterator[list[Tensor | None]]:
    """While open, every forward pass of `model` puts its maps into the yielded list, in the order of `points`.

    Raises ModelError when a module does not exist, and later when its output cannot be read as a map.
    """
    maps, handles = put_taps(model, points)
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def put_taps(model: nn.Module, points: Sequence[TapPoint]) -> tuple[list[Tensor | None], list[RemovableHandle]]:
    """The same until the handles are removed."""
    modules = [_module(model, point) for point in points]
    maps: list[Tensor | None] = [None] * len(points)
    handles = []

    def keep(index: int, tensor: object) -> None:
        if isinstance(tensor, Tensor):
            tensor = tensor.detach().clone()  # the next module may overwrite it in place
        maps[index] = as_map(tensor, points[index])

    for index, (module, point) in enumerate(zip(modules, points, strict=True)):
        if point.at == "output":
            handles.append(module.register_forward_hook(lambda _, __, output, index=index: keep(index, output)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, inputs, index=index: keep(index, inputs[0])))
    return maps, handles


def put_vector_taps(model: nn.Module, points: Mapping[str | None, TapPoint]) -> dict[str | None, Tensor]:
    """Make every forward pass of `model` that keeps gradients put its vectors into the dict that is returned.

    They are `[B, D]` float32 with gradient, by the keys of `points`: maps and tokens are averaged over their places.
    Passes without gradients, as of an evaluation, leave the dict as it is. The taps stay as long as the modules do.

    Raises ModelError when a module does not exist, and later when what it gives is no vector, map or tokens.
    """
    vectors: dict[str | None, Tensor] = {}

    def keep(key: str | None, tensor: object) -> None:
        if torch.is_grad_enabled():
            vectors[key] = as_vector(tensor, points[key])

    for key, point in points.items():
        module = _module(model, point)
        if point.at == "output":
            module.register_forward_hook(lambda _, __, output, key=key: keep(key, output))
        else:
            module.register_forward_pre_hook(lambda _, inputs, key=key: keep(key, inputs[0]))
    return vectors


def as_vector(tensor: object, point: TapPoint) -> Tensor:
    """`[B, D]` float32 of what a module gave, averaged over places; raises ModelError where it cannot be."""
    if isinstance(tensor, Tensor) and tensor.ndim == 2:
        return tensor.float().clone()  # the next module may overwrite it in place
    return as_map(tensor, point).mean(dim=(2, 3))


def _module(model: nn.Module, point: TapPoint) -> nn.Module:
    try:
        return model.get_submodule(point.module)
    except AttributeError:
        known = dict(model.named_modules())
        raise ModelError(f"the network has no module '{point.module}'.{did_you_mean(point.module, known)}") from None


def as_map(tensor: object, point: TapPoint) -> Tensor:
    """`[B, D, H, W]` float32 of what a module gave; raises ModelError when it is no map."""
    if point.takes_vectors and isinstance(tensor, Tensor) and tensor.ndim == 2:
        return tensor[:, :, None, None].float()
    if not isinstance(tensor, Tensor) or tensor.ndim not in (3, 4):
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ModelError(f"{point.named}: gives {shape}, neither a map [B, D, H, W] nor tokens [B, T, D].")
    features = (tensor if tensor.ndim == 4 else fold_tokens(tensor, point.named)).float()
    return features if point.grid is None else F.adaptive_avg_pool2d(features, point.grid)


def fold_tokens(tokens: Tensor, name: str) -> Tensor:
    """`[B, T, D]` -> `[B, D, side, side]`: the last side**2 tokens; class and register tokens stand first."""
    side = math.isqrt(tokens.shape[1])
    if tokens.shape[1] - side * side > MAX_PREFIX_TOKENS or side == 0:
        raise ModelError(f"{name}: {tokens.shape[1]} tokens are no square grid with a few tokens before it.")
    return tokens[:, -side * side :].transpose(1, 2).reshape(len(tokens), -1, side, side)


@torch.no_grad()
def feature_maps(model: nn.Module, example: Tensor) -> dict[str, tuple[int, int, int, int]]:
    """Shapes `[B, D, H, W]` of the maps (tokens folded) that modules give for `example`, in the order they finish.

    A module that runs more than once (a shared activation) stands where it finished last, with that shape.
    """
    shapes: dict[str, tuple[int, int, int, int]] = {}
    handles = []

    def note(name: str, output: object) -> None:
        shapes.pop(name, None)
        try:
            batch, channels, height, width = as_map(output, TapPoint(module=name)).shape
        except ModelError:
            return
        shapes[name] = (batch, channels, height, width)

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: note(name, output)))
    training = model.training
    try:
        model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return shapes
