"""Stage 1 with a teacher that is a module in somebody's hands: what a recipe and a manifest say, from the objects."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict

import torch
from safetensors.torch import save
from torch import nn

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import first_batch_size
from offline_kd.data.expected import Kind
from offline_kd.data.fetching import Root, is_url, root_at
from offline_kd.data.manifest import Dataset, Manifest, Normalisation, Split, Tar, data_roots
from offline_kd.data.tars import read_tar, tars_in
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import CaptureRecipe
from offline_kd.store.codecs import Codec
from offline_kd.store.decisions import AnyDecisions
from offline_kd.store.features import WantedFeatures
from offline_kd.support.errors import DataError
from offline_kd.support.strict import parse
from offline_kd.views.kind import ViewSpec


class ModuleOptions(TypedDict, total=False):
    """How a module's answers are stored; everything may be left out."""

    codec: str | Codec | Mapping[str, object]  # as recipes write it, or its name alone; "f16" if absent
    decisions: Mapping[str, AnyDecisions | Mapping[str, object]]  # on feature maps, by a name of your own
    features: Mapping[str, WantedFeatures | Mapping[str, object]]  # of modules, by a name of your own
    device: str | torch.device  # the module is moved there; where its parameters are if absent
    name: str  # of the store and of the teacher; that of the module's class if absent
    classes: list[str]  # names in the order of the logits, of a folder's dataset; "0", "1", ... if absent
    dtype: str  # of autocast: "float32" (if absent), "bfloat16" or "float16"
    compile: bool  # the module, by torch.compile
    tf32: bool  # whether a GPU may make float32 products of 10 bits; not if absent, whatever torch is told elsewhere
    kind: Kind  # "classifier" if absent; "multilabel": of sets of labels; "embedding": vectors, kept as `features`
    batch_size: int | Literal["auto"]  # of the module; no effect on what is stored
    views_per_group: int  # views that are stored and read together; must divide their count


def cache_module(
    network: nn.Module,
    dataset: str | Path,
    manifest: Manifest,
    views: ViewSpec | Mapping[str, object],
    out: str | Path,
    normalisation: Normalisation,
    options: ModuleOptions,
) -> None:
    """Make, or go on making, the store of a module: `api.cache_teacher`, whose arguments these are.

    Args:
        manifest: where `dataset` is looked up when it is neither folder nor URL.
    """
    about, manifest, roots = find_dataset(dataset, manifest, data_roots(), options.get("classes"))
    evaluation = "test" if "test" in manifest.dataset(about).splits else "train"
    module, kind = type(network), options.get("kind", "classifier")
    codec = options.get("codec", "none" if kind == "embedding" else "f16")
    model = f"a module in memory: {module.__module__}.{module.__qualname__}"
    capture: dict[str, object] = {
        "codec": {"name": codec} if isinstance(codec, str) else codec,
        "decisions": options.get("decisions", {}),
        "features": options.get("features", {}),
        **{name: options[name] for name in ("batch_size", "views_per_group") if name in options},
    }
    asked: dict[str, object] = {"model": model, "kind": kind, "normalisation": normalisation}
    asked |= {name: options[name] for name in ("dtype", "compile", "tf32") if name in options}
    described: dict[str, object] = {
        "name": options.get("name", module.__name__),
        "data": {"dataset": about, "evaluation": evaluation, "normalisation": normalisation},
        "teacher": asked,
        "views": views,
        "capture": capture,
    }
    recipe = parse(CaptureRecipe, described, where=f"capture of {model}")
    device = torch.device(options.get("device") or next((one.device for one in network.parameters()), "cpu"))
    with frozen(network.to(device)):
        teacher = Teacher(
            name=recipe.name,
            model=model,
            model_args={},
            weights_sha256=weights_sha256(network),
            normalisation=normalisation,
            crop=recipe.evaluation_crop,
            dtype=recipe.teacher.dtype,
            expected=None,
            licence="",
            network=network,
            batch_size=first_batch_size(recipe, device),
            compile=recipe.teacher.compile,
            tf32=recipe.teacher.tf32,
            kind=recipe.teacher.kind,
        )
        cache_teacher(recipe, manifest, roots, out, device, teacher=teacher)


def find_dataset(
    dataset: str | Path, manifest: Manifest, roots: Sequence[Root], classes: list[str] | None
) -> tuple[str, Manifest, Sequence[Root]]:
    """Name, manifest and roots of a dataset: a folder or URL of tars, or else a name in `manifest`.

    Args:
        classes: of a folder; by default "0", "1", ...
    """
    if is_url(dataset):
        folder = root_at(dataset)
        name, roots = str(folder).rsplit("/", 1)[-1], [folder]
    elif os.path.isdir(dataset):
        folder = Path(dataset).resolve()
        name, roots = folder.name, [folder.parent]
    else:
        return str(dataset), manifest, roots
    return name, Manifest(manifest_version=1, datasets={name: dataset_of(folder, classes)}), roots


def dataset_of(folder: Root, classes: list[str] | None) -> Dataset:
    """A folder of tars as a manifest would describe it: one split, `train`, of all tars in the order of their names.

    A local one lies below its parent; one afar is a root itself.
    """
    paths = tars_in(folder)
    if not paths:
        raise DataError(f"{folder}: holds no .tar or .tar.gz. Pack images with `offline-kd data pack`.")
    tars, most = [], 1
    for path in paths:
        samples, sha256 = read_tar(path)
        if not samples:
            raise DataError(f"{path}: holds no samples. Remove it, or pack the dataset again.")
        tars.append(Tar(file=str(path).rsplit("/", 1)[-1], count=len(samples), sha256=sha256))
        most = max(most, *(sample.label for sample in samples))
    return Dataset(
        folder=folder.name if isinstance(folder, Path) else ".",
        classes=classes or [str(label) for label in range(most + 1)],
        splits={"train": Split(tars=tars)},
        source=f"the {len(tars)} tars of a folder",
    )


def weights_sha256(network: nn.Module) -> str:
    """Of the module's parameters and buffers as a safetensors file holds them, sorted by name."""
    state = network.state_dict()
    tensors = {name: state[name].detach().cpu().contiguous().clone() for name in sorted(state)}
    return hashlib.sha256(save(tensors)).hexdigest()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards every part of the module is in its own mode again."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
