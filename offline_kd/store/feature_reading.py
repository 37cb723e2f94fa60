"""The features that a store holds, by name: what they are, and from which arrays they are decoded."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offline_kd.store.features import FeaturesIdentity, arrays_of, unpack_features
from offline_kd.store.reader import Store
from offline_kd.support.errors import StoreMismatch, did_you_mean


def held_features(store: Store, name: str) -> FeaturesIdentity:
    """What features are; raises StoreMismatch when the store has none of that name."""
    if name not in store.identity.features:
        raise StoreMismatch(
            f"{store.place}: holds no features '{name}', which are asked for."
            f"{did_you_mean(name, store.identity.features)} Capture them with capture.features in the recipe."
        )
    return store.identity.features[name]


def feature_arrays(store: Store, name: str) -> list[str]:
    """The arrays of features, by the last part of their names; raises what `held_features` does."""
    return list(arrays_of(held_features(store, name)))


def features_decoder(store: Store, name: str, device: torch.device) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function from the arrays `[n, ...]` of features, on `device`, to `[n, D]` or `[n, D, H, W]` float32."""
    about = held_features(store, name)
    read = store.read_tables(name) if about.has_tables else {}
    tables = {part: torch.from_numpy(table).to(device) for part, table in read.items()}
    return lambda arrays: unpack_features(about.config, arrays, tables)
