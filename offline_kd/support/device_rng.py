"""The random numbers of `counter_rng`, made where tensors are: the same bits, as int64."""

import torch
from torch import Tensor

# What `counter_rng` multiplies by and adds, as signed numbers: their products and sums have the same lowest 64 bits.
FIRST, SECOND, GOLDEN = (number - 2**64 for number in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


def device_hash(*counters: int | Tensor, device: torch.device) -> Tensor:
    """`counter_hash` of counters, elementwise with broadcasting; int64 with the bits of its unsigned numbers."""
    state = torch.zeros(1, dtype=torch.int64, device=device)
    for counter in counters:
        value = counter if isinstance(counter, Tensor) else (counter + 2**63) % 2**64 - 2**63
        state = _mix((state ^ value) + GOLDEN)
    return state


def _mix(z: Tensor) -> Tensor:
    z = _shifted(z, 30).bitwise_xor_(z).mul_(FIRST)
    z = _shifted(z, 27).bitwise_xor_(z).mul_(SECOND)
    return _shifted(z, 31).bitwise_xor_(z)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, with zeros before the highest bit: tensors shift in copies of the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
