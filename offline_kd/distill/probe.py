"""How good the vectors of a student without classes are: nearest neighbours, and a linear classifier on them.

The linear probe is scikit-learn's LogisticRegression (C = 1) on vectors of which every channel has been made to have
mean 0 and deviation 1 over the images that it learns from; the student stays as it is. It learns from the training
split, un-augmented, from images whose labels the run may see, at most MOST_LEARNED of them, chosen by key; where the
training split has no labels, from four fifths of the evaluation split to judge the other fifth, five times.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from offline_kd.data.blocks import BlockLoader
from offline_kd.distill.heads import labels_of_rows
from offline_kd.distill.loader import Loader
from offline_kd.models.neighbours import Embedded, knn_top1
from offline_kd.support.console import say
from offline_kd.support.counter_rng import counter_uniform
from offline_kd.support.ranks import from_first

MOST_LEARNED = 20_000
FOLDS = 5
ITERATIONS = 1000  # of L-BFGS, at most
PROBE_STREAM = 0x70726F6265  # first counter of the draws made here, so that they are independent of all others
FROM_TRAINING = "labels of the training split"
FROM_EVALUATION = f"labels of the evaluation split, {FOLDS} folds"

Embed = Callable[[BlockLoader, str], Embedded]  # of the images of a split, and what to call that


def neighbours_of(found: Embedded, device: torch.device) -> float | None:
    """k-NN top-1 in percent; None where there are not two labels."""
    labelled = found.labels >= 0
    if labelled.sum() < 2:
        return None
    return from_first(lambda: knn_top1(found.vectors[labelled].to(device), found.labels[labelled].to(device)))


def probe(found: Embedded, learn_from: BlockLoader | None, embedded: Embed) -> tuple[float, str] | None:
    """Top-1 of a linear probe on the evaluation split in percent, and what it learned from; None: it cannot learn.

    Args:
        found: of the evaluation split.
        learn_from: images of the training split; None: they have no labels.
    """
    x, y = _known(found)
    if len(np.unique(y)) < 2:
        return None
    if learn_from is not None:
        learned_x, learned_y = _known(embedded(learn_from, "linear probe"))
        if len(np.unique(learned_y)) > 1:
            return from_first(lambda: (100 * _right(learned_x, learned_y, x, y) / len(y), FROM_TRAINING))
    return from_first(lambda: _cross_validated(x, y))


def _known(found: Embedded) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    labelled = found.labels >= 0
    return found.vectors[labelled].double().numpy(), found.labels[labelled].numpy()


def _cross_validated(x: NDArray[np.float64], y: NDArray[np.int64]) -> tuple[float, str] | None:
    """In the order of the hashes of keys, which is that of no label."""
    fold, right = np.arange(len(y)) % FOLDS, 0
    for number in range(FOLDS):
        judged = fold == number
        if len(np.unique(y[~judged])) < 2:
            return None
        right += _right(x[~judged], y[~judged], x[judged], y[judged])
    return 100 * right / len(y), FROM_EVALUATION


def _right(
    learned_x: NDArray[np.float64], learned_y: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.int64]
) -> int:
    """How many of `[n, D]` vectors a classifier that has learned from others gives the right one of their labels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(learned_x, learned_y)
    if any(issubclass(one.category, ConvergenceWarning) for one in caught):
        say(f"linear probe: not converged after {ITERATIONS:,} iterations, its figure is a little too low")
    return int((classifier.predict(x) == y).sum())


def images_to_learn_from(loader: Loader, decode: bool) -> BlockLoader | None:
    """Images of the training split that a probe learns from; None: there are no labels.

    Args:
        decode: as of `HowRead`: as the student is evaluated.
    """
    images = loader.source.images
    if images.split.labels == "none":
        return None
    of_tars = [labels_of_rows(loader, number) for number in range(len(images))]
    known = [hashes[(labels >= 0) & loader.options.shows_label(hashes)] for hashes, labels in of_tars]
    share = MOST_LEARNED / max(1, sum(map(len, known)))
    chosen = [hashes[counter_uniform(PROBE_STREAM, hashes) < share] for hashes in known]
    return images.only(chosen, decode) if any(map(len, chosen)) else None
