"""A page about one sample of a store: its views, what the teacher said, and the template map over the image."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offline_kd.data.blocks import ImageBlock, OnBadImage, load_block
from offline_kd.data.labels import UNLABELLED, labels_of
from offline_kd.data.manifest import locate
from offline_kd.data.packing import encode_png
from offline_kd.data.tars import hash_key
from offline_kd.store.decisions import TemplateDecisions, unpack_probs
from offline_kd.store.join import as_stored, codec_tables_on, join
from offline_kd.store.reader import Arrays, Store
from offline_kd.support.errors import DataError
from offline_kd.support.pages import data_url, render_page
from offline_kd.views.choice import Choice
from offline_kd.views.mixing import WHOLE
from offline_kd.views.operations import operation_name
from offline_kd.views.render import plain_images, render_some

MAX_VIEWS, MAX_TEMPLATES = 8, 12
CELLS_ACROSS_PATCH = 3


def write_inspect_page(store: Store, key: str, folder: str, roots: Sequence[Path], file: Path) -> None:
    """Write the page; raises DataError when the store does not know the key.

    Args:
        folder: of the dataset's tars, below one of the data `roots`.
    """
    hashes, rows = store.row_index
    place = int(np.searchsorted(hashes, np.uint64(hash_key(key))))
    if place == len(hashes) or hashes[place] != hash_key(key):
        raise DataError(f"{store.place}: holds no sample '{key}'. Keys look like '{_some_key(store, folder, roots)}'.")
    identity = store.identity
    number, row = divmod(int(rows[place]), identity.rows_per_block)
    images = _Images(store, folder, roots)
    block = images.block(number)
    classes = identity.dataset.classes
    maps = [name for name, one in identity.decisions.items() if isinstance(one.config, TemplateDecisions)]
    used: dict[str, list[int]] = {name: [] for name in maps}
    shown = [(group, view) for group, stored in enumerate(identity.groups) for view in stored][:MAX_VIEWS]
    views = [_view(images, number, row, group, view, used) for group, view in shown]
    page = render_page(
        "sample",
        title=key if block.labels[row] == UNLABELLED else f"{key}: {classes[block.labels[row]]}",
        about=f"Sample {key} of {identity.dataset.name}/{identity.dataset.split}, block {number}, row {row}; "
        f"teacher {identity.teacher.name}; store {identity.name}",
        digest=f"sha256:{store.digest[:16]}",
        views=views,
        maps=[_templates(store, name, used[name], images) for name in maps],
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


class _Images:
    """The tars that the store was made from, decoded when needed."""

    def __init__(self, store: Store, folder: str, roots: Sequence[Path]) -> None:
        self.store, self.folder, self.roots = store, folder, roots
        self.blocks: dict[int, ImageBlock] = {}

    def block(self, number: int) -> ImageBlock:
        if number not in self.blocks:
            tar = self.store.identity.dataset.tars[number]
            path = locate(f"{self.folder}/{tar.file}", self.roots)
            identity = self.store.identity
            on_bad: OnBadImage = "skip" if self.store.entry("", number, 0).left_out else "fail"
            block = load_block(
                path,
                tar,
                identity.num_classes,
                decode=identity.views.is_exact,
                on_bad=on_bad,
                labels=labels_of(identity.dataset.labels, identity.dataset.classes),
            )
            self.blocks[number] = as_stored(self.store, block)
        return self.blocks[number]


def _some_key(store: Store, folder: str, roots: Sequence[Path]) -> str:
    return _Images(store, folder, roots).block(0).keys[0]


def _view(
    images: _Images, number: int, row: int, group: int, view: int, used: dict[str, list[int]]
) -> dict[str, object]:
    """What the page shows of a view; adds the templates in its maps to `used`, by name of the decisions."""
    store, block = images.store, images.block(number)
    identity = store.identity
    position = view - identity.groups[group].start
    wanted = [f"decisions/{name}/id" for name in used]
    wanted += [f"decisions/{name}/prob" for name in used if _top(store, name) > 1]
    arrays: Arrays = {name: array[row, position] for name, array in store.read(number, group, wanted).items()}
    at = np.zeros(len(block), dtype=np.int64) + position
    joined = join(store, block, group, at)
    choice = joined.view.take(np.array([row]))
    pixels = render_some(block, choice, identity.views, store.created.seen_size[0])[0].transpose(1, 2, 0)
    pictures = [_img(pixels, f"view {view}")]
    for name, templates in used.items():
        ids = arrays[f"decisions/{name}/id"][..., 0].astype(np.int64)
        templates += ids.flatten().tolist()
        certainty = np.ones(ids.shape)
        if _top(store, name) > 1:
            certainty = unpack_probs(
                torch.from_numpy(arrays[f"decisions/{name}/prob"][..., 0].astype(np.int64))
            ).numpy()
        pictures.append(_img(_overlay(pixels, ids, certainty), f"templates of {name} over view {view}"))
    logits = identity.codec.decode(
        {name: array[row] for name, array in (joined.signal[0].logits or {}).items()},
        identity.num_classes,
        codec_tables_on(store, torch.device("cpu")),
    )
    probabilities = logits.softmax(dim=0)
    values, indices = (part.tolist() for part in probabilities.topk(min(5, len(logits))))
    return {
        "pictures": pictures,
        "caption": f"view {view}: {_describe(choice, block)}",
        "likeliest": [
            (identity.dataset.classes[index], f"{100 * probability:.1f}")
            for probability, index in zip(values, indices, strict=True)
        ],
    }


def _describe(choice: Choice, block: ImageBlock) -> str:
    own = {name: array[0] for name, array in choice.own.items()}
    top, left, height, width = own["box"].tolist()
    said = [f"{width} x {height} at {left}, {top}", *(["mirrored"] if own["flip"] else [])]
    for op, magnitude in zip(own.get("op", ()), own.get("magnitude", ()), strict=True):
        if operation_name(op) != "identity":
            said.append(f"{operation_name(op)} {magnitude:.2f}")
    if "erase" in own and own["erase"][2]:
        said.append("erased")
    if choice.partner_row[0] >= 0:
        how = "covered by" if own["mix_box"][2] else "blended with"
        said.append(f"{1 - own['share'] / WHOLE:.0%} {how} {block.keys[choice.partner_row[0]]}")
    return ", ".join(said)


def _top(store: Store, name: str) -> int:
    config = store.identity.decisions[name].config
    assert isinstance(config, TemplateDecisions)
    return config.top


def _templates(store: Store, name: str, used: list[int], images: _Images) -> dict[str, object]:
    """The templates that these views show most, with the training patches nearest to each."""
    tables = store.read_tables(name)
    about = store.identity.decisions[name]
    ids, counts = np.unique(used, return_counts=True)
    lines = []
    for template in ids[counts.argsort()[::-1]][:MAX_TEMPLATES].tolist():
        patches = []
        for row, place in zip(
            tables["nearest_row"][template].tolist(), tables["nearest_place"][template].tolist(), strict=True
        ):
            if row < 0:
                continue
            number, inside = divmod(row, store.identity.rows_per_block)
            plain, _ = plain_images(images.block(number), store.created.teacher.crop, inside, inside + 1)
            image = plain[0].permute(1, 2, 0).numpy()
            patches.append(_img(_patch(image, place, about.height, about.width), f"row {row}"))
        vectors = int(tables["count"][template])
        colour = "rgb" + str(_colour(template))
        lines.append({"colour": colour, "number": template, "patches": patches, "vectors": f"{vectors:,}"})
    return {
        "name": name,
        "module": about.config.module,
        "count": f"{len(tables['count']):,}",
        "grid": f"{about.height} x {about.width}",
        "templates": lines,
    }


def _overlay(pixels: NDArray[np.uint8], ids: NDArray[np.int64], certainty: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The template map over a greyed view: `[H, W, 3]`."""
    height, width = pixels.shape[:2]
    rows, columns = np.arange(height) * ids.shape[0] // height, np.arange(width) * ids.shape[1] // width
    colours = np.array([_colour(int(template)) for template in ids.flatten()]).reshape(*ids.shape, 3)
    strength = (0.25 + 0.4 * certainty)[rows][:, columns][..., None]
    grey = pixels.mean(axis=2, keepdims=True)
    mixed = (1 - strength) * grey + strength * colours[rows][:, columns]
    return mixed.astype(np.uint8)


def _patch(image: NDArray[np.uint8], place: int, grid_height: int, grid_width: int) -> NDArray[np.uint8]:
    """The part of an image around a place of the grid: CELLS_ACROSS_PATCH cells each way, moved inside the image."""
    sides = []
    for index, size, cells in zip(divmod(place, grid_width), image.shape[:2], (grid_height, grid_width), strict=True):
        length = min(max(size * CELLS_ACROSS_PATCH // cells, 1), size)
        start = round((index + 0.5) * size / cells - length / 2)
        start = min(max(start, 0), size - length)
        sides.append(slice(start, start + length))
    return image[sides[0], sides[1]]


def _colour(template: int) -> tuple[int, int, int]:
    """A colour of its own for every template: hues a golden angle apart, in three lightnesses."""
    red, green, blue = colorsys.hls_to_rgb((template * 0.61803398875) % 1, (0.42, 0.55, 0.68)[template % 3], 0.75)
    return int(255 * red), int(255 * green), int(255 * blue)


def _img(pixels: NDArray[np.uint8], alt: str) -> tuple[str, str]:
    """What the picture shows, and its address."""
    return alt, data_url(encode_png(np.ascontiguousarray(pixels)), "image/png")
