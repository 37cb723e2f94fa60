"""Pixels of views: exact copies in batches on the device, or crops that are resampled, one image after the other.

The same functions serve both stages, on the same stored parameters. Exact copies are the same on every machine.
Resampled views are the same as long as torch, torchvision, Pillow and its codecs are; where they are others, the probes
of a store tell by how much pixels differ, before training.
"""

import functools
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, features
from torch import Tensor
from torch.nn import functional as F

from offline_kd.data.blocks import Decoder, ImageBlock
from offline_kd.data.manifest import EvaluationCrop, Interpolation
from offline_kd.support.counter_rng import counter_hash
from offline_kd.views.specs import (
    NO_PARTNER,
    OPS,
    PARTNERS,
    UNIT,
    WHOLE,
    AnyViews,
    CenterCrop,
    Fill,
    Parameters,
    RandomCrop,
    is_exact,
    outside,
)

GREY = (124, 116, 104)  # ImageNet's mean colour: what erasing and rotating leave
Pixels = NDArray[np.uint8]


def render(images: Tensor, box: Tensor, flip: Tensor, fill: Fill) -> Tensor:
    """Cut one view out of every image, on the images' device; exact, since no resampling takes place.

    Args:
        images: `[B, 3, H, W]` uint8.
        box: `[B, 4]` integer top, left, height, width; all of one height and one width.
        flip: `[B]`, nonzero where the view is mirrored.
        fill: what pixels outside the image are: 0, or the image mirrored at its edge (the edge not repeated).

    Returns:
        `[B, 3, height, width]` uint8.
    """
    box = box.long()
    height, width = int(box[0, 2]), int(box[0, 3])
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


def _into_image(index: Tensor, size: int, fill: Fill) -> tuple[Tensor, Tensor]:
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


def render_view(pixels: Pixels, view: Parameters, size: int, interpolation: Interpolation) -> Pixels:
    """`[3, size, size]` of one view of an RGB image, without what is mixed in.

    Args:
        pixels: `[H, W, 3]`, the decoded image.
        view: its parameters, each without the axes of row and view.
    """
    cut = _cut(pixels, *(int(value) for value in view["box"]))
    if cut.shape[:2] != (size, size):
        # Of whole numbers, and the same with any instruction set; about five times as fast as Pillow's. The cut is not
        # copied: with its strides torch reads and writes channels last.
        planes = torch.from_numpy(cut)[None].permute(0, 3, 1, 2)
        cut = F.interpolate(planes, (size, size), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()
    if view["flip"]:
        cut = _mirrored(cut)
    ops = [
        (OPS[op], float(magnitude)) for op, magnitude in zip(view.get("op", ()), view.get("magnitude", ()), strict=True)
    ]
    if any(op != "identity" for op, _ in ops):
        image = Image.fromarray(np.ascontiguousarray(cut))
        for op, magnitude in ops:
            image = apply_op(image, op, magnitude)
        cut = np.asarray(image)
    return cut.transpose(2, 0, 1)


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


def apply_op(image: Image.Image, op: str, magnitude: float) -> Image.Image:
    """One operation with its magnitude in its own unit; see `operations`."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    warp = functools.partial(
        TF.affine, image, interpolation=InterpolationMode.BILINEAR, fill=list(GREY), angle=0.0, scale=1.0
    )
    side = image.width
    match op:
        case "identity":
            return image
        case "shear_x" | "shear_y":
            degrees = float(np.degrees(np.arctan(magnitude)))
            shear = [degrees, 0.0] if op == "shear_x" else [0.0, degrees]
            return warp(translate=[0, 0], shear=shear, center=[0, 0])
        case "translate_x" | "translate_y":
            pixels = round(magnitude * side)
            return warp(translate=[pixels, 0] if op == "translate_x" else [0, pixels], shear=[0.0, 0.0])
        case "rotate":
            return TF.rotate(image, magnitude, interpolation=InterpolationMode.BILINEAR, fill=list(GREY))
        case "brightness":
            return TF.adjust_brightness(image, magnitude)
        case "color":
            return TF.adjust_saturation(image, magnitude)
        case "contrast":
            return TF.adjust_contrast(image, magnitude)
        case "sharpness":
            return TF.adjust_sharpness(image, magnitude)
        case "hue":
            return TF.adjust_hue(image, magnitude)
        case "posterize":
            return TF.posterize(image, int(magnitude))
        case "solarize":
            return TF.solarize(image, magnitude)
        case "autocontrast":
            return TF.autocontrast(image)
        case "equalize":
            return TF.equalize(image)
        case "invert":
            return TF.invert(image)
        case "grayscale":
            return TF.rgb_to_grayscale(image, num_output_channels=3)
        case "blur":
            # Radii are meant for 224 pixels; another resolution of the same view is blurred alike.
            return image.filter(ImageFilter.GaussianBlur(magnitude * side / 224))
    raise AssertionError(op)


def _inner_box(box: NDArray[np.int16], size: int) -> tuple[slice, slice]:
    """Rows and columns of a box in 1/UNIT of a side; the share of the side decides, whatever the resolution."""
    top, left, height, width = (int(value) for value in box)
    first_row, first_column = round(top * size / UNIT), round(left * size / UNIT)
    return (
        slice(first_row, round((top + height) * size / UNIT)),
        slice(first_column, round((left + width) * size / UNIT)),
    )


def _erase(pixels: Pixels, box: NDArray[np.int16], fill: str) -> None:
    rows, columns = _inner_box(box, pixels.shape[1])
    if fill == "mean":
        pixels[:, rows, columns] = np.array(GREY, dtype=np.uint8)[:, None, None]
        return
    shape = pixels[:, rows, columns].shape
    noise = counter_hash(*(int(value) for value in box), np.arange(int(np.prod(shape)), dtype=np.uint64))
    pixels[:, rows, columns] = (noise >> np.uint64(56)).astype(np.uint8).reshape(shape)


def _mix(pixels: Pixels, other: Pixels, box: NDArray[np.int16], share: int) -> None:
    """Cutmix where there is a box, else mixup; in whole numbers, so that it is the same everywhere."""
    if box[2] and box[3]:
        rows, columns = _inner_box(box, pixels.shape[1])
        pixels[:, rows, columns] = other[:, rows, columns]
    else:
        blend = pixels.astype(np.int32) * share + other.astype(np.int32) * (WHOLE - share) + WHOLE // 2
        pixels[:] = (blend // WHOLE).astype(np.uint8)


@dataclass(frozen=True)
class Choice:
    """One view of each of m rows of a block."""

    row: NDArray[np.int64]  # [m]
    own: Parameters  # [m, ...]
    partner_row: NDArray[np.int64]  # [m] whose same view is mixed in; negative: none
    partner: Parameters  # [m, ...] of that view

    def take(self, index: NDArray[Any] | slice) -> "Choice":
        own, partner = ({name: array[index] for name, array in one.items()} for one in (self.own, self.partner))
        return Choice(self.row[index], own, self.partner_row[index], partner)


def choose(parameters: Parameters, row: NDArray[np.int64], view: NDArray[np.int64]) -> Choice:
    """Views `view` `[m]` of the rows `row` `[m]`, out of the parameters `[n, v, ...]` of all."""
    own = {name: array[row, view] for name, array in parameters.items()}
    partner_row = own["partner"].astype(np.int64) if "partner" in own else np.full(len(row), -1)
    partner = {name: array[partner_row.clip(min=0), view] for name, array in parameters.items()}
    return Choice(row, own, partner_row, partner)


def render_choice(
    decoder: Decoder,
    choice: Choice,
    views: AnyViews,
    size: int,
    threads: ThreadPoolExecutor | None = None,
    out: Pixels | None = None,
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Pixels of one view of each of m rows: `[m, 3, size, size]` uint8.

    And `[m]` whether it could be rendered: not when an image, or the one that is mixed in, cannot be decoded.

    Args:
        out: where the pixels shall go.
    """
    assert isinstance(views, CenterCrop | RandomCrop)
    erase = views.erase if isinstance(views, RandomCrop) else None
    # Channels lie last in memory, as in Pillow's images and as networks like them best.
    pixels = np.zeros((len(choice.row), size, size, 3), np.uint8).transpose(0, 3, 1, 2) if out is None else out
    good = np.ones(len(choice.row), dtype=bool)
    run = threads.map if threads else map
    needed = np.unique(np.concatenate([choice.row, choice.partner_row[choice.partner_row >= 0]]))
    list(run(decoder, needed.tolist()))

    def base(row: int, parameters: Parameters, index: int) -> Pixels | None:
        image = decoder(row)
        if image is None:
            return None
        view = {name: array[index] for name, array in parameters.items()}
        one = render_view(image, view, size, views.interpolation)
        if erase and view["erase"][2] and view["erase"][3]:
            one = one.copy()
            _erase(one, view["erase"], erase.fill)
        return one

    def one_row(index: int) -> None:
        one, partner = base(int(choice.row[index]), choice.own, index), int(choice.partner_row[index])
        other = base(partner, choice.partner, index) if partner >= 0 else None
        if one is None or (partner >= 0 and other is None):
            good[index] = False
            return
        pixels[index] = one
        if other is not None:
            _mix(pixels[index], other, choice.own["mix_box"][index], int(choice.own["share"][index]))

    list(run(one_row, range(len(choice.row))))
    return torch.from_numpy(pixels), good


def view_batches(
    block: ImageBlock,
    decoder: Decoder,
    parameters: Parameters,
    views: AnyViews,
    size: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Tensor]]:
    """Row `[m]`, view `[m]` and pixels `[m, 3, H, W]` of all views of all images of a block, in that order.

    Rows that cannot be decoded are left out and listed in `decoder.bad`; nothing is mixed with them, which
    `parameters` say afterwards, too.

    Args:
        parameters: `[n, v, ...]`, as `draw` gives them.
        size: of the views, where they are resampled.
    """
    count, num_views = parameters["flip"].shape
    if is_exact(views):
        images = block.images.to(device)
        box, flip = (torch.from_numpy(parameters[name]).to(device) for name in ("box", "flip"))
        for start in range(0, count * num_views, batch_size):
            row, view = np.divmod(np.arange(start, min(start + batch_size, count * num_views)), num_views)
            at = torch.from_numpy(row).to(device), torch.from_numpy(view).to(device)
            yield row, view, render(images[at[0]], box[at], flip[at], outside(views))
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for first in range(0, count, PARTNERS):
            window = np.arange(first, min(first + PARTNERS, count))
            list(threads.map(decoder, window.tolist()))
            drop_bad_partners(parameters, decoder.bad)
            row, view = (part.ravel() for part in np.meshgrid(window, np.arange(num_views), indexing="ij"))
            decodable = ~np.isin(row, list(decoder.bad))
            row, view = row[decodable], view[decodable]
            for start in range(0, len(row), batch_size):
                part = slice(start, start + batch_size)
                choice = choose(parameters, row[part], view[part])
                yield row[part], view[part], render_choice(decoder, choice, views, size, threads)[0].to(device)
            decoder.forget()


def render_some(block: ImageBlock, choice: Choice, views: AnyViews, size: int) -> Pixels:
    """Pixels of a few chosen views, `[m, 3, H, W]` uint8; raises DataError for what cannot be decoded."""
    if is_exact(views):
        box, flip = (torch.from_numpy(choice.own[name]) for name in ("box", "flip"))
        return render(block.images[torch.from_numpy(choice.row)], box, flip, outside(views)).numpy()
    return render_choice(Decoder(replace(block, on_bad="fail")), choice, views, size)[0].numpy()


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


def drop_bad_partners(parameters: Parameters, bad: Collection[int]) -> None:
    """Let nothing be mixed into the views, of a whole block, that were to be mixed with rows that cannot be decoded."""
    if "partner" in parameters and bad:
        lost = np.isin(parameters["partner"], list(bad))
        parameters["partner"][lost] = NO_PARTNER
        parameters["share"][lost] = WHOLE
        parameters["mix_box"][lost] = 0
