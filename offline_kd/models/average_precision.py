"""How well logits rank the images of every class: average precision, and its mean over classes."""

import numpy as np
from numpy.typing import NDArray


def average_precision(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """The mean, over the images of a class, of the precision where each of them is found, the highest score first.

    sum over thresholds k of (R_k - R_(k-1)) P_k, with recall R and precision P: as scikit-learn's
    `average_precision_score`. Images of one score are found together.

    Args:
        scores: `[n]`.
        positive: `[n]`, whether an image is of the class; one is, at least.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of those that have one score
    precision, recall = found[last] / (last + 1), found[last] / found[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def average_precisions(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`[C]`: of every class, by scores `[n, C]`; nan for a class that no image is of."""
    return np.array(
        [average_precision(one, of) if of.any() else np.nan for one, of in zip(scores.T, positive.T, strict=True)]
    )


def mean_average_precision(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float | None:
    """The mean over classes that any image is of, all counting alike; None where there is none.

    Args:
        scores: `[n, C]`, such as logits: sigmoids of them would be equal where they are large.
        positive: `[n, C]`, whether an image is of a class.
    """
    found = average_precisions(scores, positive)
    found = found[~np.isnan(found)]
    return float(found.mean()) if len(found) else None
