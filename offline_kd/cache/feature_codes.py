"""What `pq` needs to code features: templates of every part of a vector; and how few parts an error budget allows.

Both follow from what the teacher says of some views of images of all tars, which are those that are going to be stored.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.cache.kmeans import Vectors, kmeans
from offline_kd.cache.sample import sampled
from offline_kd.data.blocks import BlockLoader
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.store.features import (
    AutoCode,
    Code,
    Features,
    FeaturesIdentity,
    Float16Code,
    Float32Code,
    ProductCode,
    WantedFeatures,
    pooled,
    quantise,
    relative_errors,
    unpack_features,
)
from offline_kd.store.reader import Arrays
from offline_kd.support.console import progress, say
from offline_kd.support.errors import RecipeError, TeacherError
from offline_kd.views.kind import ViewSpec

MOST_TRIED = 16_384  # feature vectors by which a number of parts is chosen
AT_ONCE = 2**16  # vectors that are replaced by what templates leave of them


def identify_features(
    teacher: Teacher,
    wanted: Mapping[str, WantedFeatures],
    known: Mapping[str, FeaturesIdentity],
    views: ViewSpec,
    loader: BlockLoader,
    example: Tensor,
) -> dict[str, FeaturesIdentity]:
    """What the taps give for `example` `[1, 3, H, W]` uint8, on the teacher's device, and in which code it is kept.

    Args:
        known: what a store that exists has already: an automatic choice does not change it.

    Raises ModelError for a tap that does not exist, RecipeError for vectors that cannot be cut into so many parts.
    """
    if not wanted:
        return {}
    points: list[TapPoint] = list(wanted.values())
    _, maps = teacher.logits_and_maps(example, points)
    found = {}
    for (name, one), of_example in zip(wanted.items(), maps, strict=True):
        _, channels, height, width = of_example.shape
        plain = one.coded(Float32Code(name="f32"))
        about = FeaturesIdentity(config=plain, channels=channels, height=height, width=width)
        code: Code
        if not isinstance(one.code, AutoCode):
            code = one.code
        elif name in known:
            code = known[name].config.code
        else:
            code = _chosen(one.code, name, _of_images(teacher, about, views, loader, MOST_TRIED, example.device))
        if isinstance(code, ProductCode) and channels % code.subspaces:
            raise RecipeError(
                f"capture.features.{name}: vectors of {channels} channels cannot be cut into {code.subspaces} parts of "
                f"one length. Take one of {divisors(channels)} for subspaces."
            )
        found[name] = about.model_copy(update={"config": one.coded(code)})
    return found


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _of_images(
    teacher: Teacher, about: FeaturesIdentity, views: ViewSpec, loader: BlockLoader, most: int, device: torch.device
) -> Iterator[Tensor]:
    """At least `most` feature vectors, if there are so many: `[images, views, places, D]` float32, tar by tar.

    Raises TeacherError for features that are not finite or change their size.
    """
    places, count = math.prod(about.shape[1:]), loader.split.count
    wanted = -(-most // places)  # views
    num_views = min(views.num_views, -(-wanted // count))

    def ask(pixels: Tensor) -> Tensor:
        _, (maps,) = teacher.logits_and_maps(pixels, [about.config])
        if tuple(maps.shape[1:]) != (about.channels, about.height, about.width) or not maps.isfinite().all():
            raise TeacherError(
                f"{about.config.named}: gives a map of {list(maps.shape[1:])} for some views, for another it "
                f"was {[about.channels, about.height, about.width]}, or features that are not finite. Check the "
                "weights, and the dtype if it is not float32."
            )
        return pooled(about.config, maps).reshape(len(maps), about.channels, -1).transpose(1, 2)

    rows = min(count, -(-wanted // num_views))
    yield from sampled(teacher, ask, views.with_count(num_views), loader, rows, device)


# ---- templates -----------------------------------------------------------------------------------------------------


def fit_feature_templates(
    teacher: Teacher,
    about: FeaturesIdentity,
    name: str,
    views: ViewSpec,
    loader: BlockLoader,
    scratch: Path,
    device: torch.device,
) -> tuple[Arrays, dict[str, float]]:
    """The templates of `pq`, by full name of the array, and statistics; vectors go through a file in `scratch`.

    Raises TeacherError for features that are not finite or change their size, DataError for too few vectors.
    """
    code = about.config.code
    assert isinstance(code, ProductCode)
    file = scratch / f"{name}.f4"
    with file.open("wb") as out:
        for some in _of_images(teacher, about, views, loader, code.max_vectors, device):
            out.write(some.contiguous().numpy().tobytes())
    vectors = np.memmap(file, dtype=np.float32, mode="r+").reshape(-1, about.channels)
    centroids, statistics = fit_product(vectors, code, device, f"templates of '{name}'")
    say(f"templates of '{name}': {code.stages} x {code.subspaces} parts, {len(vectors):,} vectors of views of all tars")
    return {f"templates/{name}/centroids": centroids.numpy()}, statistics


def fit_product(
    vectors: Vectors, code: ProductCode, device: torch.device, title: str
) -> tuple[Tensor, dict[str, float]]:
    """Templates `[stages, subspaces, K, D / subspaces]` float32 on the CPU, by K-means in every part of `[n, D]`.

    A stage is fitted to what the stages before leave of the vectors, which takes their place: they are changed.
    """
    length = vectors.shape[1] // code.subspaces
    stages, dead, iterations = [], 0, 0
    with progress(title, code.stages * code.subspaces * (code.iterations + 1), "passes") as meter:
        for stage in range(code.stages):
            parts, inertia = [], 0.0
            for part in range(code.subspaces):
                found = kmeans(
                    vectors[:, part * length : (part + 1) * length],
                    code.centroids,
                    iterations=code.iterations,
                    seed=code.seed,
                    device=device,
                    step=meter.advance,
                )
                parts.append(found.centroids)
                inertia, dead = inertia + found.inertia, dead + found.dead
                iterations = max(iterations, found.iterations)
            stages.append(torch.stack(parts))
            if stage + 1 < code.stages:
                _leave_rest(vectors, stages[-1][None], device)
    statistics = {"vectors": len(vectors), "iterations": iterations, "dead": dead}
    return torch.stack(stages), statistics | {"inertia_per_vector": inertia / len(vectors)}


def _leave_rest(vectors: NDArray[np.float32], centroids: Tensor, device: torch.device) -> None:
    """Subtract from `[n, D]` vectors their nearest templates."""
    for start in range(0, len(vectors), AT_ONCE):
        chunk = torch.from_numpy(np.array(vectors[start : start + AT_ONCE])).to(device)
        vectors[start : start + AT_ONCE] -= _coded_and_back(chunk, centroids.to(device)).cpu().numpy()


def _coded_and_back(vectors: Tensor, centroids: Tensor) -> Tensor:
    stages, subspaces, _, _ = centroids.shape
    code = ProductCode(name="pq", subspaces=subspaces, stages=stages)
    config = Features(module="any", code=code)
    return unpack_features(config, {"codes": quantise(vectors, centroids)}, {"centroids": centroids})


# ---- how many parts ------------------------------------------------------------------------------------------------


def _chosen(wanted: AutoCode, name: str, found: Iterator[Tensor]) -> Code:
    """The fewest parts within the budget, by features `[images, views, places, D]` of some images.

    Every fifth image is measured, templates are learned from the others.
    """
    features = torch.cat(list(found))
    is_measured = torch.arange(len(features)) % 5 == 0
    learn_from = features[~is_measured].flatten(0, 2).numpy()
    measured = features[is_measured].flatten(0, 1)  # [views, places, D]
    fitted = wanted.model_dump(exclude={"name", "error_budget"})
    choices = [ProductCode(name="pq", subspaces=parts, **fitted) for parts in divisors(features.shape[3])]
    errors: dict[int, float] = {}
    low, high = 0, len(choices)  # the first that is within the budget lies between; `high`: none does
    while low < high:
        at = (low + high) // 2
        code = choices[at]
        centroids, _ = fit_product(learn_from, code, torch.device("cpu"), f"'{name}' in {code.subspaces} parts")
        decoded = _coded_and_back(measured.flatten(0, 1), centroids).view(measured.shape)
        errors[at] = relative_errors(measured, decoded).mean().item()
        low, high = (low, at) if errors[at] <= wanted.error_budget else (at + 1, high)
    if high == len(choices):
        say(f"features '{name}': f16, since no number of parts keeps the error within {wanted.error_budget:g}")
        return Float16Code(name="f16")
    say(
        f"features '{name}': pq of {choices[high].subspaces} parts, error {errors[high]:.3f} (allowed: "
        f"{wanted.error_budget:g}) on {len(measured):,} views"
    )
    return choices[high]
