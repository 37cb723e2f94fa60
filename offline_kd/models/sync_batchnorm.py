"""BatchNorm over the rows of all ranks, so that a student does not depend on how many ranks train it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offline_kd.support.ranks import total


class CPUSyncBatchNorm(_BatchNorm):
    """What `nn.SyncBatchNorm` is on GPUs, which refuses the CPU. Ranks may have different numbers of rows, or none."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Whatever the number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """`[B, D, ...]` -> the same shape, normalised over all ranks' rows and places, in float32 or better."""
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        channels = (1, -1, *[1] * (x.dim() - 2))
        others = [dim for dim in range(x.dim()) if dim != 1]
        count = total(torch.tensor(x.numel() / x.shape[1], dtype=x.dtype))
        mean = total(x.sum(others)) / count
        centred = x - mean.view(channels)
        variance = total(centred.square().sum(others)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), share)
            self.running_var.lerp_((variance * count / (count - 1)).detach(), share)
        y = centred * (variance + self.eps).rsqrt().view(channels)
        if self.affine:
            y = y * self.weight.view(channels) + self.bias.view(channels)
        return y.to(input.dtype)


def synchronise_batchnorm(network: nn.Module, device: torch.device) -> None:
    """Make every BatchNorm inside `network` a synchronised one, with its own parameters and statistics."""
    if device.type == "cuda":
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        convert(network)
        return
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = CPUSyncBatchNorm
