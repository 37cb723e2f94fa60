"""The labels of rows: as a store has them, beside those of the images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline_kd.data.blocks import ImageBlock
from offline_kd.data.label_sets import names_in
from offline_kd.data.labels import UNLABELLED
from offline_kd.store.layout import NO_LABEL
from offline_kd.store.reader import Store
from offline_kd.support.errors import StoreMismatch


def stored_labels(block: ImageBlock) -> NDArray[np.integer]:
    """Of a tar as a store has them: `[n]` int32, or packed sets `[n, bytes]` uint8."""
    if block.labels.ndim == 2:
        return block.labels
    return np.where(block.labels == UNLABELLED, np.int32(NO_LABEL), block.labels)


def refuse_other_labels(store: Store, block: ImageBlock, found: NDArray[Any]) -> None:
    """Raise StoreMismatch where a sample of a tar has another label than its row in the store.

    Args:
        found: what the store has of these samples, as `stored_labels` gives it.
    """
    labels, about = stored_labels(block), store.identity.dataset
    if labels.shape[1:] != found.shape[1:]:
        here, there = ("one label", "sets of labels") if about.has_sets else ("a set of labels", "one label")
        raise StoreMismatch(
            f"{block.name}: every sample has {here}, the rows of the store {store.place} have {there}. Correct "
            "`labels` in the manifest, or capture the images again."
        )
    relabelled = np.flatnonzero((found != labels).reshape(len(block), -1).any(axis=1))
    if len(relabelled):
        first = relabelled[0]
        here, there = (_shown(one[first], about.classes if about.has_sets else []) for one in (labels, found))
        raise StoreMismatch(
            f"{block.name}: sample '{block.keys[first]}' (and {len(relabelled) - 1} more) has label {here}, in the "
            f"store {store.place} it has {there} ({NO_LABEL}: none). The labels were changed since: use the original "
            "dataset, or capture it again."
        )


def _shown(label: NDArray[Any], classes: list[str]) -> str:
    return f"{{{', '.join(names_in(label, classes))}}}" if classes else str(label)
