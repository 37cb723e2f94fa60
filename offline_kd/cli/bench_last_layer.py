"""Codes of features, for `bench codecs`: the logits that the last layer makes of decoded features."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.cache.feature_codes import fit_product
from offline_kd.store.codecs.codec import Arrays, CodecArray, Floats, Tables, tensors_of
from offline_kd.store.codecs.last_layer import LastLayer
from offline_kd.store.features import (
    Code,
    FeaturesIdentity,
    Float16Code,
    IntegerCode,
    ProductCode,
    arrays_of,
    pack_features,
    unpack_features,
)

PARTS, STAGES = (32, 16, 8), (1, 2)  # of product quantisation, as far as parts divide the features


class CodedFeatures(LastLayer):
    """`last_layer` whose features are in a code: what it encodes are features `[n, v, D]`, what it decodes logits."""

    name: Literal["last_layer"] = "last_layer"
    about: FeaturesIdentity  # in the code that is measured

    def tables(self, num_classes: int, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        tables, code = super().tables(num_classes, channels), self.about.config.code
        if isinstance(code, ProductCode):
            tables["centroids"] = "<f4", (code.stages, code.subspaces, code.centroids, channels // code.subspaces)
        return tables

    def fit(self, logits: Floats) -> dict[str, NDArray[np.generic]]:
        """Templates from features `[n, v, D]`; the layer is none of what is learned."""
        code = self.about.config.code
        if not isinstance(code, ProductCode):
            return {}
        vectors = logits.reshape(-1, logits.shape[-1]).copy()
        return {"centroids": fit_product(vectors, code, torch.device("cpu"), self.label())[0].numpy()}

    def arrays(self) -> dict[str, CodecArray]:
        return {
            name: CodecArray(one.dtype, one.fill, ("number", one.size) if one.size else None, one.description)
            for name, one in arrays_of(self.about).items()
        }

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        features = torch.from_numpy(logits).flatten(0, 1)
        packed = pack_features(self.about.config, features, tensors_of(tables))
        return {name: array.numpy().reshape(*logits.shape[:2], *array.shape[1:]) for name, array in packed.items()}

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        n, v = next(iter(arrays.values())).shape[:2]
        coded = {name: array.flatten(0, 1) for name, array in arrays.items()}
        features = unpack_features(self.about.config, coded, tables)
        return super().decode({"features": features}, num_classes, tables).view(n, v, -1)

    def decoding_tables(self, tables: Tables) -> dict[str, Tensor]:
        templates = {name: table for name, table in tensors_of(tables).items() if name == "centroids"}
        return super().decoding_tables(tables) | templates

    def label(self) -> str:
        code = self.about.config.code
        if isinstance(code, ProductCode):
            return f"pq {code.subspaces} x {code.stages} + last_layer"
        return f"int {code.bits} + last_layer" if isinstance(code, IntegerCode) else f"{code.name} + last_layer"


def coded_features(about: FeaturesIdentity, name: str) -> list[CodedFeatures]:
    """Features, of that name in a store, in every code that is compared."""
    codes: list[Code] = [Float16Code(name="f16"), *(IntegerCode(name="int", bits=bits) for bits in (8, 4))]
    parts = [some for some in PARTS if about.channels % some == 0]
    codes += [ProductCode(name="pq", subspaces=some, stages=stages) for some in parts for stages in STAGES]
    return [
        CodedFeatures(
            features=name,
            about=about.model_copy(update={"config": about.config.model_copy(update={"code": code})}),
        )
        for code in codes
    ]
