"""Logits, out of what a store keeps: arrays of its codec, or features from which the codec computes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from offline_kd.store.codecs import Codec
from offline_kd.store.codecs.codec import tensors_of
from offline_kd.store.feature_reading import feature_arrays, features_decoder
from offline_kd.store.features import keeps_numbers
from offline_kd.store.reader import Arrays, Store
from offline_kd.store.rows import StoredSignal


def logit_arrays(store: Store) -> dict[str, str]:
    """The arrays that logits are decoded from: full names by the last part.

    Raises StoreMismatch where the store lacks features that its codec is of.
    """
    codec = store.identity.codec
    if of := codec.of_features:
        return {part: f"features/{of}/{part}" for part in feature_arrays(store, of)}
    return {name: f"logits/{name}" for name in codec.arrays()}


def logits_decoder(store: Store, device: torch.device) -> Callable[[StoredSignal], Tensor]:
    """A function from the signal of a store, on `device`, to logits `[n, C]` float32."""
    codec, num_classes = store.identity.codec, store.identity.num_classes
    tables = {part: table.to(device) for part, table in codec.decoding_tables(store.codec_tables).items()}
    of = codec.of_features
    features = features_decoder(store, of, device) if of else None

    def logits(signal: StoredSignal) -> Tensor:
        assert signal.logits is not None, "the logits were not read"
        arrays = signal.logits if features is None else {"features": features(signal.features[of])}
        return codec.decode(arrays, num_classes, tables)

    return logits


def stored_decoder(store: Store, codec: Codec | None = None) -> Callable[[Arrays], Tensor]:
    """A function from `logit_arrays` as they are stored, `[n, v, ...]` by the last part of their names, to logits
    `[n, v, C]` float32 on the CPU: for those who are in no hurry.

    Args:
        codec: another setting of the store's.
    """
    codec, num_classes = codec or store.identity.codec, store.identity.num_classes
    if not codec.of_features:
        return lambda arrays: codec.decode_stored(arrays, store.codec_tables, num_classes)
    decode = logits_decoder(store, torch.device("cpu"))

    def logits(arrays: Arrays) -> Tensor:
        n, v = next(iter(arrays.values())).shape[:2]
        by_row = {part: array.reshape(n * v, *array.shape[2:]) for part, array in arrays.items()}
        return decode(StoredSignal({}, features={codec.of_features: tensors_of(by_row)})).view(n, v, num_classes)

    return logits


def keeps_whole(store: Store) -> bool:
    """Whether its logits have lost no more than rounding."""
    codec = store.identity.codec
    if of := codec.of_features:
        return keeps_numbers(store.identity.features[of].config)
    return codec.keeps_whole
