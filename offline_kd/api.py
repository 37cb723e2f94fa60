"""The public API: open a store and take logits, decisions, features or batches from it; make one with a module.

`offline_kd/__init__.py` offers these names without importing this file; docs/api.md shows each of them at work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from offline_kd.cache.in_memory import ModuleOptions, cache_module
from offline_kd.data.fetching import is_url, root_at
from offline_kd.data.manifest import MANIFEST_NAME, EvaluationCrop, Manifest, Normalisation, load_manifest
from offline_kd.store.info import store_info
from offline_kd.store.lookup import decisions_of, features_of, keys_from_tars, logits_of, rows_of, stored_keys
from offline_kd.store.reader import Store
from offline_kd.store.signing import open_as_demanded
from offline_kd.support.errors import DataError, RecipeError, StoreError
from offline_kd.support.strict import parse
from offline_kd.views.kind import ViewSpec

if TYPE_CHECKING:
    from offline_kd.distill.loader import Loader

AnyNormalisation = Normalisation | Mapping[str, Sequence[float]]


class LoaderOptions(TypedDict, total=False):
    """How batches are made, beside their size."""

    seed: int  # of the order, and of which view an epoch shows; 0 if absent
    device: str | torch.device  # where batches are; "cpu" if absent
    workers: int  # processes that read and decode tars, of every rank; 0 if absent
    rank: int  # which share of every batch this process gets; 0 if absent
    world: int  # of how many processes, 1 to `batch_size`, which is that of all together; 1 if absent
    decisions: Sequence[str]  # names of decisions that batches hold beside the logits; none if absent
    features: Sequence[str]  # names of features, of which `batch.teacher_features` has each; none if absent
    normalisation: AnyNormalisation | None  # of `batch.images`, which are then float32; uint8 if absent


@dataclass(frozen=True)
class TeacherStore:
    """What a teacher said of a dataset. `open_store` makes one.

    Nothing is handed out that was not checked: the bytes that are decoded are the bytes whose sha256 was compared.
    """

    reader: Store  # everything beneath: identity, ledger, arrays by block
    data: str | Path | None = None  # the folder or URL of the dataset's tars, where it is known

    def __repr__(self) -> str:
        return f"TeacherStore({str(self.reader.place)!r}, digest={self.digest!r})"

    @property
    def digest(self) -> str:
        """`sha256:...` of identity and content: what a recipe or `open_store(digest=...)` may pin."""
        return f"sha256:{self.reader.digest}"

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the logits."""
        return list(self.reader.identity.dataset.classes)

    @property
    def num_views(self) -> int:
        """How many views of every image are stored."""
        return self.reader.identity.views.num_views

    @cached_property
    def info(self) -> dict[str, object]:
        """What `offline-kd store info --json` shows: teacher, dataset, views, codec, fidelity, licences and more."""
        return store_info(self.reader)

    def keys(self, data: str | Path | None = None) -> list[str]:
        """The key of every row, in the store's order.

        Args:
            data: the folder or URL of the dataset's tars (by default the one that the store was opened with), from
                which the keys of a store before schema 3 come: it holds their hashes only.

        Raises StoreCorrupt where a key is not the one of its row's hash; of a store before schema 3, StoreError when
        no folder is known and StoreMismatch when its tars lack the key of a row.
        """
        if self.reader.created.keeps_digests:
            return stored_keys(self.reader)
        return keys_from_tars(self.reader, root_at(self._folder(data)))

    def logits(self, keys: Sequence[str], views: Sequence[int] | None = None) -> Tensor:
        """`[n, V, C]` float32 logits of n samples in the given views (by default all that are stored), on the CPU.

        Raises StoreMismatch for a key or view that the store does not have, StoreCorrupt for damaged bytes.
        """
        return logits_of(self.reader, self._rows(keys), self._views(views))

    def decisions(
        self, name: str, keys: Sequence[str], views: Sequence[int] | None = None
    ) -> dict[str, NDArray[np.generic]]:
        """What the teacher decided at every location of its feature map, for n samples in V views.

        Returns, of decisions on templates: `id` `[n, V, H, W, m]` uint16, the likeliest template first; `prob` float32
        of the same shape, where m > 1; `dropped` `[n, V]` float32, the largest probability that was not kept. Of
        decisions on sub-classes: `subclass` `[n, V, H, W]` uint8.

        Raises StoreMismatch for a name, key or view that the store does not have.
        """
        return decisions_of(self.reader, name, self._rows(keys), self._views(views))

    def features(self, name: str, keys: Sequence[str], views: Sequence[int] | None = None) -> Tensor:
        """`[n, V, D]` float32 features of n samples in V views, or `[n, V, D, H, W]` where maps were kept, on the CPU.

        Raises StoreMismatch for a name, key or view that the store does not have, StoreCorrupt for damaged bytes.
        """
        return features_of(self.reader, name, self._rows(keys), self._views(views))

    def loader(self, data: str | Path | None = None, *, batch_size: int, **options: Unpack[LoaderOptions]) -> "Loader":
        """Batches for a training loop of your own: `for batch in store.loader(...).epoch(0)`.

        Images are rendered as the teacher saw them, and every image, label and key is compared with the store.

        Args:
            data: the folder or URL of the dataset's tars; by default the one that the store was opened with.
            options: see `LoaderOptions`.

        Raises RecipeError for more ranks than a batch has rows, and StoreMismatch when images, labels or keys are not
        those that the teacher saw.
        """
        from offline_kd.distill.open_loader import open_loader
        from offline_kd.distill.reader import Options

        folder = self._folder(data)
        wanted = options.get("normalisation")
        return open_loader(
            self.reader,
            folder,
            Options(
                batch_size=batch_size,
                seed=options.get("seed", 0),
                workers=options.get("workers", 0),
                rank=options.get("rank", 0),
                world=options.get("world", 1),
            ),
            device=options.get("device", "cpu"),
            decisions=options.get("decisions", ()),
            features=options.get("features", ()),
            normalisation=None if wanted is None else _normalisation(wanted),
        )

    def _views(self, views: Sequence[int] | None) -> Sequence[int]:
        return range(self.num_views) if views is None else views

    def _rows(self, keys: Sequence[str]) -> NDArray[np.int64]:
        def known() -> list[str]:
            return self.keys() if self.reader.created.keeps_digests or self.data is not None else []

        return rows_of(self.reader, keys, known)

    def _folder(self, data: str | Path | None) -> str | Path:
        folder = self.data if data is None else data
        if folder is None:
            about = self.reader.identity.dataset
            raise StoreError(
                f"{self.reader.place}: holds no images{'' if self.reader.created.keeps_digests else ' and no keys'}. "
                f"Name the folder or URL of the tars of {about.name}/{about.split}: here, or with open_store(..., "
                "data=FOLDER)."
            )
        if not is_url(folder) and not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder. Name the one that holds the dataset's tars.")
        return folder


def open_store(location: str | Path, *, digest: str | None = None, data: str | Path | None = None) -> TeacherStore:
    """Open a finished store. Only its metadata is read: targets are read, and checked, when they are asked for.

    Args:
        location: a folder, a URL (`s3://`, `gs://`, `az://`, `https://`), or a name in the `data_manifest.yaml` of the
            current folder; `#TARGETS` (another teacher of the store) and `@sha256:DIGEST` may follow.
        digest: `sha256:...` that the store must have, or must have had before it grew; the same as `@sha256:...`.
        data: the folder or URL of the dataset's tars, for `loader`, and for `keys` of a store before schema 3.

    Raises RecipeError for a reference that cannot be understood, StoreError where there is no store, StoreIncomplete
    for one that is not finished, StoreCorrupt when its parts disagree, StoreMismatch when it has another digest,
    lacks these targets, or lacks the signature that the manifest demands.
    """
    where = manifest_here().store(str(location))
    wanted = digest.removeprefix("sha256:") if digest is not None else None
    if wanted is not None and where.digest not in (None, wanted):
        raise RecipeError(f"store '{location}': is pinned to sha256:{where.digest}, wanted is {digest}. Correct one.")
    reader = open_as_demanded(replace(where, digest=wanted or where.digest))
    return TeacherStore(reader, data)


def cache_teacher(
    network: nn.Module,
    dataset: str | Path,
    *,
    views: ViewSpec | Mapping[str, object],
    out: str | Path,
    normalisation: AnyNormalisation,
    **options: Unpack[ModuleOptions],
) -> TeacherStore:
    """Ask a module about every view of every image of a dataset, and store what it says: no recipe, no manifest entry.

    Run again with the same arguments, it goes on where it stopped, or adds views or decisions. Views whose `count` is
    not what the module was asked for before are added; another module is refused.

    Args:
        network: `[B, 3, H, W]` float32 normalised images -> `[B, C]` raw logits; of kind "embedding", `[B, D]` vectors.
            It runs in evaluation mode, without gradients, and gets its own modes back. The store knows it by the sha256
            of its parameters and buffers.
        dataset: a folder or bucket of image tars, all of which are captured, or a name in the `data_manifest.yaml` of
            the current folder, of which split `train` is.
        views: which augmentations, as recipes write them: `{"kind": "pad_crop_flip", "count": 4}`.
        out: the store: a folder or a URL.
        normalisation: of the module's input: `{"mean": [r, g, b], "std": [r, g, b]}` of pixels in 0..1.
        options: see `ModuleOptions`.

    Raises DataError for tars that are not what they should be, TeacherError when the module does not give one finite
    logit per class, StoreMismatch when `out` is a store of something else.
    """
    cache_module(network, dataset, manifest_here(), views, out, _normalisation(normalisation), options)
    return open_store(out, data=dataset if is_url(dataset) or Path(dataset).is_dir() else None)


def evaluation_loader(
    images: str | Path,
    data: str | Path | None = None,
    *,
    batch_size: int,
    normalisation: AnyNormalisation,
    crop: EvaluationCrop | Mapping[str, object] | None = None,
    device: str | torch.device = "cpu",
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Images without augmentation and their labels, to measure a student on: `for images, labels in loader`.

    Every image comes once, in the order of the tars. Images are `[B, 3, H, W]` float32, the input of a network, labels
    `[B]` int64, of sets `[B, C]` float32; a batch ends where its tar does. Of several processes each gets all images.

    Args:
        images: a folder or URL of image tars, all of which are read, or DATASET/SPLIT of the `data_manifest.yaml` of
            the current folder.
        data: the folder or URL of the tars of DATASET/SPLIT; by default they are looked for where
            `OFFLINE_KD_DATA` says, and in `./data`.
        normalisation: of the network's input: `{"mean": [r, g, b], "std": [r, g, b]}` of pixels in 0..1.
        crop: of images of different sizes: `{"size": 224, "resize": 256}`, and `interpolation` if it is not bilinear.

    Raises RecipeError for what is neither a folder nor in the manifest, and DataError when a tar is not there, images
    are not what they should be, or they have no labels.
    """
    from offline_kd.distill.evaluation_loader import EvaluationBatches, images_to_evaluate

    if batch_size < 1:
        raise RecipeError(f"batches of {batch_size}: give at least 1.")
    cropped = parse(EvaluationCrop, crop, where="crop") if isinstance(crop, Mapping) else crop
    found = images_to_evaluate(images, data, manifest_here(), decode=cropped is None)
    batches = EvaluationBatches(found, batch_size, torch.device(device), _normalisation(normalisation), cropped)
    return DataLoader(batches, batch_size=None)


def manifest_here() -> Manifest:
    """The manifest of the current folder, and what comes with the package."""
    return load_manifest(Path(MANIFEST_NAME))


def _normalisation(given: AnyNormalisation) -> Normalisation:
    return given if isinstance(given, Normalisation) else parse(Normalisation, given, where="normalisation")
