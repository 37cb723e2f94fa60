"""`data_manifest.yaml`: the datasets and teachers that recipes may name, and what proves a local copy of them.

That of the current folder, or of `--manifest`, adds to the one that comes with the package.

A file is named relative to a data root, a folder or a URL. The roots are, in this order: those given explicitly
(`--data-root`, or `data.root` of a recipe), those of the environment variable `OFFLINE_KD_DATA` (separated as in PATH),
`./data`. The tars of a dataset are looked for in its `location` at last, if it has one.
"""

import hashlib
import os
import re
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from offline_kd.data.expected import ExpectedAccuracy
from offline_kd.data.fetching import Fetched, Remote, Root, below, not_found, root_at
from offline_kd.data.labels import LabelRule
from offline_kd.support.downloads import Downloads
from offline_kd.support.errors import DataError, ModelError, RecipeError, did_you_mean, shorten
from offline_kd.support.files import file_sha256
from offline_kd.support.packaged import packaged
from offline_kd.support.strict import Sha256, Strict, parse
from offline_kd.support.strict_yaml import read_yaml

E = TypeVar("E")
MANIFEST_NAME = "data_manifest.yaml"
# In OFFLINE_KD_DATA, where ':' separates: a URL reaches to the next ':', and a port behind its host belongs to it.
ONE_ROOT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^:/]*(?::[0-9]+(?=[:/]|$))?[^:]*|[^:]+")


class Tar(Strict):
    """One image tar. `sha256` may be missing where only the owner of a copy can know it (official CIFAR-100)."""

    file: str
    count: int = Field(gt=0)
    sha256: Sha256 | None = None


class IndexedTar(Tar):
    """A line of an index: what reading the whole tar has found."""

    sha256: Sha256
    bytes: int = Field(gt=0)


class TarIndex(Strict):
    """The tars of a split in a file beside the manifest: thousands of them do not belong into YAML."""

    index_version: int = Field(1, ge=1, le=1)
    tars: list[IndexedTar] = Field(min_length=1)


class Split(Strict):
    """The tars of a split, named here or in an index, which `Manifest.dataset` puts into `tars`."""

    tars: list[Tar] = Field([])
    index: str | None = Field(None, description="file beside the manifest that names the tars, by `data index`")
    sha256: Sha256 | None = Field(None, description="of the index")
    labels: LabelRule = Field(
        "cls", description="what says the label of a sample: cls, json:FIELD, json-set:FIELD (a list) or none"
    )

    @model_validator(mode="after")
    def _has_tars_once(self) -> Self:
        if bool(self.tars) == (self.index is not None) or (self.index is None) != (self.sha256 is None):
            raise ValueError("give `tars`, or `index` with its `sha256`")
        return self

    @property
    def count(self) -> int:
        return sum(tar.count for tar in self.tars)

    def with_tars(self) -> "Split":
        """The split with the tars of its index, if it has one; raises DataError for an index that is not that one."""
        if self.index is None or self.sha256 is None:
            return self
        return Split(tars=read_index(Path(self.index), self.sha256), labels=self.labels)

    def only(self, numbers: Sequence[int] | None) -> "Split":
        """The split of the tars with these numbers; all of them for None."""
        for number in numbers or ():
            if not 0 <= number < len(self.tars):
                raise RecipeError(f"data.tars: there is no tar {number}, the split has {len(self.tars)} (0..).")
        return self if numbers is None else Split(tars=[self.tars[number] for number in numbers], labels=self.labels)


def read_index(file: Path, sha256: str) -> list[Tar]:
    """The tars of an index that must have this sha256; raises DataError otherwise."""
    remedy = "Put the file beside the manifest that names it, or make both again: `offline-kd data index`."
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: an index of tars that cannot be read ({error.strerror}). {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{file}: sha256 is {found}, the manifest says {sha256}. {remedy}")
    try:
        return _tars_of(content)
    except ValidationError as error:
        raise DataError(f"{file}: is no index of tars: {error.errors()[0]['msg']}. {remedy}") from error


@lru_cache(8)
def _tars_of(index: bytes) -> list[Tar]:
    """A command asks for one dataset many times."""
    found = TarIndex.model_validate_json(index).tars
    return [Tar(file=tar.file, count=tar.count, sha256=tar.sha256) for tar in found]


class Dataset(Strict):
    """Images in WebDataset tars: samples of members `KEY.(png|jpg|webp)` and what says their label, as `KEY.cls`."""

    folder: str
    location: str | None = Field(None, description="folder or URL of the tars; beside this file, if it is relative")
    classes: list[str] = Field([], description="names, in the order of the class indices; none without labels")
    splits: dict[str, Split] = Field(min_length=1)
    source: str = ""
    licence: str = ""

    @model_validator(mode="after")
    def _labels_have_names(self) -> Self:
        labelled = any(split.labels != "none" for split in self.splits.values())
        if len(self.classes) < 2 and (self.classes or labelled):
            raise ValueError("classes: name two or more; none only where no split has labels (`labels: none`)")
        return self


class Normalisation(Strict):
    """What a network expects of `[3, H, W]` pixels in 0..1: `(pixels - mean) / std` per channel."""

    mean: tuple[float, float, float] = Field(description="of red, green and blue")
    std: tuple[float, float, float] = Field(description="of red, green and blue")


Interpolation = Literal["bilinear", "bicubic"]


class EvaluationCrop(Strict):
    """An image of any size as a network takes it: the short side to `resize`, the middle `size` x `size` cut out."""

    size: int = Field(ge=1, le=4096, description="height and width that the network gets")
    resize: int = Field(ge=1, le=8192, description="of the image's short side, before the middle is cut out")
    interpolation: Interpolation = Field("bilinear", description="how pixels are resampled")


class Weights(Strict):
    file: str
    sha256: Sha256


class Teacher(Strict):
    model: str
    model_args: dict[str, int | float | str | bool] = Field({})
    weights: Weights
    normalisation: Normalisation
    crop: EvaluationCrop | None = Field(None, description="by default what timm knows of the model")
    expected: ExpectedAccuracy | None = None
    source: str = ""
    licence: str = ""


class SharedStore(Strict):
    """A teacher store of the team: a folder or URL, and what it must be."""

    location: str
    digest: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
    signed_by: str | None = Field(None, description="public key whose signature it must have; beside this file")


@dataclass(frozen=True)
class StoreReference:
    """Where a store is, whose targets of it are meant ('': the first teacher's), and what it must be, if that was said.

    That is its sha256, and the public key (PEM) of who must have signed it.
    """

    location: str
    targets: str
    digest: str | None
    signed_by: Path | None = None


class Manifest(Strict):
    manifest_version: int = Field(1, ge=1, le=1)
    datasets: dict[str, Dataset] = Field({})
    teachers: dict[str, Teacher] = Field({})
    files: dict[str, Weights] = Field({}, description="other weights that a team shares")
    stores: dict[str, SharedStore] = Field({}, description="teacher stores that a team shares")

    def weights(self, name: str) -> Weights | None:
        """The weights file of that name, a teacher's or another."""
        return self.teachers[name].weights if name in self.teachers else self.files.get(name)

    def store(self, reference: str) -> StoreReference:
        """What `NAME`, a folder or a URL, with `#TARGETS` and `@sha256:DIGEST` behind it or not, refers to."""
        address, pinned, digest = reference.partition("@sha256:")
        address, _, targets = address.partition("#")
        if pinned and not re.fullmatch("[0-9a-f]{64}", digest):
            raise RecipeError(f"store '{reference}': '{digest[:80]}' is no sha256. See `offline-kd store info`.")
        known = self.stores.get(address)
        if known is None:
            return StoreReference(address, targets, digest or None)
        if digest not in ("", known.digest.removeprefix("sha256:")):
            raise RecipeError(
                f"store '{address}': the recipe wants sha256:{digest}, the manifest says {known.digest}. Correct one."
            )
        signed_by = Path(known.signed_by) if known.signed_by else None
        return StoreReference(known.location, targets, known.digest.removeprefix("sha256:"), signed_by)

    def dataset(self, name: str) -> Dataset:
        """A dataset with all tars, those of indexes too; raises DataError for an index that is not the right one."""
        if name not in self.datasets:
            raise RecipeError(f"no dataset '{shorten(name)}' in the manifest.{did_you_mean(name, self.datasets)}")
        known = self.datasets[name]
        return known.model_copy(update={"splits": {part: split.with_tars() for part, split in known.splits.items()}})

    def evaluation(self, dataset: str, split: str) -> tuple[str, str]:
        """The dataset and the split that `data.evaluation` names: a split of that dataset, or DATASET/SPLIT.

        Raises RecipeError for another dataset with other classes.
        """
        other, _, name = split.rpartition("/")
        known = self.dataset(dataset)
        if not other or split in known.splits:
            return dataset, split
        if known.classes and self.dataset(other).classes != known.classes:
            raise RecipeError(
                f"data.evaluation: '{other}' has other classes than '{dataset}', or another order of them. Evaluate on "
                "images of the same classes."
            )
        return other, name

    def split(self, dataset: str, split: str) -> Split:
        splits = self.dataset(dataset).splits
        if split not in splits:
            raise RecipeError(f"dataset '{dataset}' has no split '{shorten(split)}'.{did_you_mean(split, splits)}")
        return splits[split]


def load_manifest(path: Path) -> Manifest:
    """What a manifest names, and what the packaged one names beside that; raises RecipeError as `read_manifest` does.

    An entry of the file hides the packaged one of its name. Where the current folder has no `data_manifest.yaml`, and
    that is the path, there is the packaged one only.
    """
    known = packaged_manifest()
    if path == Path(MANIFEST_NAME) and not os.path.lexists(path):
        return known
    own = read_manifest(path)
    weights = own.teachers.keys() | own.files.keys()  # one name for both, wherever it stands
    return own.model_copy(
        update={
            "datasets": {**known.datasets, **own.datasets},
            "teachers": {**_without(known.teachers, weights), **own.teachers},
            "files": {**_without(known.files, weights), **own.files},
            "stores": {**known.stores, **own.stores},
        }
    )


def _without(entries: dict[str, E], names: Set[str]) -> dict[str, E]:
    return {name: entry for name, entry in entries.items() if name not in names}


@cache
def packaged_manifest() -> Manifest:
    """The datasets and teachers that the packaged recipes are about."""
    return read_manifest(packaged(MANIFEST_NAME))


def read_manifest(path: Path) -> Manifest:
    """Read and check one manifest; raises RecipeError naming the field that is wrong.

    The keys that stores must be signed by, where datasets lie, and indexes of tars are named relative to the manifest.
    """
    if not os.path.isfile(path):  # False where a name is too long for a file, too
        raise RecipeError(
            f"{shorten(str(path))}: no such manifest. Correct --manifest, or leave it out: {MANIFEST_NAME} of this "
            "folder is read, and what comes with offline-kd."
        )
    manifest = parse(Manifest, read_yaml(path), where=str(path))
    stores = {
        name: one.model_copy(update={"signed_by": one.signed_by and str(path.parent / one.signed_by)})
        for name, one in manifest.stores.items()
    }
    datasets = {name: _beside(path, one) for name, one in manifest.datasets.items()}
    return manifest.model_copy(update={"stores": stores, "datasets": datasets})


def _beside(manifest: Path, dataset: Dataset) -> Dataset:
    """What the manifest of this path says of a dataset, its relative names made those of files."""
    splits = {
        name: split.model_copy(update={"index": split.index and str(manifest.parent / split.index)})
        for name, split in dataset.splits.items()
    }
    here = dataset.location is not None and "://" not in dataset.location
    location = str(manifest.parent / dataset.location) if here and dataset.location else dataset.location
    return dataset.model_copy(update={"splits": splits, "location": location})


def data_roots(explicit: Sequence[str | Path] = ()) -> list[Root]:
    """Where the manifest's files are looked for, most specific first; raises RecipeError for what is no such place."""
    environment = os.environ.get("OFFLINE_KD_DATA", "")
    named = ONE_ROOT.findall(environment) if os.pathsep == ":" else environment.split(os.pathsep)
    return [root_at(root) for root in (*explicit, *filter(None, named), "data")]


def folders_of(dataset: Dataset, roots: Sequence[Root]) -> list[Root]:
    """Where the tars of a dataset are looked for: its folder below every root, then its location."""
    _refuse_outside(dataset.folder)
    location = [] if dataset.location is None else [root_at(dataset.location)]
    return [*(below(root, dataset.folder) for root in roots), *location]


def locate(file: str, roots: Sequence[Root]) -> Path | Remote:
    """The first existing `root / file`, or a file that may be below a remote root before that, which reading will show.

    Raises DataError listing where it was looked for.
    """
    _refuse_outside(file)
    possible: list[Root] = []
    for root in roots:
        if not isinstance(root, Path):
            possible.append(root)
        elif os.path.isfile(root / file):
            if not possible:
                return root / file
            possible.append(root)
            break
    if not possible:
        raise not_found(file, roots)
    return Remote(file, tuple(possible))


def is_complete(dataset: Dataset, roots: Sequence[Root]) -> bool:
    """Whether every tar of a dataset is where it is looked for: a request each for what lies afar."""
    folders = folders_of(dataset, roots)
    files = [tar.file for split in dataset.splits.values() for tar in split.tars]
    with ThreadPoolExecutor(16) as threads:
        return all(threads.map(lambda file: is_there(file, folders), files))


def is_there(file: str, roots: Sequence[Root]) -> bool:
    """Whether a file is below one of the roots now."""
    try:
        found = locate(file, roots)
    except DataError:
        return False
    return found.is_there() if isinstance(found, Remote) else True


def _refuse_outside(file: str) -> None:
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise DataError(f"{file}: a manifest names files inside the data root, never absolute or through '..'")


def locate_weights(weights: Weights, roots: Sequence[Root], downloads: Downloads | None = None) -> Path | Fetched:
    """A weights file whose sha256 was just found to be the manifest's: its path, or its content from afar."""
    file = locate(weights.file, roots)
    if isinstance(file, Remote):
        return file.fetch(weights.sha256, downloads)
    found = file_sha256(file)
    if found != weights.sha256:
        raise ModelError(
            f"{file}: sha256 is {found}, the manifest says {weights.sha256}. "
            "These are other weights, or a damaged copy: fetch the file again, or correct the manifest."
        )
    return file
