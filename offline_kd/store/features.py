"""The teacher's features themselves: what is kept of a tap's map, in which code; packed, unpacked, and how far off.

`f32` and `f16` keep numbers; `int` puts those of a view on a line; `pq` cuts a vector into parts and keeps the number
of the nearest template of each (product quantisation, Jégou, Douze and Schmid, PAMI 2011, equation 8), and with more
stages that of what is left (residual quantisation).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import Tensor
from torch.nn import functional as F

from offline_kd.models.taps import TapPoint
from offline_kd.store.codecs import CODEC_TABLES
from offline_kd.store.decisions import CHUNK_ELEMENTS
from offline_kd.support.errors import did_you_mean
from offline_kd.support.strict import Seed, Strict

T = TypeVar("T", "WantedFeatures", "FeaturesIdentity")
USUAL_WIDTH = 512  # of features of teachers without classes: for them, views are grouped as for so many classes
MOST_NEIGHBOURS = 1024  # rows among which nearest neighbours are looked for
# A template beyond a near tie leads later stages elsewhere: so much more may stored features be off than coded anew.
SLACK = 1.1

# ---- what recipes say ----------------------------------------------------------------------------------------------


class Float32Code(Strict):
    """Features as the teacher computed them."""

    name: Literal["f32"]


class Float16Code(Strict):
    """Features rounded to half precision."""

    name: Literal["f16"]


class IntegerCode(Strict):
    """Integers on a line from the smallest to the largest number of each view."""

    name: Literal["int"]
    bits: int = Field(8, ge=3, le=8, description="of a code")

    @property
    def levels(self) -> int:
        """Number of steps. Of 8 bits, the code 255 is left to mark empty rows."""
        return 2**self.bits - (2 if self.bits == 8 else 1)


class _Fitted(Strict):
    """How templates are fitted."""

    centroids: int = Field(256, ge=2, le=256, description="templates of every part of a vector; a code is one byte")
    iterations: int = Field(20, ge=1, description="of K-means")
    seed: Seed = Field(0, description="of where K-means begins")
    max_vectors: int = Field(65_536, ge=1, description="feature vectors that K-means sees, of views of all tars")


class ProductCode(_Fitted):
    """Product quantisation: of every part of a vector the nearest template, one byte each."""

    name: Literal["pq"]
    subspaces: int = Field(ge=1, le=2**16, description="parts of a vector, all of one length: codes of a stage")
    stages: int = Field(1, ge=1, le=16, description="templates that are added up; later ones are of what is left")


class AutoCode(_Fitted):
    """`pq` with the fewest subspaces that stay within an error, or `f16` where none do."""

    name: Literal["auto"]
    error_budget: float = Field(0.1, gt=0, lt=1, description="mean length of the error, relative to the features'")


Code = Float32Code | Float16Code | IntegerCode | ProductCode
AnyCode = Annotated[Code, Field(discriminator="name")]
WantedCode = Annotated[Code | AutoCode, Field(discriminator="name")]


class FeatureTap(TapPoint):
    """Which features of a view are kept: the mean over a map's places, or the map; of a vector, the vector."""

    module: str = Field(
        "",
        description="of the teacher; `offline-kd taps MODEL` lists them. By default what the network itself gives: "
        "then teacher.kind is embedding",
    )
    pool: Literal["avg", "none"] = Field("avg", description="avg: one vector, the mean over places; none: the map")

    @property
    def takes_vectors(self) -> bool:
        return True

    @model_validator(mode="after")
    def _grid_is_of_maps(self) -> Self:
        if self.grid is not None and self.pool == "avg":
            raise ValueError("a grid is of maps, which pool: none keeps")
        return self


class Features(FeatureTap):
    """Features as a store keeps them."""

    code: AnyCode


class WantedFeatures(FeatureTap):
    """Features that are to be kept."""

    code: WantedCode = Field(Float16Code(name="f16"), description="how they are stored")

    def coded(self, code: Code) -> Features:
        return Features(**dict(self) | {"code": code})


def that_fit(features: dict[str, T], info: ValidationInfo) -> dict[str, T]:
    """Refuse features that do not go with the decisions and the codec, which a validated model has before them: those
    that are called like decisions, since both have tables; and none, or maps, where the codec is of features.
    """
    for name in features:
        if name == CODEC_TABLES or name in info.data.get("decisions", {}):
            what = "the tables of codecs" if name == CODEC_TABLES else "decisions"
            raise ValueError(f"'{name}' is what {what} are called: features need a name of their own")
    more = info.data.get("extends") is not None  # of targets whose codec has its features already
    of = "" if more else getattr(info.data.get("codec"), "of_features", "")
    if of and of not in features:
        raise ValueError(
            f"the codec is of features '{of}', which are not among them.{did_you_mean(of, features)} Say here what "
            f"comes into the last layer, such as {of}: {{module: linear, at: input}}"
        )
    kept = features.get(of)
    if kept and (kept.config if isinstance(kept, FeaturesIdentity) else kept).pool != "avg":
        raise ValueError(f"the codec is of vectors, and features '{of}' are maps: take pool: avg")
    return features


# ---- what a store keeps --------------------------------------------------------------------------------------------


class FeaturesIdentity(Strict):
    """Features that a store holds, and the map they were taken from."""

    config: Features
    channels: int = Field(gt=0, le=2**20)
    height: int = Field(gt=0, lt=2**15)
    width: int = Field(gt=0, lt=2**15)

    @model_validator(mode="after")
    def _parts_have_one_length(self) -> Self:
        code = self.config.code
        if isinstance(code, ProductCode) and self.channels % code.subspaces:
            raise ValueError(
                f"vectors of {self.channels} channels cannot be cut into {code.subspaces} parts of one length"
            )
        return self

    @property
    def has_tables(self) -> bool:
        return isinstance(self.config.code, ProductCode)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features of one view."""
        return (self.channels,) if self.config.pool == "avg" else (self.channels, self.height, self.width)


@dataclass(frozen=True)
class FeatureArray:
    """One array of coded features."""

    dtype: str
    fill: float
    size: int  # of the axis of channels or codes, behind which are height and width of maps; 0: one number a view
    description: str


def arrays_of(about: FeaturesIdentity) -> dict[str, FeatureArray]:
    """The arrays of features, by the last part of their names."""
    code, channels = about.config.code, about.channels
    if isinstance(code, ProductCode):
        says = "number of the nearest template: stage by stage, part by part"
        return {"codes": FeatureArray("|u1", 0, code.stages * code.subspaces, says)}
    if isinstance(code, IntegerCode):
        return {
            "codes": FeatureArray("|u1", 255, channels, "feature = low + codes * step"),
            "low": FeatureArray("<f4", np.nan, 0, "smallest feature of the view"),
            "step": FeatureArray("<f4", np.nan, 0, "distance between neighbouring codes"),
        }
    return {"values": FeatureArray("<f4" if code.name == "f32" else "<f2", np.nan, channels, "the features")}


def keeps_numbers(config: Features) -> bool:
    """Whether features are kept as numbers, which lose no more than rounding."""
    return isinstance(config.code, Float32Code | Float16Code)


def legal_codes(config: Features) -> tuple[int, int]:
    """The smallest and the largest code."""
    if isinstance(config.code, ProductCode):
        return 0, config.code.centroids - 1
    return 0, config.code.levels if isinstance(config.code, IntegerCode) else 0


def pooled(config: FeatureTap, maps: Tensor) -> Tensor:
    """Of `[B, D, H, W]` maps the features: `[B, D]`, or the maps."""
    return maps.mean(dim=(2, 3)) if config.pool == "avg" else maps


def pack_features(config: Features, features: Tensor, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays that a store keeps of a batch, by the last part of their names. Nothing waits for a GPU.

    Args:
        features: `[B, D]` or `[B, D, H, W]` float32.
        tables: of `pq`: `centroids` `[stages, subspaces, K, D / subspaces]` on the device of `features`.
    """
    code = config.code
    if isinstance(code, ProductCode):
        vectors = features.flatten(2) if features.dim() > 2 else features[..., None]  # [B, D, places]
        codes = quantise(vectors.transpose(1, 2).flatten(0, 1), tables["centroids"])
        codes = codes.view(len(features), vectors.shape[2], -1).transpose(1, 2)
        return {"codes": codes.reshape(len(features), -1, *features.shape[2:])}
    if isinstance(code, IntegerCode):
        low, high = features.flatten(1).amin(dim=1), features.flatten(1).amax(dim=1)
        step = ((high.double() - low) / code.levels).float()
        scaled = (features - _beside(low, features)) / _beside(torch.where(step > 0, step, 1), features)
        return {"codes": scaled.round().clamp(0, code.levels).byte(), "low": low, "step": step}
    return {"values": features if code.name == "f32" else features.half()}


def unpack_features(config: Features, arrays: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Tensor:
    """`[n, D]` or `[n, D, H, W]` float32 of what `pack_features` made."""
    code = config.code
    if isinstance(code, ProductCode):
        return _templates_of(arrays["codes"], tables["centroids"])
    if isinstance(code, IntegerCode):
        codes = arrays["codes"]
        return torch.addcmul(_beside(arrays["low"], codes), codes.float(), _beside(arrays["step"], codes))
    return arrays["values"].float()


def _beside(values: Tensor, features: Tensor) -> Tensor:
    """`[n]` with as many axes as features have."""
    return values.view(-1, *[1] * (features.dim() - 1))


def quantise(vectors: Tensor, centroids: Tensor) -> Tensor:
    """`[n, stages * subspaces]` uint8: the nearest template of every part of `[n, D]` vectors, stage by stage.

    Args:
        centroids: `[stages, subspaces, K, D / subspaces]`, on the same device.
    """
    _, subspaces, num, _ = centroids.shape
    size = max(CHUNK_ELEMENTS[vectors.device.type] // (subspaces * num), 64)
    chunks = [_nearest(chunk, centroids) for chunk in torch.split(vectors, size)]
    return torch.cat(chunks) if chunks else vectors.new_empty((0, subspaces * len(centroids)), dtype=torch.uint8)


def _nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    rest = vectors.view(len(vectors), centroids.shape[1], -1).transpose(0, 1)  # [subspaces, n, D / subspaces]
    codes = []
    for templates in centroids:
        # Differences, not expanded squares: those would lose digits, the more so on a GPU that rounds to TF32.
        distances = torch.cdist(rest, templates, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.argmin(dim=2)
        codes.append(nearest)
        rest = rest - templates.gather(1, nearest[..., None].expand(-1, -1, templates.shape[2]))
    return torch.cat(codes).T.byte()


def _templates_of(codes: Tensor, centroids: Tensor) -> Tensor:
    """Of `[n, stages * subspaces]` or `[n, stages * subspaces, H, W]` codes the sums of their templates."""
    stages, subspaces, num, length = centroids.shape
    first = torch.arange(stages * subspaces, device=codes.device)[:, None] * num
    places = codes.flatten(2) if codes.dim() > 2 else codes[..., None]  # [n, stages * subspaces, places]
    found = F.embedding(places.long() + first, centroids.reshape(-1, length))
    summed = found.view(len(codes), stages, subspaces, -1, length).sum(dim=1)
    return summed.transpose(2, 3).reshape(len(codes), subspaces * length, *codes.shape[2:])


# ---- how far off ---------------------------------------------------------------------------------------------------


def error_lengths(live: Tensor, decoded: Tensor) -> Tensor:
    """`[n]`: the length of the error of every row."""
    return (decoded - live).flatten(1).norm(dim=1)


def relative_errors(live: Tensor, decoded: Tensor) -> Tensor:
    """`[n]`: the same relative to the features' own length; of features that are all 0, the length itself."""
    length = live.flatten(1).norm(dim=1)
    return error_lengths(live, decoded) / torch.where(length > 0, length, 1)


def are_the_teachers(live: Tensor, stored: Tensor, again: Tensor, precision: float) -> Tensor:
    """`[n]` bool: whether stored features are as near to the teacher's as if they were coded now.

    Args:
        live: `[n, ...]` what the teacher says now.
        stored, again: what is decoded of the store, and of `live` coded anew.
        precision: how far two runs of the teacher may differ, relative to the length of the features.
    """
    length = live.flatten(1).norm(dim=1)
    # Of a view of nearly no features, rounding is that of the others.
    allowed = SLACK * error_lengths(live, again) + 2 * precision * torch.maximum(length, length.mean())
    return error_lengths(live, stored) <= allowed


@dataclass
class FeatureErrors:
    """How far decoded features are from the teacher's: sums over rows."""

    rows: int = 0
    relative: float = 0.0
    cosine: float = 0.0
    live: list[Tensor] = field(default_factory=list)  # [n, D] of the first rows; of maps, their means
    stored: list[Tensor] = field(default_factory=list)

    def add(self, live: Tensor, stored: Tensor) -> None:
        """Some rows more, `[n, D]` or `[n, D, H, W]` each, on the CPU."""
        room = MOST_NEIGHBOURS - self.rows
        if room > 0:
            self.live.append(live[:room].flatten(2).mean(dim=2) if live.dim() > 2 else live[:room])
            self.stored.append(stored[:room].flatten(2).mean(dim=2) if stored.dim() > 2 else stored[:room])
        self.rows += len(live)
        self.relative += relative_errors(live, stored).sum().item()
        self.cosine += F.cosine_similarity(live.flatten(1), stored.flatten(1), dim=1).sum().item()

    def figures(self) -> dict[str, float]:
        """Means over rows: `relative_l2` and `cosine`; `same_neighbour` is the share of rows whose nearest other row
        is the same one."""
        live, stored = (_nearest_others(torch.cat(rows)) for rows in (self.live, self.stored))
        return {
            "relative_l2": self.relative / self.rows,
            "cosine": self.cosine / self.rows,
            "same_neighbour": (live == stored).float().mean().item(),
        }


def _nearest_others(vectors: Tensor) -> Tensor:
    """`[n]`: which other of `[n, D]` vectors is nearest to each."""
    distances = torch.cdist(vectors, vectors)
    return distances.fill_diagonal_(torch.inf).argmin(dim=1)
