"""Numbers that every step needs on the device, brought there once: bringing them would let the host wait."""

from functools import cache

import torch
from torch import Tensor


def constant(values: tuple[float, ...], beside: Tensor) -> Tensor:
    """`[n]` float32, not to be changed: these values, on the device of `beside`, with which they will be computed.

    They are kept, but not where `beside` is of another class than Tensor, as under FakeTensorMode: such tensors are
    of no use outside of their mode.
    """
    make = _made if type(beside) is Tensor else _made.__wrapped__
    return make(values, beside.device)


@cache
def _made(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be part of training later
        return torch.tensor(values, dtype=torch.float32, device=device)
