"""What an ideal entropy coder would take for what a codec has coded: the bound for its own coder."""

import numpy as np
from numpy.typing import NDArray

from offline_kd.store.codecs import Codec, row_coder
from offline_kd.store.codecs.codec import Arrays, Tables
from offline_kd.store.codecs.klt import Klt
from offline_kd.store.codecs.klt_means import KltMeans
from offline_kd.store.codecs.rans import TOTAL
from offline_kd.store.codecs.row_coder import coders_of


def ideal_bytes(codec: Codec, arrays: Arrays, tables: Tables) -> dict[str, float]:
    """Bytes of all rows by part, means, views and refinement, of what `encode` made of `[n, v, C]` logits.

    A symbol costs -log2 of its frequency in the tables: the order-0 cross-entropy of what was measured under what was
    learned. Nothing for a codec without an entropy coder of its own.
    """
    if isinstance(codec, KltMeans):
        return _of_klt_means(codec, arrays, tables)
    if isinstance(codec, Klt):
        unpacked = codec.unpack(arrays, tables)
        return {
            "views": _bits(_rows(unpacked["q"]), tables["frequency"]).sum() / 8,
            "refinement": _bits(_rows(unpacked["differences"]), tables["refine_frequency"]).sum() / 8,
        }
    return {}


def _of_klt_means(codec: KltMeans, arrays: Arrays, tables: Tables) -> dict[str, float]:
    coders = coders_of(tables)
    means = row_coder.decode(_rows(arrays["means"]).astype(np.uint8), coders.means)[0]
    codes, places = _rows(arrays["codes"]).astype(np.uint8), len(coders.views)
    # The level of a row is read behind its axes, and these are read from the last one on.
    views, levels = tables["view_frequency"], tables["level_frequency"]
    beside = (views.shape[1] - levels.shape[1]) // 2
    both = np.concatenate([np.pad(levels, ((0, 0), (beside, beside))), views[:places]])
    values = row_coder.decode(codes, row_coder.tables_of(both))[0]
    level, q = values[:, 0], values[:, 1:]
    counts = codec.counts(tables["mean"].shape[0])
    refine = tables["refine_frequency"].reshape(len(counts), -1, views.shape[1])
    differences = _rows(codec.unpack(arrays, tables)["differences"])
    bits = _bits(level[:, None], levels).sum()
    for one, count in enumerate(counts):
        bits += _bits(differences[level == one, :count], refine[one]).sum()
    return {
        "means": _bits(means, tables["mean_frequency"]).sum() / 8,
        "views": _bits(q, views).sum() / 8,
        "refinement": bits / 8,
    }


def _rows(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array.reshape(-1, array.shape[-1])


def _bits(values: NDArray[np.generic], frequency: NDArray[np.generic]) -> NDArray[np.float64]:
    """`[n, s]` of numbers `[n, s]` under frequencies `[s or more, 2 most + 1]` of -most..most."""
    most = frequency.shape[1] // 2
    found = frequency[np.arange(values.shape[1]), values.astype(np.int64) + most]
    bits: NDArray[np.float64] = -np.log2(found.astype(np.float64) / TOTAL)
    return bits
