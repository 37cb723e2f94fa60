"""From a teacher and its training images to templates: one pass over the images, un-augmented, then K-means or LDA.

Feature vectors go to a scratch file on disk and are read from there in chunks; they are never all in memory.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offline_kd.cache.feature_codes import fit_feature_templates
from offline_kd.cache.kmeans import KMeans, Vectors, kmeans
from offline_kd.cache.last_layer import last_layer
from offline_kd.cache.lda import fit_subclasses
from offline_kd.cache.sample import SAMPLE_STREAM, sampled_logits
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.label_sets import one_label
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.store.codecs import CODEC_TABLES
from offline_kd.store.decisions import SubclassDecisions, TemplateDecisions
from offline_kd.store.identity import DecisionsIdentity
from offline_kd.store.reader import Arrays
from offline_kd.store.schema import StoreIdentity
from offline_kd.support.console import progress, say
from offline_kd.support.counter_rng import counter_uniform
from offline_kd.support.errors import TeacherError
from offline_kd.views.render import plain_images


def identify_decisions(
    teacher: Teacher, decisions: dict[str, TemplateDecisions | SubclassDecisions], example: torch.Tensor
) -> dict[str, DecisionsIdentity]:
    """What the taps give for `example` `[B, 3, H, W]` uint8; raises ModelError for a tap that does not exist."""
    if not decisions:
        return {}
    points: list[TapPoint] = list(decisions.values())
    _, maps = teacher.logits_and_maps(example, points)
    return {
        name: DecisionsIdentity(config=config, channels=one.shape[1], height=one.shape[2], width=one.shape[3])
        for (name, config), one in zip(decisions.items(), maps, strict=True)
    }


def fit_tables(
    teacher: Teacher,
    identity: StoreIdentity,
    names: Sequence[str],
    loader: BlockLoader,
    scratch: Path,
    device: torch.device,
) -> dict[str, tuple[Arrays, dict[str, float]]]:
    """Templates of the decisions and features in `names`, tables of the codec: arrays by full name, and statistics.

    Raises TeacherError for features that are not finite or change their size, DataError for too few vectors.
    """
    scratch.mkdir(exist_ok=True)
    try:
        fitted = {CODEC_TABLES: _fit_codec(teacher, identity, loader, device)} if CODEC_TABLES in names else {}
        for name in [name for name in names if name in identity.features]:
            about_features = identity.features[name]
            fitted[name] = fit_feature_templates(teacher, about_features, name, identity.views, loader, scratch, device)
        decisions = [name for name in names if name in identity.decisions]
        if decisions:
            vectors, rows = _collect(teacher, identity, decisions, loader, scratch, device)
        for name in decisions:
            about = identity.decisions[name]
            places = about.height * about.width
            if isinstance(about.config, TemplateDecisions):
                fitted[name] = _fit_templates(name, about, vectors[name], rows[name], places, device)
            else:
                labels = np.repeat(rows[name][:, 1], places)
                fitted[name] = _fit_subclasses(name, about, vectors[name], labels, identity.num_classes, device)
        return fitted
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fit_codec(
    teacher: Teacher, identity: StoreIdentity, loader: BlockLoader, device: torch.device
) -> tuple[Arrays, dict[str, float]]:
    """The tables of a codec, from what the teacher says of the first views of some images of every tar, or by which it
    says that."""
    codec, views, count = identity.codec, identity.views, loader.split.count
    if codec.of_features:
        return last_layer(teacher, identity, loader, device)
    wanted = min(codec.learns_from, count * views.num_views)
    # Where views of an image predict each other, it takes whole view groups to learn how.
    predicts = any(array.of_image for array in codec.arrays().values())
    in_group = identity.views_per_group if predicts else 1
    num_views = in_group * min(views.num_views // in_group, -(-wanted // (count * in_group)))
    say(f"codec {codec.label()}: learning from {wanted:,} views of images of all tars")
    logits = sampled_logits(teacher, views, loader, -(-wanted // num_views), num_views, device)
    together = logits.reshape(-1, in_group, logits.shape[-1])[: -(-wanted // in_group)]
    tables = codec.fit(together)
    return {f"codec/{name}": table for name, table in tables.items()}, {"rows": len(together) * in_group}


def _collect(
    teacher: Teacher,
    identity: StoreIdentity,
    names: Sequence[str],
    loader: BlockLoader,
    scratch: Path,
    device: torch.device,
) -> tuple[dict[str, Vectors], dict[str, NDArray[np.int64]]]:
    """Feature vectors `[n, D]` by name, and `[images, 2]` store row and label of the images they come from."""
    about = [identity.decisions[name] for name in names]
    points: list[TapPoint] = [one.config for one in about]
    total = loader.split.count
    rows: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    with ExitStack() as stack:
        files = [stack.enter_context((scratch / f"{name}.f4").open("wb")) for name in names]
        meter = stack.enter_context(progress("features", total, "images"))
        for number, block in enumerate(loader):
            chance, labels = counter_uniform(SAMPLE_STREAM, block.key_hash), one_label(block.labels)
            for start in range(0, len(block), teacher.batch_size):
                plain, kept_rows = plain_images(block, teacher.crop, start, start + teacher.batch_size)
                if not kept_rows:
                    continue
                images = plain.to(device)
                _, maps = teacher.logits_and_maps(images, points)
                for name, one, features, file in zip(names, about, maps, files, strict=True):
                    if tuple(features.shape[1:]) != (one.channels, one.height, one.width):
                        raise TeacherError(
                            f"tap '{one.config.module}': gives {list(features.shape[1:])} for {block.name}, before "
                            f"it gave {[one.channels, one.height, one.width]}. Give the tap a `grid`."
                        )
                    if not features.isfinite().all():
                        bad = kept_rows[int((~features.isfinite()).flatten(1).any(dim=1).nonzero()[0])]
                        raise TeacherError(
                            f"tap '{one.config.module}': features of sample '{block.keys[bad]}' of "
                            f"{block.name} are not finite. Check the weights, and the dtype if it is not float32."
                        )
                    share = one.config.max_vectors / (total * one.height * one.width)
                    kept = np.flatnonzero(chance[kept_rows] < share)
                    vectors = features.permute(0, 2, 3, 1)[torch.from_numpy(kept).to(device)]
                    file.write(vectors.float().cpu().contiguous().numpy().tobytes())
                    first = number * identity.rows_per_block
                    rows[name] += [(first + kept_rows[at], int(labels[kept_rows[at]])) for at in kept]
                meter.advance(len(images))
    return (
        {
            name: np.memmap(scratch / f"{name}.f4", dtype=np.float32, mode="r").reshape(-1, one.channels)
            for name, one in zip(names, about, strict=True)
        },
        {name: np.array(pairs, dtype=np.int64) for name, pairs in rows.items()},
    )


def _fit_templates(
    name: str,
    about: DecisionsIdentity,
    vectors: Vectors,
    rows: NDArray[np.int64],
    places: int,
    device: torch.device,
) -> tuple[Arrays, dict[str, float]]:
    config = about.config
    assert isinstance(config, TemplateDecisions)
    with progress(f"templates of '{name}'", config.iterations + 1, "passes") as meter:
        found = kmeans(
            vectors,
            config.templates,
            iterations=config.iterations,
            init=config.init,
            seed=config.seed,
            device=device,
            step=meter.advance,
        )
    image, place = np.divmod(found.nearest, places)
    arrays: Arrays = {
        f"templates/{name}/centroids": found.centroids.numpy(),
        f"templates/{name}/count": found.counts.numpy(),
        f"templates/{name}/nearest_row": np.where(found.nearest < 0, -1, rows[image, 0]),
        f"templates/{name}/nearest_place": np.where(found.nearest < 0, -1, place).astype(np.int32),
    }
    say(f"templates of '{name}': {len(vectors):,} vectors, {found.iterations} iterations, {found.dead} dead")
    return arrays, _statistics(found, len(vectors))


def _statistics(found: KMeans, num_vectors: int) -> dict[str, float]:
    share = found.counts.double() / num_vectors
    entropy = -torch.special.xlogy(share, share).sum().item()
    return {
        "vectors": num_vectors,
        "iterations": found.iterations,
        "inertia_per_vector": found.inertia / num_vectors,
        "dead": found.dead,
        "utilisation": float(np.exp(entropy)) / len(found.counts),
        **{f"distance_p{level}": value for level, value in found.distance_percentiles.items()},
    }


def _fit_subclasses(
    name: str,
    about: DecisionsIdentity,
    vectors: Vectors,
    labels: NDArray[np.int64],
    num_classes: int,
    device: torch.device,
) -> tuple[Arrays, dict[str, float]]:
    config = about.config
    assert isinstance(config, SubclassDecisions)
    with progress(f"sub-classes of '{name}'", 2 * num_classes, "classes") as meter:
        found = fit_subclasses(vectors, labels, config, num_classes, device, meter.advance)
    components = found.scalings.shape[1]
    unused = (0, config.components - components)  # LDA has at most classes - 1 directions
    arrays: Arrays = {
        f"templates/{name}/scalings": torch.nn.functional.pad(found.scalings, unused).numpy(),
        f"templates/{name}/xbar": found.xbar.numpy(),
        f"templates/{name}/centers": torch.nn.functional.pad(found.centers, unused).numpy(),
        f"templates/{name}/table": found.table.numpy(),
    }
    recognised = found.table.diagonal().mean().item()
    say(f"sub-classes of '{name}': {len(vectors):,} vectors, {components} LDA directions, {recognised:.0%} recognised")
    return arrays, {"vectors": len(vectors), "components": components, "recognised": recognised}
