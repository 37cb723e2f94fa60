"""An exponential moving average of a student's weights (Polyak and Juditsky 1992), kept beside them on their device."""

import copy
from collections.abc import Callable

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from offline_kd.training_recipe import EMA

# Decay -> a function that averages a list of tensors with another one, in place.
make_averaging: Callable[[float], Callable[[list[Tensor], list[Tensor], int], None]] = get_ema_multi_avg_fn


class WeightAverage:
    """The average of a network's parameters and of its buffers, such as BatchNorm's running statistics.

        average <- decay average + (1 - decay) weights

    after every step of the optimizer; the first one copies, and so does every one of integer buffers. Nothing of it
    waits for the device: the number of updates, from which the decay follows, is counted here.

    The parameters and buffers of `network` must stay the tensors that they are.
    """

    def __init__(self, network: nn.Module, settings: EMA) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.settings = settings
        self.updates = 0
        self._pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))

    def update(self) -> None:
        """Take the present weights of the network in."""
        floats = [pair for pair in self._pairs if pair[0].is_floating_point()]
        averaged = make_averaging(decay_of(self.settings, self.updates))
        averaged([mine for mine, _ in floats], [now.detach() for _, now in floats], self.updates)
        for mine, now in self._pairs:
            if not mine.is_floating_point():
                mine.copy_(now)
        self.updates += 1

    def state_dict(self) -> dict[str, object]:
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        network, updates = state_dict["network"], state_dict["updates"]
        assert isinstance(network, dict)
        assert isinstance(updates, int)
        self.network.load_state_dict(network)
        self.updates = updates


def decay_of(settings: EMA, updates: int) -> float:
    """The decay of the update after so many: 0 of the first one; with warm-up at most (1 + n) / (10 + n).

    The warm-up is that of TensorFlow's `ExponentialMovingAverage(num_updates=n)`.
    """
    if updates == 0:
        return 0.0
    return min(settings.decay, (1 + updates) / (10 + updates)) if settings.warmup else settings.decay


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
