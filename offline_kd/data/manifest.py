"""`data_manifest.yaml`: the datasets and teachers that recipes may name, and what proves a local copy of them.

A file is named relative to a data root, a folder or a URL. The roots are, in this order: those given explicitly
(`--data-root`, or `data.root` of a recipe), those of the environment variable `OFFLINE_KD_DATA` (separated as in PATH),
`./data`. The tars of a dataset are looked for in its `location` at last, if it has one.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from offline_kd.data.fetching import Fetched, Remote, Root, below, is_url, not_found, root_at
from offline_kd.support.downloads import Downloads
from offline_kd.support.errors import DataError, ModelError, RecipeError, did_you_mean, shorten
from offline_kd.support.files import file_sha256
from offline_kd.support.strict import Sha256, Strict, parse
from offline_kd.support.strict_yaml import read_yaml

MANIFEST_NAME = "data_manifest.yaml"
# In OFFLINE_KD_DATA, where ':' separates: a URL reaches to the next ':', and a port behind its host belongs to it.
ONE_ROOT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^:/]*(?::[0-9]+(?=[:/]|$))?[^:]*|[^:]+")


class Tar(Strict):
    """One image tar. `sha256` may be missing where only the owner of a copy can know it (official CIFAR-100)."""

    file: str
    count: int = Field(gt=0)
    sha256: Sha256 | None = None


class Split(Strict):
    tars: list[Tar] = Field(min_length=1)

    @property
    def count(self) -> int:
        return sum(tar.count for tar in self.tars)

    def only(self, numbers: Sequence[int] | None) -> "Split":
        """The split of the tars with these numbers; all of them for None."""
        for number in numbers or ():
            if not 0 <= number < len(self.tars):
                raise RecipeError(f"data.tars: there is no tar {number}, the split has {len(self.tars)} (0..).")
        return self if numbers is None else Split(tars=[self.tars[number] for number in numbers])


class Dataset(Strict):
    """Images in WebDataset tars: members `KEY.(png|jpg|webp)` and `KEY.cls`, the class index in ASCII."""

    folder: str
    location: str | None = Field(None, description="folder or URL of the tars; beside this file, if it is relative")
    classes: list[str] = Field(min_length=2, description="names, in the order of the class indices")
    splits: dict[str, Split] = Field(min_length=1)
    source: str = ""
    licence: str = ""


class Normalisation(Strict):
    """What a network expects of `[3, H, W]` pixels in 0..1: `(pixels - mean) / std` per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


Interpolation = Literal["bilinear", "bicubic"]


class EvaluationCrop(Strict):
    """An image of any size as a network takes it: the short side to `resize`, the middle `size` x `size` cut out."""

    size: int = Field(ge=1, le=4096)
    resize: int = Field(ge=1, le=8192)
    interpolation: Interpolation = "bilinear"


class Weights(Strict):
    file: str
    sha256: Sha256


class ExpectedAccuracy(Strict):
    """The teacher gate: measured top-1 (percent) on a dataset split must be within `tolerance` of `top1`."""

    dataset: str
    split: str
    top1: float = Field(ge=0, le=100)
    tolerance: float = Field(gt=0, description="percentage points")


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
        if name not in self.datasets:
            raise RecipeError(f"no dataset '{shorten(name)}' in the manifest.{did_you_mean(name, self.datasets)}")
        return self.datasets[name]

    def split(self, dataset: str, split: str) -> Split:
        splits = self.dataset(dataset).splits
        if split not in splits:
            raise RecipeError(f"dataset '{dataset}' has no split '{shorten(split)}'.{did_you_mean(split, splits)}")
        return splits[split]


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest; raises RecipeError naming the field that is wrong.

    The keys that stores must be signed by, and where datasets lie, are named relative to the manifest.
    """
    if not os.path.isfile(path):  # False where a name is too long for a file, too
        raise RecipeError(
            f"{shorten(str(path))}: no such manifest. Run in the folder that holds {MANIFEST_NAME}, "
            "or pass --manifest FILE."
        )
    manifest = parse(Manifest, read_yaml(path), where=str(path))
    stores = {
        name: one.model_copy(update={"signed_by": one.signed_by and str(path.parent / one.signed_by)})
        for name, one in manifest.stores.items()
    }
    datasets = {
        name: one.model_copy(update={"location": str(path.parent / one.location)})
        for name, one in manifest.datasets.items()
        if one.location is not None and not is_url(one.location)
    }
    return manifest.model_copy(update={"stores": stores, "datasets": manifest.datasets | datasets})


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
