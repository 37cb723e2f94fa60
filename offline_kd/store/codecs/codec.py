"""What every codec is: logits to compact arrays and back, with a bound of the error, in one class of one file.

Raw logits are kept, offset included: DTKD's temperatures need it. `encode` works on NumPy arrays on the way to disk,
`decode` on Tensors on the device of the student; both are vectorised over rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.objectives.needs import Needs
from offline_kd.support.strict import Strict

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]  # by name of the array
Tables = Mapping[str, NDArray[np.generic]]  # what a codec learned from logits, by name; empty for most

CODEC_TABLES = "codec"  # under which a store keeps the tables of a codec
CLASSES: tuple[str, None] = ("class", None)
# How far two runs of one network may differ, relative to the largest logit: other batch shapes, other kernels.
ARITHMETIC = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class CodecArray:
    """One array of a codec: its type, what marks an empty row, and its axis behind row and view, if it has one."""

    dtype: str
    fill: float
    axis: tuple[str, int | None] | None  # name and size; None for as many as classes
    description: str  # lies in the store's zarr metadata: changing it changes the bytes of new stores
    of_image: bool = False  # one for each image, kept with its first view group; else one for each view
    ragged: bool = False  # bytes: how many there are, in rans.LENGTH_BYTES, these, and zeros, which are not stored


@dataclass(frozen=True)
class Comparison:
    """Stored logits beside what the teacher says of the same views when it is asked again."""

    differences: Tensor  # what must not be larger than `allowed`; of any shape
    allowed: Tensor  # of the shape of `differences`: what codec and arithmetic explain
    errors: Tensor  # of logits, for the store's figures


class Codec(Strict, ABC):
    """A way of storing `[..., C]` logits. Its fields are those of recipes, and of `codec` in `store.json`.

    What a new codec must say are `name`, `arrays`, `encode`, `decode` and `error_bound`; the rest is right for a
    codec that learns nothing, unpacks nothing and serves every objective.
    """

    keeps_whole: ClassVar[bool] = False  # loses no more than rounding, so that others can be measured on what it kept
    serves_sets: ClassVar[bool] = False  # whether it is right where no softmax follows, class by class
    name: str  # narrowed to one Literal by every codec, by which it is found in CODECS

    @abstractmethod
    def arrays(self) -> dict[str, CodecArray]:
        """The arrays, below `logits/` in the store, that `encode` returns."""

    @abstractmethod
    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        """Pack `[n, v, C]` finite float32 logits, v views of every image, into `arrays` `[n, v, ...]`.

        Args:
            tables: what the codec learned, if it does.
            of_images: the arrays `[n, ...]` that are of images, as they were made of their first view group; None:
                this is the first. They are returned, too.

        Raises TeacherError when a logit does not fit the codec.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        """`[..., C]` float32 logits from what `unpack` made, on the device of `arrays`.

        Args:
            tables: what `decoding_tables` made, on the same device.
        """

    @abstractmethod
    def error_bound(self, logits: Floats) -> Floats:
        """`[..., C]` or `[..., 1]`: the largest error that encoding and decoding may make on each of `[..., C]` logits.

        Infinite where there is no bound; a store then has nothing but what was measured.
        """

    @property
    def of_features(self) -> str:
        """Name of the store's features that logits are computed from; "" where logits themselves are kept.

        Such a codec has no arrays: `encode` gives nothing, and `decode` gets the decoded features as `features`.
        """
        return ""

    # ---- tables: only codecs that learn from the teacher's logits, or from its network ------------------------------

    @property
    def learns_from(self) -> int:
        """Views whose logits `fit` wants when a store is begun; 0 for a codec that learns nothing of logits."""
        return 0

    @property
    def has_tables(self) -> bool:
        return self.learns_from > 0

    def tables(self, num_classes: int, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of what `fit` returns.

        Args:
            channels: of the features that logits are computed from; 0 where they are not.
        """
        return {}

    def fit(self, logits: Floats) -> dict[str, NDArray[np.generic]]:
        """The tables from `[n, v, C]` logits of the teacher, v views of every image: as many as a view group has.

        Raises TeacherError when they are too few.
        """
        return {}

    def problem_of(self, tables: Tables) -> str:
        """What is wrong with what a store holds as `tables`, of the right types and shapes; "" if nothing is."""
        return ""

    # ---- reading: only codecs whose stored arrays are not what a device can decode -----------------------------------

    def unpack(self, arrays: Arrays, tables: Tables) -> Arrays:
        """What `decode` takes, all `[n, v, ...]`, of what `encode` made: the part that is done in workers."""
        return arrays

    def unpacked_arrays(self) -> list[str]:
        """The names of what `unpack` returns."""
        return list(self.arrays())

    def decoding_tables(self, tables: Tables) -> dict[str, Tensor]:
        """What `decode` takes of the tables, on the CPU: made once, then brought to the device of the student."""
        return tensors_of(tables)

    def decode_stored(self, arrays: Arrays, tables: Tables, num_classes: int) -> Tensor:
        """`[..., C]` float32 logits from what `encode` made, all on the CPU: for those who are in no hurry."""
        return self.decode(tensors_of(self.unpack(arrays, tables)), num_classes, self.decoding_tables(tables))

    # ---- proof -------------------------------------------------------------------------------------------------------

    def legal_range(self, array: str) -> tuple[int, int] | None:
        """The smallest and the largest integer that one of `arrays` may hold; None where every value is legal."""
        return None

    def compare(
        self, stored: Tensor, again: Tensor, unpacked: Mapping[str, Tensor], tables: Tables, dtype: str
    ) -> Comparison:
        """Stored logits `[n, C]` beside the teacher's `[n, C]` for the same views, both on the CPU.

        By this rule what has no bound is not compared: a codec without any bound must have a rule of its own.

        Args:
            unpacked: what `stored` was decoded from, `[n, ...]`; of a codec of features these, `features` `[n, D]`, and
                `live`, the teacher's now.
            dtype: in which the teacher computes, a key of ARITHMETIC.
        """
        bounds = torch.from_numpy(self.error_bound(again.numpy())).expand_as(again)
        bounded = bounds.isfinite()
        errors = torch.where(bounded, (stored - again).abs(), 0)
        allowed = torch.where(bounded, bounds, 0) + ARITHMETIC[dtype] * max(1.0, again.abs().max().item())
        return Comparison(errors, allowed, errors)

    # ---- who it is for -----------------------------------------------------------------------------------------------

    def serves(self, needs: Needs) -> str:
        """ "" where an objective with these needs can be trained from it, else what a message says is missing.

        The message goes: codec ... does not serve term ..., and then what is returned here.
        """
        return ""

    def label(self) -> str:
        """The setting in a few characters, for tables and plots; codecs that differ behind " + " are other families."""
        return self.name

    @classmethod
    def candidates(cls, logits: Floats) -> list[Self]:
        """Settings that `bench codecs` compares, and that `auto` may choose, for logits `[..., C]` like these."""
        return []


def tensors_of(arrays: Tables) -> dict[str, Tensor]:
    """Arrays or tables on the CPU, as `decode` takes them."""
    # Torch knows uint16 but can do little with it.
    return {
        name: torch.from_numpy(np.array(array.astype(np.int32) if array.dtype == np.uint16 else array))
        for name, array in arrays.items()
    }
