"""The largest logits of a row, kept apart: ids as uint16, values in half precision. Shared by `int` and `topk`."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.store.codecs.codec import Arrays, CodecArray, Floats
from offline_kd.store.codecs.f16 import as_float16
from offline_kd.support.errors import TeacherError

MAX_IDS = 2**16 - 1  # class ids are uint16, the last one marks empty rows


def largest_arrays(count: int) -> dict[str, CodecArray]:
    """What `largest` returns, as a codec declares it."""
    return {
        "top_id": CodecArray("<u2", MAX_IDS, ("rank", count), "classes of the largest logits, largest first"),
        "top_value": CodecArray("<f2", np.nan, ("rank", count), "their logits"),
    }


def largest(logits: Floats, count: int) -> Arrays:
    """Ids and values of the `count` largest logits of every row, largest first; ties in the order of the ids.

    Raises TeacherError when there are too few classes, or more than ids.
    """
    classes = logits.shape[-1]
    if not count < classes <= MAX_IDS:
        raise TeacherError(f"the {count} largest of {classes} logits cannot be kept apart: use another codec.")
    ids = np.sort(np.argpartition(-logits, count - 1, axis=-1)[..., :count], axis=-1)
    values = np.take_along_axis(logits, ids, axis=-1)
    order = np.argsort(-values, axis=-1, kind="stable")
    return {
        "top_id": np.take_along_axis(ids, order, axis=-1).astype(np.uint16),
        "top_value": as_float16(np.take_along_axis(values, order, axis=-1)),
    }


def without(logits: Floats, ids: NDArray[np.generic]) -> Floats:
    """`[..., C]` logits, -inf in the classes `ids` `[..., count]`."""
    others = logits.copy()
    np.put_along_axis(others, ids.astype(np.int64), -np.inf, axis=-1)
    return others


def put_largest(logits: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    """`[..., C]` logits with the largest ones in their places, in place."""
    return logits.scatter_(-1, arrays["top_id"].long(), arrays["top_value"].float())
