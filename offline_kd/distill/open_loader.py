"""The public way to a loader: a store and the tars it was made from, without a recipe or a manifest."""

from collections.abc import Sequence
from pathlib import Path

import torch

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.fetching import root_at
from offline_kd.data.manifest import Dataset, Normalisation, Split
from offline_kd.data.tars import Proof
from offline_kd.distill.loader import Loader
from offline_kd.distill.reader import Options, Source
from offline_kd.store.join import Wanted
from offline_kd.store.reader import Store
from offline_kd.support.errors import DataError


def open_loader(
    store: Store,
    data: str | Path,
    options: Options,
    *,
    device: str | torch.device = "cpu",
    decisions: Sequence[str] = (),
    features: Sequence[str] = (),
    normalisation: Normalisation | None = None,
) -> Loader:
    """Batches of images with what a store says of them, in the order in which `distill` shows them.

    The join compares every sample's key, image bytes and label with what the teacher saw.

    Args:
        store: as `open_store` gives it.
        data: the folder or URL of the image tars that the store was made from.
        options: size of batches, their order, how many processes read, and which share of every batch this rank gets.
        decisions: names of the decisions that batches hold beside the logits.
        features: names of the features that batches hold beside them, as `teacher_features`.
        normalisation: give images as the float32 input of a network, `(pixels / 255 - mean) / std`; None: uint8 pixels.

    Raises DataError when a tar is not there, StoreMismatch when the store holds no such features; and, while batches
    are read, StoreMismatch for a sample that is not the one the teacher saw.
    """
    root = root_at(data)
    folder = root.absolute() if isinstance(root, Path) else root
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the one with the tars that {store.place} was made from.")
    about = store.identity.dataset
    split = Split(tars=[about.tars[block] for block in store.blocks], labels=about.labels)
    dataset = Dataset(folder=".", classes=about.classes, splits={about.split: split})
    # The join proves every image, unless the store is an old one, which knows the sha256 of tars only.
    prove: Proof = "never" if store.created.keeps_digests else "once"
    images = BlockLoader(dataset, split, [folder], decode=store.identity.views.is_exact, prove=prove)
    has_logits = store.identity.teacher.kind != "embedding"
    wanted = Wanted(has_logits, decisions, features)
    source = Source(images, store.identity.views, store.identity.groups, [store], [wanted])
    return Loader(source, options, torch.device(device), normalisation)
