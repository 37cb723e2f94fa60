"""A page about one sample of a store: its views, what the teacher said, and the template map over the image."""

import colorsys
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from offline_kd.data.blocks import Decoder, ImageBlock, OnBadImage, load_block
from offline_kd.data.fetching import Root
from offline_kd.data.label_sets import names_in
from offline_kd.data.labels import UNLABELLED, labels_of
from offline_kd.data.manifest import locate
from offline_kd.data.packing import encode_png
from offline_kd.data.tars import hash_key
from offline_kd.store.decisions import TemplateDecisions, unpack_probs
from offline_kd.store.join import as_stored, join
from offline_kd.store.logit_reading import logits_decoder
from offline_kd.store.lookup import features_of
from offline_kd.store.reader import Arrays, Store
from offline_kd.store.rows import Rows, StoredSignal
from offline_kd.store.schema import StoreIdentity
from offline_kd.support.errors import DataError
from offline_kd.support.pages import data_url, render_page
from offline_kd.views.choice import Choice, side_by_side
from offline_kd.views.mixing import WHOLE
from offline_kd.views.operations import operation_name
from offline_kd.views.render import plain_images, render_some

MAX_VIEWS, MAX_TEMPLATES = 8, 12
MAX_EXACT = 64  # side in pixels of pictures that are shown pixel by pixel
CELLS_ACROSS_PATCH = 3


def write_inspect_page(store: Store, key: str, folders: Sequence[Root], file: Path) -> None:
    """Write the page; raises DataError when the store does not know the key.

    Args:
        folders: where the dataset's tars are looked for.
    """
    hashes, rows = store.row_index
    place = int(np.searchsorted(hashes, np.uint64(hash_key(key))))
    if place == len(hashes) or hashes[place] != hash_key(key):
        raise DataError(f"{store.place}: holds no sample '{key}'. Keys look like '{_some_key(store, folders)}'.")
    number, row = divmod(int(rows[place]), store.identity.rows_per_block)
    pages = sample_pages(SampleImages(store, folders), number, [row])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(next(pages)[1], encoding="utf-8")


def sample_pages(images: "SampleImages", number: int, rows: Sequence[int], back: str = "") -> Iterator[tuple[int, str]]:
    """Rows of a block and the page of each, one after the other: the block is joined once for all of them.

    Args:
        back: the page that these belong to. Those have no training patches of templates, which lie in many tars.

    Raises what `join` does, and DataError when the images of the block are not there.
    """
    identity, block = images.store.identity, images.block(number)
    maps = [name for name, one in identity.decisions.items() if isinstance(one.config, TemplateDecisions)]
    held = images.store.manifest.held if images.store.manifest else None
    maps = [name for name in maps if held is None or held.has("decisions/")]
    shown = [(group, view) for group, stored in enumerate(identity.groups) for view in stored][:MAX_VIEWS]
    views = [_read_view(images, number, np.array(rows), group, view, maps) for group, view in shown]
    store_rows = number * identity.rows_per_block + np.array(rows)
    names = identity.features if held is None or held.has("features/") else {}
    features = {name: features_of(images.store, name, store_rows, [view for _, view in shown]) for name in names}
    for index, row in enumerate(rows):
        used: dict[str, list[int]] = {name: [] for name in maps}
        choice = side_by_side([view.joined.view.take(np.array([index])) for view in views])
        pixels = render_some(block, choice, identity.views, images.store.created.seen_size[0]).transpose(0, 2, 3, 1)
        named = _labels(block, row, identity)
        yield (
            row,
            render_page(
                "sample",
                title=block.keys[row] + (f": {named}" if named else ""),
                about=f"Sample {block.keys[row]} of {identity.dataset.name}/{identity.dataset.split}, block {number}, "
                f"row {row}; teacher {identity.teacher.name}; store {identity.name}",
                digest=f"sha256:{images.store.digest[:16]}",
                back=back,
                views=[
                    _shown(images, block, view, index, pixels[at], used)
                    | {"features": [_beside_first(name, one[index], at) for name, one in features.items()]}
                    for at, view in enumerate(views)
                ],
                maps=[] if back else [_templates(images.store, name, used[name], images) for name in maps],
            ),
        )


class SampleImages:
    """The tars that the store was made from, decoded when needed."""

    def __init__(self, store: Store, folders: Sequence[Root]) -> None:
        self.store, self.folders = store, folders
        self.decode = logits_decoder(store, torch.device("cpu"))
        self.blocks: dict[int, ImageBlock] = {}

    def block(self, number: int) -> ImageBlock:
        """Of the store's rows; raises DataError when the tar is not there, or another one."""
        if number not in self.blocks:
            tar = self.store.identity.dataset.tars[number]
            path = locate(tar.file, self.folders)
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

    def plain(self, number: int, row: int) -> NDArray[np.uint8]:
        """The image of a row of a block, `[H, W, 3]`; raises DataError for one that cannot be decoded."""
        block = self.block(number)
        if block.pixels is not None:
            return block.pixels[row].permute(1, 2, 0).numpy()
        pixels = Decoder(replace(block, on_bad="fail"))(row)
        assert pixels is not None, "it raises"
        return pixels


def _some_key(store: Store, folders: Sequence[Root]) -> str:
    return SampleImages(store, folders).block(0).keys[0]


@dataclass(frozen=True)
class _View:
    """One view of some rows of a block."""

    view: int
    joined: Rows
    arrays: Arrays  # of the template maps, of the same rows


def _read_view(
    images: SampleImages, number: int, rows: NDArray[np.int64], group: int, view: int, maps: Sequence[str]
) -> _View:
    store, block = images.store, images.block(number)
    position = view - store.identity.groups[group].start
    wanted = [f"decisions/{name}/id" for name in maps]
    wanted += [f"decisions/{name}/prob" for name in maps if _top(store, name) > 1]
    arrays: Arrays = {name: array[rows, position] for name, array in store.read(number, group, wanted).items()}
    joined = join(store, block, group, np.zeros(len(block), dtype=np.int64) + position)
    return _View(view, joined.take(rows), arrays)


def _shown(
    images: SampleImages,
    block: ImageBlock,
    view: _View,
    index: int,
    pixels: NDArray[np.uint8],
    used: dict[str, list[int]],
) -> dict[str, object]:
    """What the page shows of a view of a row; adds the templates in its maps to `used`, by name of the decisions."""
    store, identity = images.store, images.store.identity
    pictures = [_img(pixels, f"view {view.view}")]
    for name, templates in used.items():
        ids = view.arrays[f"decisions/{name}/id"][index][..., 0].astype(np.int64)
        templates += ids.flatten().tolist()
        certainty = np.ones(ids.shape)
        if _top(store, name) > 1:
            prob = view.arrays[f"decisions/{name}/prob"][index][..., 0].astype(np.int64)
            certainty = unpack_probs(torch.from_numpy(prob)).numpy()
        pictures.append(_img(_overlay(pixels, ids, certainty), f"templates of {name} over view {view.view}"))
    return {
        "pictures": pictures,
        "caption": f"view {view.view}: {_describe(view.joined.view.take(np.array([index])), block, identity)}",
        "likeliest": _likeliest(images, view.joined.signal[0], index),
    }


def _likeliest(images: SampleImages, signal: StoredSignal, index: int) -> list[tuple[str, str]]:
    """The five likeliest classes of a row and their percents; none of a teacher without classes."""
    if not images.store.has_logits:
        return []
    (logits,) = images.decode(signal.map(lambda array: array[index : index + 1]))
    identity = images.store.identity
    probabilities = logits.sigmoid() if identity.teacher.kind == "multilabel" else logits.softmax(dim=0)
    values, indices = (part.tolist() for part in probabilities.topk(min(5, len(probabilities))))
    classes = identity.dataset.classes
    return [(classes[index], f"{100 * probability:.1f}") for probability, index in zip(values, indices, strict=True)]


def _beside_first(name: str, features: Tensor, at: int) -> str:
    """Features `[v, ...]` of one view of a sample beside those of the first, in words."""
    first, own = features[0].flatten(), features[at].flatten()
    cosine = "" if at == 0 else f", cosine to the first view {torch.cosine_similarity(first, own, dim=0):.3f}"
    return f"{name}: length {own.norm():.3g}{cosine}"


def _labels(block: ImageBlock, row: int, identity: StoreIdentity) -> str:
    """The names of the classes of a sample; '' where it has no label."""
    classes = identity.dataset.classes
    if block.labels.ndim == 2:
        return ", ".join(names_in(block.labels[row], classes)) or "no class"
    return "" if block.labels[row] == UNLABELLED else classes[block.labels[row]]


def _describe(choice: Choice, block: ImageBlock, identity: StoreIdentity) -> str:
    own = {name: array[0] for name, array in choice.own.items()}
    top, left, height, width = own["box"].tolist()
    said = [f"{width} x {height} at {left}, {top}", *(["mirrored"] if own["flip"] else [])]
    for op, magnitude in zip(own.get("op", ()), own.get("magnitude", ()), strict=True):
        if operation_name(op) != "identity":
            said.append(f"{operation_name(op)} {magnitude:.2f}")
    if "erase" in own and own["erase"][2]:
        said.append("erased")
    if choice.partner_row[0] >= 0:
        how, share = "covered by" if own["mix_box"][2] else "blended with", own["share"] / WHOLE
        row, other = int(choice.row[0]), int(choice.partner_row[0])
        names = [_labels(block, one, identity) for one in (row, other)]
        if any(names):
            said.append(f"{share:.0%} {names[0]}, {1 - share:.0%} {names[1]}: {how} {block.keys[other]}")
        else:
            said.append(f"{1 - share:.0%} {how} {block.keys[other]}")
    return ", ".join(said)


def _top(store: Store, name: str) -> int:
    config = store.identity.decisions[name].config
    assert isinstance(config, TemplateDecisions)
    return config.top


def _templates(store: Store, name: str, used: list[int], images: SampleImages) -> dict[str, object]:
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
    pixels = np.ascontiguousarray(pixels)
    if max(pixels.shape[:2]) <= MAX_EXACT:
        return alt, data_url(encode_png(pixels), "image/png")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=88)  # a tenth of the bytes
    return alt, data_url(buffer.getvalue(), "image/jpeg")
