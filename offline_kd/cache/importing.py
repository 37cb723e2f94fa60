"""Label stores of other programs made stores of ours: looked through once, then committed tar by tar.

Nobody can ask the teacher. What shows that labels are about these images is their names or their count, that boxes lie
inside them, and that the answers name the images' labels; the last is measured before anything is written.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offline_kd.cache.asking import probes
from offline_kd.cache.finish import finish_if_complete
from offline_kd.cache.foreign.answers import Answers, Foreign, Sample
from offline_kd.cache.in_memory import find_dataset
from offline_kd.cache.job import Capture, announce, describe_dataset, refuse_uneven_views, software_versions
from offline_kd.data.blocks import BlockLoader, ImageBlock
from offline_kd.data.decoding import seen_otherwise
from offline_kd.data.fetching import Root
from offline_kd.data.labels import need_one_label
from offline_kd.data.manifest import Manifest
from offline_kd.first_recipe import OF_IMAGENET
from offline_kd.recipe import CaptureRecipe
from offline_kd.store.codecs.f16 import as_float16
from offline_kd.store.codecs.largest import MAX_IDS
from offline_kd.store.codecs.topk import TAIL_TEMPERATURES, TopK
from offline_kd.store.identity import Imported, TeacherIdentity
from offline_kd.store.join import row_arrays
from offline_kd.store.layout import parts_of, plan_views_per_group
from offline_kd.store.leases import leases_at
from offline_kd.store.opening import read_identity
from offline_kd.store.reader import Arrays
from offline_kd.store.schema import SCHEMA_VERSION, LedgerEntry, StoreIdentity, StoreManifest, ledger_name
from offline_kd.store.writer import commit
from offline_kd.support.console import progress, say
from offline_kd.support.errors import DataError, RecipeError, TeacherError, shorten
from offline_kd.support.places import Place, place_at
from offline_kd.support.strict import parse

LOOKED_AT = 2000  # images whose answers are compared with their labels before anything is written
LEAST = 1e-8  # probability that 0 stands for: half precision ends at 6e-8
NAMED = 5  # images that are left out and named


@dataclass(frozen=True)
class Options:
    """What an import may be told."""

    split: str = "train"
    teacher: str = ""  # its name; what the files say, if they do, where this is empty
    keys: Sequence[str] | None = None  # the images' keys in the order in which the other program numbers them
    least_top1: float = 50.0  # percent of views whose likeliest class must be the label


@dataclass(frozen=True)
class Looked:
    """What looking through all labels has shown."""

    sha256: str  # of the labels of all images, in the order of the dataset
    top1: float  # percent of the views that were looked at


def import_labels(
    foreign: Foreign, dataset: str, found_in: tuple[Manifest, Sequence[Root]], out: str, options: Options = Options()
) -> StoreManifest:
    """Make, or go on making, the store of another program's labels, and declare it complete.

    Args:
        dataset: a name in the manifest, or a folder or URL of tars.
        found_in: the manifest, and where data of its datasets lies.
        out: folder or URL of the store.

    Raises DataError for labels of other images, TeacherError where they do not name the images' labels, StoreMismatch
    where another store lies.
    """
    name, manifest, roots = (
        (dataset, *found_in) if dataset in found_in[0].datasets else find_dataset(dataset, *found_in, None)
    )
    split = manifest.split(name, options.split)
    need_one_label(
        split.labels, f"{name}/{options.split}", "`store import`, which compares the answers with the labels,"
    )
    loader = BlockLoader(manifest.dataset(name), split, roots, keep_bytes=0, decode=False)
    if problem := foreign.problem_of_count(split.count):
        raise DataError(f"{foreign.where}: {problem}")
    numbers = _numbers(loader, options.keys) if foreign.is_numbered else {}
    for one in foreign.lost:
        say(f"lost: {one}")
    looked = _look_through(foreign, loader, numbers)
    if looked.top1 < options.least_top1:
        raise TeacherError(
            f"{foreign.where}: the likeliest class is the label in {looked.top1:.1f} % of the views, less than "
            f"{options.least_top1:g} %: other images, another order of images or classes, or a poor teacher. Give the "
            "dataset that the labels were made of; if it is the teacher, a smaller --least-top1."
        )
    others = [one for one in ("test", "val") if one in manifest.dataset(name).splits and one != options.split]
    recipe = _describe(foreign, name, options.split, [*others, options.split][0])
    place = place_at(out)
    wanted = _identify(foreign, recipe, loader, looked, options.teacher, place)
    created, additions, own = announce(place, wanted, recipe, False)
    device = torch.device("cpu")
    capture = Capture(recipe, loader, None, device, place, created, additions, own, foreign.views.num_views)
    refuse_uneven_views(capture)
    with leases_at(place) as leases:
        leases.wait_for("import", lambda: False)
        _commit_blocks(foreign, capture, numbers, partial(leases.is_mine, "import"))
        finished = finish_if_complete(capture, leases)
    assert finished is not None  # nobody else imports meanwhile
    return finished


# ---- which image is which ------------------------------------------------------------------------------------------


def _numbers(loader: BlockLoader, keys: Sequence[str] | None) -> dict[str, int]:
    """The number of every image, by key: its place among `keys`, or in torchvision's ImageFolder.

    That has classes in the order of their names, and in each the files in that of theirs, extensions included.
    """
    if keys is None:
        found: list[tuple[str, str, str, str]] = []
        with progress("reading keys", loader.split.count, "images") as meter:
            for block in loader:
                for key, label in zip(block.keys, block.labels.tolist(), strict=True):
                    folder, _, name = key.rpartition("/")
                    of_class = folder.partition("/")[0] or loader.dataset.classes[label]
                    found.append((of_class, folder, f"{name}.", key))
                meter.advance(len(block))
        keys = [key for *_, key in sorted(found)]
    numbers = {key: number for number, key in enumerate(keys)}
    if len(numbers) < len(keys):
        raise DataError(
            f"{len(keys) - len(numbers):,} of {len(keys):,} keys come twice. Every image has a key of its own."
        )
    return numbers


def read_keys(file: Path | None) -> list[str] | None:
    """Keys, one a line; raises RecipeError for a file that cannot be read."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--keys {shorten(str(file))}: not readable ({error}). Give a text file with one key a line."
        ) from error


def _samples(block: ImageBlock, classes: Sequence[str], numbers: Mapping[str, int]) -> list[Sample]:
    if numbers and (unknown := [key for key in block.keys if key not in numbers]):
        raise DataError(
            f"{block.name}: sample '{unknown[0]}' (and {len(unknown) - 1:,} more) is not among the --keys. Write every "
            "key of the dataset there, in the other program's order."
        )
    return [
        Sample(key, classes[label], numbers.get(key, -1), (height, width))
        for key, label, (height, width) in zip(block.keys, block.labels.tolist(), block.sizes().tolist(), strict=True)
    ]


def _without_other_pixels(block: ImageBlock) -> ImageBlock:
    """A tar without the images of which other programs see other pixels; those are listed as left out."""
    seen = (seen_otherwise(encoded) for encoded in block.encoded)
    other = {row: problem for row, problem in enumerate(seen) if problem}
    if len(other) == len(block):
        raise DataError(f"{block.where}: sample '{block.keys[0]}' and all others: {other[0]}. Nothing can be imported.")
    return block.without(other) if other else block


def _look_through(foreign: Foreign, loader: BlockLoader, numbers: Mapping[str, int]) -> Looked:
    """Read the labels of all images, and compare those of some with what the images are labelled."""
    digest, right, views, seen, left_out = hashlib.sha256(), 0, 0, 0, list[str]()
    classes, every = loader.dataset.classes, max(loader.split.count // LOOKED_AT, 1)
    with progress("looking through labels", loader.split.count, "images") as meter:
        for whole in loader:
            block = _without_other_pixels(whole)
            left_out += [f"{one.key}: {one.problem}" for one in block.left_out]
            for sample, label in zip(_samples(block, classes, numbers), block.labels.tolist(), strict=True):
                content = foreign.content(sample)
                digest.update(f"{sample.key}\0{hashlib.sha256(content).hexdigest()}\n".encode())
                if seen % every == 0:
                    named = foreign.answers(content, sample, len(classes)).likeliest
                    right, views = right + int((named == label).sum()), views + len(named)
                seen += 1
            meter.advance(len(whole))
    for one in left_out[:NAMED]:
        say(f"left out: {one}")
    if left_out:
        say(f"lost: {len(left_out):,} of {loader.split.count:,} images, of which other programs see other pixels")
    return Looked(digest.hexdigest(), 100 * right / views)


# ---- what the store is about ---------------------------------------------------------------------------------------


def _describe(foreign: Foreign, dataset: str, split: str, evaluation: str) -> CaptureRecipe:
    described = {
        "name": re.sub(r"[^0-9A-Za-z_-]+", "-", f"{dataset}-{foreign.name}")[:100],
        "data": {"dataset": dataset, "train": split, "evaluation": evaluation, "normalisation": OF_IMAGENET},
        "teacher": {"model": f"imported from {foreign.name}", "normalisation": OF_IMAGENET},
        "views": foreign.views,
        "capture": {"codec": {"name": "topk", "k": foreign.k, "tail_temperature": foreign.temperature}},
    }
    return parse(CaptureRecipe, described, where=foreign.where)


def _identify(
    foreign: Foreign, recipe: CaptureRecipe, loader: BlockLoader, looked: Looked, teacher: str, place: Place
) -> StoreIdentity:
    views_per_group = read_identity(place)[1].views_per_group if place.size("store.json") is not None else None
    classes, rows_per_block = loader.dataset.classes, max(tar.count for tar in loader.split.tars)
    if not foreign.k < len(classes) <= MAX_IDS:
        raise DataError(
            f"{foreign.where}: has the {foreign.k} likeliest classes, the dataset {len(classes):,} classes; a store "
            f"takes fewer than there are, of up to {MAX_IDS:,}. Give the dataset that the labels were made of."
        )
    model = recipe.teacher.model
    assert model is not None
    assert not isinstance(recipe.capture.codec, str)
    return StoreIdentity(
        schema_version=SCHEMA_VERSION,
        name=recipe.name,
        dataset=describe_dataset(recipe, loader, loader[0]),
        teacher=TeacherIdentity(
            name=teacher or foreign.teacher or f"unknown, of {foreign.name}",
            model=model,
            model_args={},
            weights_sha256=looked.sha256,
            normalisation=OF_IMAGENET,
            crop=foreign.views.evaluation_crop,
            dtype="float32",
            evaluated_on=f"{recipe.data.dataset}/{recipe.data.train}",
            measured_top1=looked.top1,
            licence="",
            imported=Imported(format=foreign.name, evaluation=recipe.data.evaluation, lost=foreign.lost),
        ),
        views=recipe.views,
        codec=_codec(foreign),
        rows_per_block=rows_per_block,
        views_per_group=plan_views_per_group(
            recipe.views, rows_per_block=rows_per_block, num_classes=len(classes), requested=views_per_group
        ),
        versions=software_versions(),
    )


def _codec(foreign: Foreign) -> TopK:
    return TopK.model_validate({"name": "topk", "k": foreign.k, "tail_temperature": foreign.temperature})


def topk_of(codec: TopK, answers: Sequence[Answers], num_classes: int) -> Arrays:
    """The arrays `[n, v, ...]` of the codec for the answers about n images, without logits of all classes.

    A logit is the temperature times the logarithm of the probability: it lacks an offset that is the same for all
    classes of a view, which KD does not see. What the likeliest classes leave is shared evenly by all others.
    """
    probabilities = np.stack([one.probabilities for one in answers]).clip(LEAST, 1)
    ids = np.stack([one.ids for one in answers])
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ids, probabilities = (np.take_along_axis(one, order, axis=-1) for one in (ids, probabilities))
    others, t = num_classes - codec.k, codec.tail_temperature
    rest = (1 - probabilities.sum(axis=-1, keepdims=True)).clip(LEAST * others, 1)
    each = t * np.log(rest / others)  # logit of every class outside the likeliest
    return {
        "top_id": ids.astype(np.uint16),
        "top_value": as_float16((t * np.log(probabilities)).astype(np.float32)),
        "rest": (each / np.array(TAIL_TEMPERATURES) + np.log(others)).astype(np.float32),
    }


# ---- committing ----------------------------------------------------------------------------------------------------


def _commit_blocks(foreign: Foreign, capture: Capture, numbers: Mapping[str, int], still_mine: partial[bool]) -> None:
    place, groups = capture.place, capture.groups
    with progress("importing", capture.loader.split.count, "images") as meter:
        for number, tar in enumerate(capture.loader.split.tars):
            is_there = [place.size(f"ledger/{ledger_name(number, views)}") is not None for views in groups]
            if not all(is_there):
                _commit_block(foreign, capture, number, numbers, [not one for one in is_there], still_mine)
            meter.advance(tar.count)


def _commit_block(
    foreign: Foreign,
    capture: Capture,
    number: int,
    numbers: Mapping[str, int],
    is_open: Sequence[bool],
    still_mine: partial[bool],
) -> None:
    """The view groups of a tar that are open, and which are not committed unless all of the tar's labels are right."""
    identity, part = capture.identity_of(""), parts_of(capture.created, [])[""]
    block = _without_other_pixels(capture.loader[number])
    rows, classes = row_arrays(identity, block), capture.loader.dataset.classes
    answers = [
        foreign.answers(foreign.content(sample), sample, len(classes)) for sample in _samples(block, classes, numbers)
    ]
    logits = {f"logits/{name}": array for name, array in topk_of(_codec(foreign), answers, len(classes)).items()}
    parameters: dict[str, NDArray[np.generic]] = {
        name: np.stack([one.parameters[name] for one in answers]) for name in identity.views.arrays()
    }
    for group, views in enumerate(capture.groups):
        if not is_open[group]:
            continue
        some = slice(views.start, views.stop)
        of_group = {name: array[:, some] for name, array in parameters.items()}
        arrays = {
            **rows,
            **{f"view/{name}": array for name, array in of_group.items()},
            **probes(identity, block, of_group, number, group),
            **{name: array[:, some] for name, array in logits.items()},
        }
        entry = LedgerEntry(
            block=number,
            first_view=views.start,
            end_view=views.stop,
            rows=len(block),
            tar=block.name,
            tar_sha256=block.sha256,
            left_out={one.key: one.problem for one in block.left_out},
            objects={},
        )
        commit(capture.place, part, group, entry, arrays, still_mine)
