"""What an image file means, which views are drawn, and how they are rendered."""

import hashlib
import itertools
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import EVERYTHING, encoded, photograph
from PIL import Image
from torchvision.transforms import v2

from offline_kd.data.blocks import Decoder, load_block
from offline_kd.data.checking import check_dataset
from offline_kd.data.decoding import UNDECODABLE, decode_image, image_size
from offline_kd.data.manifest import Dataset, EvaluationCrop, Split
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample
from offline_kd.support.errors import DataError
from offline_kd.views.augment import ThreeAugment, TrivialAugment
from offline_kd.views.choice import choose
from offline_kd.views.kind import UNIT, draw
from offline_kd.views.mixing import NO_PARTNER, PARTNERS, WHOLE
from offline_kd.views.operations import OPERATIONS, apply_op, operation_name
from offline_kd.views.random_resized_crop import RandomCrop
from offline_kd.views.render import evaluation_crop, render_choice, render_view

KEYS = np.arange(150, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
SIZES = np.random.default_rng(0).integers(20, 300, (150, 2))


# ---- what an image file means ----------------------------------------------------------------------------------------


def test_every_kind_of_image_becomes_the_rgb_that_it_shows():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    three = np.repeat(grey[..., None], 3, axis=2)

    def pixels(content: bytes) -> np.ndarray:
        image = decode_image(content)
        assert image.mode == "RGB"
        return np.asarray(image)

    assert np.array_equal(pixels(encoded(Image.fromarray(grey), "PNG")), three)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(pixels(encoded(sixteen, "PNG")), three)
    palette = Image.fromarray(three).quantize(256)
    assert np.array_equal(pixels(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert (pixels(encoded(Image.new("1", (4, 4), 1), "PNG")) == 255).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(cmyk, "JPEG", quality=95)).astype(int) - (255, 0, 0)).max() < 12
    one = pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"))
    assert one.tolist() == [[[1, 2, 3]]]


def test_what_is_transparent_lies_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (np.asarray(decode_image(encoded(clear, "PNG"))) == 255).all()
    half = np.asarray(decode_image(encoded(Image.new("LA", (4, 4), (0, 128)), "PNG")))
    assert abs(int(half[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert (np.asarray(decode_image(encoded(palette, "PNG", transparency=0))) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
    image = photograph(1, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "PNG", exif=exif)
    upright = decode_image(content)
    assert image_size(content) == (upright.height, upright.width)
    assert (upright.height, upright.width) == ((20, 30) if orientation < 5 else (30, 20))
    turned = {3: image.rotate(180), 6: image.rotate(-90, expand=True), 8: image.rotate(90, expand=True)}
    if orientation in turned:
        assert np.array_equal(np.asarray(upright), np.asarray(turned[orientation]))


def test_a_hundred_megapixels_are_read_and_more_than_the_limit_is_not():
    large = encoded(Image.new("RGB", (12_000, 9_000), (9, 8, 7)), "PNG", compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(large).size == (12_000, 9_000)
    too_large = encoded(Image.new("1", (16_000, 10_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="16000x10000 pixels, at most 134,217,728 are read"):
            decode_image(too_large)
    with pytest.raises(UNDECODABLE, match="160000000 pixels"):  # where Pillow's warning is an error
        decode_image(too_large)
    with pytest.raises(ValueError, match="32767 a side"):
        decode_image(encoded(Image.new("1", (40_000, 2)), "PNG"))


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is of that size, and holds next to nothing."""
    small = encoded(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize("side", [20_000, 30_000, 2**31 - 1])
def test_a_picture_beyond_every_limit_is_a_bad_image(side, tmp_path):
    good = encoded(photograph(1, 20, 30), "PNG")
    content = png_of(side, side)
    for read in (decode_image, image_size):
        with pytest.raises(UNDECODABLE):
            read(content)
    tars = pack([Sample("a", 0, good, "png"), Sample("b", 1, content, "png")], tmp_path / "set", "train", 10)
    path = tmp_path / "set" / tars[0].file
    with pytest.raises(DataError, match=r"sample 'b': the image cannot be decoded .*--set data.bad_images=skip"):
        load_block(path, tars[0], 2)
    left = load_block(path, tars[0], 2, on_bad="skip")
    assert (left.keys, [bad.key for bad in left.left_out]) == (["a"], ["b"])
    large = load_block(path, tars[0], 2, on_bad="skip", decode=False)
    assert large.sizes().tolist() == [[20, 30], [1, 1]]
    assert Decoder(large)(1) is None
    dataset = Dataset(folder="set", classes=["x", "y"], splits={"train": Split(tars=tars)})
    with pytest.raises(DataError, match="sample 'b': cannot be decoded"):
        check_dataset(dataset, [tmp_path], lambda tars: tars)


def test_decoding_leaves_the_filters_of_warnings_alone(monkeypatch):
    """They belong to the process: put and taken away by several threads, one may stay behind."""
    large = encoded(Image.new("1", (10_000, 10_000)), "PNG")
    touched = []
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "simplefilter", lambda *arguments: touched.append(arguments))
        size = image_size(large)
    assert size == (10_000, 10_000)  # more than Pillow alone reads without a warning
    assert not touched


@pytest.mark.filterwarnings("ignore")
def test_damaged_metadata_is_no_reason_to_fail_in_an_unexpected_way():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a picture", (72, 1)
    content = encoded(photograph(1, 20, 30), "JPEG", exif=exif)
    begin = content.index(b"Exif")
    for at in range(begin, begin + len(exif.tobytes())):
        for value in (0, 2, 255):
            damaged = content[:at] + bytes([value]) + content[at + 1 :]
            try:
                assert decode_image(damaged).size in ((20, 30), (30, 20))
            except UNDECODABLE:
                continue


# ---- drawing ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5))
def test_more_views_leave_those_before_unchanged_and_every_value_is_legal(seed, count, more):

    views = EVERYTHING.model_copy(update={"seed": seed, "count": count})
    few = draw(views, KEYS, SIZES)
    many = draw(views.model_copy(update={"count": count + more}), KEYS, SIZES)
    assert few.keys() == views.arrays().keys()
    for name, about in views.arrays().items():
        assert np.array_equal(few[name], many[name][:, :count])
        assert few[name].dtype == np.dtype(about.dtype)
        assert few[name].shape == (150, count, *([about.axis[1]] if about.axis else []))
        assert about.legal[0] <= few[name].min() <= few[name].max() <= about.legal[1]


def test_crops_lie_inside_the_image_and_have_the_areas_and_ratios_that_were_asked_for():
    sizes = np.full((4000, 2), (300, 400))
    views = RandomCrop(kind="random_resized_crop", count=1)
    box = draw(views, np.arange(4000, dtype=np.uint64), sizes)["box"][:, 0].astype(int)
    top, left, height, width = box.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    area, ratio = height * width / 120_000, width / height
    assert 0.078 < area.min() < 0.1
    assert 0.95 < area.max() <= 1
    assert 0.73 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.36
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = [v2.RandomResizedCrop(8).make_params([image]) for _ in range(4000)]
    assert abs(area.mean() - np.mean([one["height"] * one["width"] for one in theirs]) / 120_000) < 0.015
    assert abs(left.mean() - np.mean([one["left"] for one in theirs])) < 5
    thin = draw(views, np.arange(50, dtype=np.uint64), np.full((50, 2), (1, 1000)))["box"][:, 0]
    assert (thin[:, 2] == 1).all()
    assert (thin[:, 3] >= 1).all()


def test_partners_are_others_of_the_same_company_and_shares_are_those_of_the_boxes():
    parameters = draw(EVERYTHING, KEYS, SIZES)
    partner, share, box = (parameters[name].astype(int) for name in ("partner", "share", "mix_box"))
    row = np.arange(150)[:, None]
    mixed = partner != NO_PARTNER
    assert 0.6 < mixed.mean() < 0.8
    assert (partner != row).all()
    assert (partner // PARTNERS == row // PARTNERS)[mixed].all()
    assert (share[~mixed] == WHOLE).all()
    cut = box[..., 2] > 0
    assert 0.2 < cut.mean() < 0.5
    area = box[..., 2] * box[..., 3] / UNIT**2
    assert np.allclose((1 - share / WHOLE)[cut], area[cut], atol=1e-4)
    assert (draw(EVERYTHING, KEYS[:1], SIZES[:1])["partner"] == NO_PARTNER).all()


def test_every_operation_is_drawn_and_strengths_keep_to_their_ranges():
    views = EVERYTHING.model_copy(update={"augment": TrivialAugment(kind="trivialaugment"), "jitter": None})
    parameters = draw(views.model_copy(update={"count": 40}), KEYS, SIZES)
    assert sorted(np.unique(parameters["op"])) == list(range(14))
    for name, low, high in (
        ("rotate", -135, 135), ("posterize", 2, 8), ("solarize", 0, 255), ("brightness", 0, 2), ("shear_x", -1, 1)
    ):  # fmt: skip
        magnitude = parameters["magnitude"][parameters["op"] == OPERATIONS[name].code]
        assert low <= magnitude.min() < magnitude.max() <= high
    three = EVERYTHING.model_copy(update={"augment": ThreeAugment(kind="three_augment"), "jitter": None})
    assert {operation_name(op) for op in np.unique(draw(three, KEYS, SIZES)["op"])} == {"grayscale", "solarize", "blur"}


# ---- rendering -------------------------------------------------------------------------------------------------------


def test_crops_are_those_of_torchvision():
    """The same box, resized by the same library: equal to the bit, at two sizes; and nearly what Pillow makes of it."""
    from torchvision.transforms.v2 import functional as F

    image = photograph(3, 120, 200)
    view = {"box": np.array([10, 30, 77, 101], dtype=np.int16), "flip": np.uint8(1)}
    for size, name in itertools.product((24, 64, 200), ("bilinear", "bicubic")):
        mode = v2.InterpolationMode(name)
        found = render_view(np.array(image), view, size, name)
        expected = F.hflip(F.resized_crop(F.pil_to_tensor(image), 10, 30, 77, 101, [size, size], mode))
        assert np.array_equal(found, expected.numpy())
        pillow = F.hflip(F.resized_crop(image, 10, 30, 77, 101, [size, size], mode))
        assert np.abs(found - np.asarray(pillow).astype(int).transpose(2, 0, 1)).max() <= 2


@given(st.integers(-100, 140), st.integers(-100, 140), st.integers(1, 90), st.booleans())
def test_a_box_of_the_right_size_is_cut_and_mirrored_without_a_change(top, left, size, flip):
    """Also where it reaches outside the image, or lies there."""
    image = photograph(3, 120, 100)
    found = render_view(np.array(image), {"box": np.array([top, left, size, size]), "flip": flip}, size, "bilinear")
    expected = np.asarray(image.crop((left, top, left + size, top + size)))
    assert np.array_equal(found.transpose(1, 2, 0), expected[:, ::-1] if flip else expected)


def digest_of_crops() -> str:
    digest = hashlib.sha256()
    for seed, side in ((1, 40), (2, 300)):
        for name in ("bilinear", "bicubic"):
            for box in ((0, 0, side, side), (3, 5, side // 2, side // 3), (-4, 9, 33, 21)):
                view = {"box": np.array(box), "flip": seed % 2}
                digest.update(render_view(np.array(photograph(seed, side, side)), view, 64, name).tobytes())
    return f"{torch.backends.cpu.get_cpu_capability()} {digest.hexdigest()}"


@pytest.mark.slow
def test_crops_are_the_same_with_any_instruction_set():
    """What this machine has at best, and what older ones have."""
    command = [sys.executable, "-c", "from test_rendering import digest_of_crops as made; print(made())"]
    older = [
        subprocess.Popen(command, env={**os.environ, "ATEN_CPU_CAPABILITY": name}, stdout=subprocess.PIPE, text=True)
        for name in ("default", "avx2")
    ]
    found = [digest_of_crops(), *(process.communicate()[0].strip() for process in older)]
    capabilities, digests = zip(*(line.split() for line in found), strict=True)
    assert "DEFAULT" in capabilities
    assert len(set(digests)) == 1, found


def test_the_evaluation_crop_is_that_of_torchvision():
    image = photograph(4, 240, 320)
    crop = EvaluationCrop(size=64, resize=80, interpolation="bicubic")
    expected = v2.Compose([v2.Resize(80, v2.InterpolationMode.BICUBIC), v2.CenterCrop(64), v2.PILToTensor()])(image)
    assert np.array_equal(evaluation_crop(np.array(image), crop), expected.numpy())


def test_a_box_that_reaches_outside_is_black_there():
    pixels = render_view(
        np.full((10, 10, 3), 255, np.uint8), {"box": np.array([-5, 0, 10, 10]), "flip": 0}, 10, "bilinear"
    )
    assert (pixels[:, :5] == 0).all()
    assert (pixels[:, 5:] == 255).all()


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_changes_an_image_and_does_it_again(op):
    image = Image.fromarray(np.asarray(photograph(5, 40, 40)) // 2 + 40)
    magnitude = {"posterize": 4, "solarize": 128, "hue": 0.2, "rotate": 20, "rotate_nearest": 20, "blur": 1.5}.get(
        op, 0.3
    )
    once, again = apply_op(image, op, magnitude), apply_op(image, op, magnitude)
    assert once.size == (40, 40)
    assert once.mode == "RGB"
    assert np.array_equal(np.asarray(once), np.asarray(again))
    assert (np.array_equal(np.asarray(once), np.asarray(image))) == (op == "identity")


def test_mixing_covers_or_blends_by_the_share():
    block = load_some({f"{index}": Image.new("RGB", (50, 40), (60 * index, 0, 0)) for index in range(4)})
    views = EVERYTHING.model_copy(update={"augment": None, "jitter": None, "erase": None})
    parameters = draw(views, block.key_hash, block.sizes())
    row, view = np.repeat(np.arange(4), 4), np.tile(np.arange(4), 4)
    choice = choose(parameters, row, view)
    pixels, good = render_choice(Decoder(block), choice, views, 64)
    assert good.all()
    for index in range(16):
        own, share = 60 * row[index], choice.own["share"][index] / WHOLE
        other = 60 * choice.partner_row[index] if choice.partner_row[index] >= 0 else own
        mean = pixels[index, 0].float().mean().item()
        assert abs(mean - (share * own + (1 - share) * other)) < 4  # a box is rounded to whole pixels


def load_some(images: dict[str, Image.Image], **options: object):
    folder = Path(os.environ["PYTEST_IMAGES"])
    samples = [
        Sample(key, index % 3, encoded(image, "PNG"), "png") for index, (key, image) in enumerate(images.items())
    ]
    tar = pack(samples, folder, f"some{time.monotonic_ns()}", 1000)[0]
    return load_block(folder / tar.file, tar, 3, decode=False, **options)


@pytest.fixture(autouse=True)
def _images_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_IMAGES", str(tmp_path / "images"))
