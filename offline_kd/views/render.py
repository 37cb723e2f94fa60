"""Pixels of views: exact copies in batches on the device, or crops that are resampled, one image after the other.

The same functions serve both stages, on the same stored parameters. Exact copies are the same on every machine.
Resampled views are the same as long as torch, torchvision, Pillow and its codecs are; where they are others, the probes
of a store tell by how much pixels differ, before training.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor
from torch.nn import functional as F

from offline_kd.data.blocks import Decoder, ImageBlock
from offline_kd.data.decoding import SCALES
from offline_kd.data.manifest import EvaluationCrop, Interpolation
from offline_kd.views.choice import Choice, choose
from offline_kd.views.erase import erase_box
from offline_kd.views.kind import Outside, Parameters, ViewSpec
from offline_kd.views.mixing import PARTNERS, drop_bad_partners, mix_in
from offline_kd.views.operations import apply_op, operation_name

Pixels = NDArray[np.uint8]


def render(images: Tensor, box: Tensor, flip: Tensor, size: tuple[int, int], fill: Outside) -> Tensor:
    """Cut one view out of every image, on the images' device; exact, since no resampling takes place.

    Args:
        images: `[B, 3, H, W]` uint8.
        box: `[B, 4]` integer top, left, height, width; all of one height and one width.
        flip: `[B]`, nonzero where the view is mirrored.
        size: height and width of all boxes: read off a device they would have to be waited for (`size_of_boxes`).
        fill: what pixels outside the image are: 0, or the image mirrored at its edge (the edge not repeated).

    Returns:
        `[B, 3, height, width]` uint8.
    """
    box = box.long()
    height, width = size
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device).expand(len(images), width)
    across = torch.where(flip.bool()[:, None], width - 1 - across, across)
    rows, rows_inside = _into_image(box[:, 0:1] + down, images.shape[2], fill)  # [B, height]
    columns, columns_inside = _into_image(box[:, 1:2] + across, images.shape[3], fill)  # [B, width]
    source = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)  # [B, height * width]
    pixels = images.flatten(2).gather(2, source[:, None].expand(-1, 3, -1))
    if fill == "zeros":
        inside = (rows_inside[:, :, None] & columns_inside[:, None, :]).flatten(1)
        pixels = pixels * inside[:, None]
    return pixels.view(len(images), 3, height, width)


def size_of_boxes(box: NDArray[np.integer]) -> tuple[int, int]:
    """Height and width of views `[..., 4]` of one size, at least one of them, where they lie on the host."""
    height, width = box.reshape(-1, 4)[0, 2:].tolist()
    return height, width


def _into_image(index: Tensor, size: int, fill: Outside) -> tuple[Tensor, Tensor]:
    """Legal indices, and where the given ones were legal already."""
    inside = (index >= 0) & (index < size)
    if fill == "reflect":
        return (size - 1) - ((size - 1) - index.abs()).abs(), inside
    return index.clamp(0, size - 1), inside


def decoder_versions() -> dict[str, str]:
    """Of the libraries that decode images; beside torch, torchvision and Pillow, what resampled pixels depend on."""
    known = {"libjpeg": "jpg", "libjpeg_turbo": "libjpeg_turbo", "libwebp": "webp", "zlib": "zlib"}
    found = {name: features.version(feature) for name, feature in known.items()}
    return {name: value for name, value in found.items() if value}


# ---- resampled -----------------------------------------------------------------------------------------------------


def evaluation_crop(pixels: Pixels, crop: EvaluationCrop) -> Pixels:
    """`[3, size, size]`: the short side to `resize`, the middle cut out; as torchvision's Resize and CenterCrop."""
    # Imported when it is needed: it takes as long as torch itself, and most commands never get here.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    interpolation = InterpolationMode(crop.interpolation)
    resized = TF.resize(Image.fromarray(pixels), [crop.resize], interpolation=interpolation)
    return np.asarray(TF.center_crop(resized, [crop.size, crop.size])).transpose(2, 0, 1)


def decoding_scales(views: ViewSpec, box: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    """`[...]`: at 1/scale JPEGs are decoded for crops `[..., 4]`, in pixels of the file, that become `size` x `size`.

    1, unless the views say that decoding is scaled: then the largest of 8, 4 and 2 that leaves both sides of a crop at
    least `size` pixels. A function of the view alone, so that both stages do the same.
    """
    side = box[..., 2:].min(axis=-1)
    scales = np.ones(side.shape, dtype=np.int64)
    if views.decoding_used == "scaled":
        for scale in sorted(SCALES):
            scales[side >= scale * size] = scale
    return scales


def decode_for(
    decoder: Decoder, choice: Choice, views: ViewSpec, size: int, threads: ThreadPoolExecutor | None = None
) -> None:
    """Decode what some views need, those that are mixed in as well; the decoder keeps it."""
    mixed = choice.partner_row >= 0
    own, partner = (decoding_scales(views, one["box"], size) for one in (choice.own, choice.partner))
    _decode(decoder, np.append(choice.row, choice.partner_row[mixed]), np.append(own, partner[mixed]), threads)


def _decode(
    decoder: Decoder, row: NDArray[np.int64], scale: NDArray[np.int64], threads: ThreadPoolExecutor | None
) -> None:
    """Each row at its scale, once."""
    needed = sorted(set(zip(row.tolist(), scale.tolist(), strict=True)))
    list((threads.map if threads else map)(lambda one: decoder.scaled(*one), needed))


def render_view(pixels: Pixels, view: Parameters, size: int, interpolation: Interpolation) -> Pixels:
    """`[3, size, size]` of one view of an RGB image, without what is mixed in.

    Args:
        pixels: `[H, W, 3]`, the decoded image.
        view: its parameters, each without the axes of row and view; the box in these pixels, where it may begin and
            end between two of them.
    """
    cut = _resized(pixels, view["box"], size, interpolation)
    if view["flip"]:
        cut = _mirrored(cut)
    drawn = zip(view.get("op", ()), view.get("magnitude", ()), strict=True)
    ops = [(operation_name(int(op)), float(magnitude)) for op, magnitude in drawn]
    if any(op != "identity" for op, _ in ops):
        image = Image.fromarray(np.ascontiguousarray(cut))
        for op, magnitude in ops:
            image = apply_op(image, op, magnitude)
        cut = np.asarray(image)
    return cut.transpose(2, 0, 1)


def _resized(pixels: Pixels, box: NDArray[Any], size: int, interpolation: Interpolation) -> Pixels:
    """`[size, size, 3]` of a box of an image."""
    top, left, height, width = box.tolist()
    first_row, first_column = math.floor(top), math.floor(left)
    rows, columns = math.ceil(top + height) - first_row, math.ceil(left + width) - first_column
    cut = _cut(pixels, first_row, first_column, rows, columns)
    if (rows, columns) != (height, width):
        # Between pixels, which only Pillow can.
        top, left = top - first_row, left - first_column
        method = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
        inside = (left, top, left + width, top + height)
        return np.asarray(Image.fromarray(np.ascontiguousarray(cut)).resize((size, size), method, inside))
    if (rows, columns) == (size, size):
        return cut
    # Of whole numbers, and the same with any instruction set; about five times as fast as Pillow's. The cut is not
    # copied: with its strides torch reads and writes channels last.
    planes = torch.from_numpy(cut)[None].permute(0, 3, 1, 2)
    return F.interpolate(planes, (size, size), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def _cut(pixels: Pixels, top: int, left: int, height: int, width: int) -> Pixels:
    """A box of an image, black outside of it; where it lies inside, a view of the image's memory."""
    bottom, right = top + height, left + width
    if top >= 0 and left >= 0 and bottom <= pixels.shape[0] and right <= pixels.shape[1]:
        return pixels[top:bottom, left:right]
    padded = np.zeros((height, width, 3), dtype=np.uint8)
    inside = pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    down, across = max(-top, 0), max(-left, 0)
    padded[down : down + inside.shape[0], across : across + inside.shape[1]] = inside
    return padded


def _mirrored(pixels: Pixels) -> Pixels:
    """Left and right exchanged; plane by plane, which numpy does four times as fast as all at once."""
    mirrored = np.empty_like(pixels)
    for channel in range(3):
        mirrored[..., channel] = pixels[:, ::-1, channel]
    return mirrored


def render_choice(
    decoder: Decoder,
    choice: Choice,
    views: ViewSpec,
    size: int,
    threads: ThreadPoolExecutor | None = None,
    out: Pixels | None = None,
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Pixels of one view of each of m rows: `[m, 3, size, size]` uint8.

    And `[m]` whether it could be rendered: not when an image, or the one that is mixed in, cannot be decoded.

    Args:
        out: where the pixels shall go.
    """
    interpolation = views.interpolation_used
    assert interpolation is not None  # else pixels are copied, by `render`
    # Channels lie last in memory, as in Pillow's images and as networks like them best.
    pixels = np.zeros((len(choice.row), size, size, 3), np.uint8).transpose(0, 3, 1, 2) if out is None else out
    good = np.ones(len(choice.row), dtype=bool)
    run = threads.map if threads else map
    decode_for(decoder, choice, views, size, threads)

    def base(row: int, parameters: Parameters, index: int) -> Pixels | None:
        view = {name: array[index] for name, array in parameters.items()}
        image = decoder.scaled(row, int(decoding_scales(views, view["box"], size)))
        if image is None:
            return None
        one = render_view(image.pixels, view | {"box": image.box(view["box"])}, size, interpolation)
        if "erase" in view and view["erase"][2] and view["erase"][3]:
            one = one.copy()
            erase_box(one, view["erase"], views.erased)
        return one

    def one_row(index: int) -> None:
        one, partner = base(int(choice.row[index]), choice.own, index), int(choice.partner_row[index])
        other = base(partner, choice.partner, index) if partner >= 0 else None
        if one is None or (partner >= 0 and other is None):
            good[index] = False
            return
        pixels[index] = one
        if other is not None:
            mix_in(pixels[index], other, choice.own["mix_box"][index], int(choice.own["share"][index]))

    list(run(one_row, range(len(choice.row))))
    return torch.from_numpy(pixels), good


def view_batches(
    block: ImageBlock,
    decoder: Decoder,
    parameters: Parameters,
    views: ViewSpec,
    size: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Tensor]]:
    """Row `[m]`, view `[m]` and pixels `[m, 3, H, W]` of all views of all images of a block, in that order.

    Rows that cannot be decoded are left out and listed in `decoder.bad`; nothing is mixed with them, which
    `parameters` say afterwards, too. On a GPU the pixels are where they belong as far as its current stream knows.

    Args:
        parameters: `[n, v, ...]`, as `draw` gives them.
        size: of the views, where they are resampled.
    """
    count, num_views = parameters["flip"].shape
    if views.is_exact:
        images = block.images.to(device)
        box, flip = (torch.from_numpy(parameters[name]).to(device) for name in ("box", "flip"))
        for start in range(0, count * num_views, batch_size):
            row, view = np.divmod(np.arange(start, min(start + batch_size, count * num_views)), num_views)
            at = sent(torch.from_numpy(row), device), sent(torch.from_numpy(view), device)
            yield row, view, render(images[at[0]], box[at], flip[at], size_of_boxes(parameters["box"]), views.outside)
        return
    # So many images are held decoded: those that may be mixed with each other, or more where batches are larger.
    together, pinned = PARTNERS * -(-batch_size // (PARTNERS * num_views)), device.type == "cuda"
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for first in range(0, count, together):
            window = np.arange(first, min(first + together, count))
            row, view = (part.ravel() for part in np.meshgrid(window, np.arange(num_views), indexing="ij"))
            _decode(decoder, row, decoding_scales(views, parameters["box"][row, view], size), threads)
            drop_bad_partners(parameters, decoder.bad)
            decodable = ~np.isin(row, list(decoder.bad))
            row, view = row[decodable], view[decodable]
            for start in range(0, len(row), batch_size):
                part = slice(start, start + batch_size)
                choice = choose(parameters, row[part], view[part])
                memory = torch.empty((len(choice.row), size, size, 3), dtype=torch.uint8, pin_memory=pinned)
                pixels = memory.permute(0, 3, 1, 2)
                render_choice(decoder, choice, views, size, threads, pixels.numpy())
                yield row[part], view[part], pixels.to(device, non_blocking=True)
            decoder.forget()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on a device; on its way to a GPU, for which nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def render_some(
    block: ImageBlock, choice: Choice, views: ViewSpec, size: int, threads: ThreadPoolExecutor | None = None
) -> Pixels:
    """Pixels of a few chosen views, `[m, 3, H, W]` uint8; raises DataError for what cannot be decoded."""
    if views.is_exact:
        box, flip = (torch.from_numpy(choice.own[name]) for name in ("box", "flip"))
        images = block.images[torch.from_numpy(choice.row)]
        return render(images, box, flip, size_of_boxes(choice.own["box"]), views.outside).numpy()
    return render_choice(Decoder(replace(block, on_bad="fail")), choice, views, size, threads)[0].numpy()


def plain_images(
    block: ImageBlock, crop: EvaluationCrop | None, start: int, stop: int, threads: ThreadPoolExecutor | None = None
) -> tuple[Tensor, list[int]]:
    """Some images of a block without augmentation, as a network takes them, `[m, 3, H, W]` uint8, and their rows.

    Args:
        crop: for images of different sizes; None: all have one size, and are taken as they are.
    """
    stop = min(stop, len(block))
    if crop is None:
        return block.images[start:stop], list(range(start, stop))
    decoder = Decoder(block)

    def one(row: int) -> Pixels | None:
        image = decoder(row)
        return None if image is None else evaluation_crop(image, crop)

    found = list((threads.map if threads else map)(one, range(start, stop)))
    rows = [row for row, pixels in zip(range(start, stop), found, strict=True) if pixels is not None]
    kept = [pixels for pixels in found if pixels is not None]
    return torch.from_numpy(np.stack(kept) if kept else np.empty((0, 3, crop.size, crop.size), np.uint8)), rows
