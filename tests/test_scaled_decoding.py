"""JPEGs decoded at 1/2, 1/4 and 1/8: which, what of them a view shows, and that both stages show the same."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, invoke, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import command_line, encoded, photograph, photographs, views_of
from PIL import Image
from torchvision.transforms.v2 import functional as F

from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import Decoder, load_block
from offline_kd.data.decoding import SCALES, UNDECODABLE, decode, decode_image, is_scalable
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.store.join import join
from offline_kd.store.opening import open_store
from offline_kd.views.center_crop import CenterCrop
from offline_kd.views.choice import choose
from offline_kd.views.kind import draw
from offline_kd.views.random_resized_crop import RandomCrop
from offline_kd.views.render import decoding_scales, render_choice, render_view

SCALED = RandomCrop(kind="random_resized_crop", size=16, count=4, decoding="scaled")


def jpeg(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95, **options)


def smooth(height: int, width: int) -> Image.Image:
    """Different everywhere, and without the frequencies that scaled decoding leaves away."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 31 + phase) * np.cos(y / 23 - phase) for phase in range(3)]
    return Image.fromarray(np.rint(np.stack(waves, -1) * 120 + 128).astype(np.uint8))


# ---- the rule --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 40), st.integers(1, 8), st.data())
def test_a_crop_has_no_fewer_pixels_than_it_becomes_and_lies_inside_what_is_decoded(
    height, width, size, orientation, data
):
    upright = (height, width) if orientation < 5 else (width, height)
    box_height, box_width = (data.draw(st.integers(1, side)) for side in upright)
    top, left = data.draw(st.integers(0, upright[0] - box_height)), data.draw(st.integers(0, upright[1] - box_width))
    box = np.array([top, left, box_height, box_width], dtype=np.int16)

    scale = int(decoding_scales(SCALED, box, size))
    larger = [other for other in SCALES if min(box_height, box_width) >= other * size]
    assert scale == max(larger, default=1)
    decoded = decode(jpeg(Image.new("RGB", (width, height)), orientation), scale)
    assert decoded.pixels.shape == (-(-upright[0] // scale), -(-upright[1] // scale), 3)
    first_row, first_column, rows, columns = decoded.box(box)
    assert min(first_row, first_column) >= 0
    assert first_row + rows <= decoded.pixels.shape[0]
    assert first_column + columns <= decoded.pixels.shape[1]
    assert scale == 1 or min(rows, columns) >= size
    assert (rows * scale, columns * scale) == (box_height, box_width)


def test_only_views_that_say_so_are_decoded_smaller_and_others_are_described_as_before():
    box = np.array([[0, 0, 4000, 3000], [0, 0, 300, 100], [0, 0, 31, 64]], dtype=np.int16)
    full = RandomCrop(kind="random_resized_crop", size=16, count=4)
    assert decoding_scales(full, box, 16).tolist() == [1, 1, 1]
    assert decoding_scales(SCALED, box, 16).tolist() == [8, 4, 1]
    for views in (full, CenterCrop(kind="center_crop")):
        assert "decoding" not in views.model_dump(mode="json")
        scaled = views.model_copy(update={"decoding": "scaled"})
        assert scaled.model_dump(mode="json") == views.model_dump(mode="json") | {"decoding": "scaled"}


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_of_what_is_decoded_smaller_shows_what_the_whole_image_shows_there(orientation, scale):
    """With sides that no scale divides: a turned image begins with what was filled up, and a box that forgets it
    differs by more than twice as much."""
    content = jpeg(smooth(201, 299), orientation, subsampling=0)
    whole, small = decode(content), decode(content, scale)
    view = {"box": np.array([13, 22, 155, 147], dtype=np.int16), "flip": 0}
    wanted = render_view(whole.pixels, view, 8, "bilinear").astype(int)

    def error(box: np.ndarray) -> float:
        return np.abs(render_view(small.pixels, view | {"box": box}, 8, "bilinear") - wanted).mean()

    found = error(small.box(view["box"]))
    assert found < 0.2 * scale
    assert any(small.before) == (orientation not in (1, 5))
    if any(small.before):
        assert error(view["box"] / scale) > 2 * found


def lossless_jpeg(grey: np.ndarray) -> bytes:
    """`[h, w]` as SOF3 with the pixel to the left as prediction (ITU-T T.81, H.1): JPEG without blocks."""
    bits = ""
    for (row, column), value in np.ndenumerate(grey.astype(int)):
        before = 128 if row == column == 0 else grey[row - 1, 0] if column == 0 else grey[row, column - 1]
        step = int(value) - int(before)
        length = abs(step).bit_length()
        bits += f"{length:04b}" + (f"{step if step > 0 else step + 2**length - 1:0{length}b}" if length else "")
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\x00")
    frame = b"\xff\xc3" + struct.pack(">HBHHB", 11, 8, *grey.shape, 1) + bytes([1, 0x11, 0])
    codes = b"\xff\xc4" + struct.pack(">HB", 2 + 17 + 9, 0) + bytes([0, 0, 0, 9, *[0] * 12, *range(9)])
    return (
        b"\xff\xd8"
        + frame
        + codes
        + b"\xff\xda"
        + struct.pack(">H", 8)
        + bytes([1, 1, 0, 1, 0, 0])
        + data
        + b"\xff\xd9"
    )


def test_every_kind_of_jpeg_is_decoded_smaller_and_everything_else_whole(tmp_path):
    image = smooth(64, 96)
    kinds = {
        "rgb": jpeg(image),
        "progressive": jpeg(image, progressive=True),
        "grey": jpeg(image.convert("L")),
        "cmyk": jpeg(image.convert("CMYK")),
        "coarse colour": jpeg(image, subsampling=2),
        "two pictures": encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)], quality=95),
        "lossless": lossless_jpeg(np.asarray(image.convert("L"))),
        "png": encoded(image, "PNG"),
        "webp": encoded(image, "WEBP", lossless=True),
    }
    whole = {"lossless", "png", "webp"}
    assert {name for name, content in kinds.items() if not is_scalable(content)} == whole
    assert not is_scalable(kinds["rgb"][:20])
    assert not is_scalable(b"")
    samples = [
        Sample(name, 0, content, name if name in whole - {"lossless"} else "jpg") for name, content in kinds.items()
    ]
    tar = pack(samples, tmp_path, "train", 100)[0]
    block = load_block(tmp_path / tar.file, tar, 1, decode=False)
    decoder = Decoder(block)
    for row, name in enumerate(block.keys):
        found = decoder.scaled(row, 4)
        assert found is not None
        assert found.scale == (1 if name in whole else 4)
        assert found.pixels.shape == ((64, 96, 3) if name in whole else (16, 24, 3))
        shown = np.asarray(decode_image(kinds[name]).reduce(64 // found.pixels.shape[0])).astype(int)
        assert np.abs(found.pixels - shown).mean() < 2
        assert np.array_equal(decoder(row), np.asarray(decode_image(kinds[name])))  # whole, whatever was decoded before


def test_a_view_that_is_not_decoded_smaller_has_the_pixels_that_it_always_had(tmp_path):
    samples = [Sample(f"{n}", 0, encoded(photograph(n, 90, 120)), "jpg") for n in range(6)]
    tar = pack(samples, tmp_path, "train", 100)[0]
    block = load_block(tmp_path / tar.file, tar, 1, decode=False)
    parameters = draw(SCALED, block.key_hash, block.sizes())
    row, view = np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6)
    choice = choose(parameters, row, view)
    scaled, _ = render_choice(Decoder(block), choice, SCALED, 24)
    full, _ = render_choice(Decoder(block), choice, SCALED.model_copy(update={"decoding": "full"}), 24)
    same = (scaled == full).flatten(1).all(dim=1).numpy()
    assert (same == (choice.own["box"][:, 2:].min(axis=1) < 48)).all()
    assert 0 < same.sum() < 24
    for index in range(24):
        image = F.pil_to_tensor(decode_image(samples[row[index]].encoded))
        cut = F.resized_crop(image, *choice.own["box"][index].tolist(), [24, 24])
        assert torch.equal(full[index], F.hflip(cut) if choice.own["flip"][index] else cut)


@settings(max_examples=50)
@given(st.integers(0, 3000))
def test_an_image_that_is_cut_is_as_bad_at_every_scale(length):
    content = jpeg(photograph(1, 100, 60))[:length]

    def is_bad(scale: int) -> bool:
        try:
            decode(content, scale)
        except UNDECODABLE:
            return True
        return False

    assert {is_bad(scale) for scale in SCALES} == {is_bad(1)}


DIGEST = """
import hashlib, sys
from pathlib import Path
from offline_kd.data.decoding import SCALES, decode
for file in sorted(Path(sys.argv[1]).iterdir()):
    for scale in SCALES:
        print(file.name, scale, hashlib.sha256(decode(file.read_bytes(), scale).pixels.tobytes()).hexdigest())
"""


def test_what_is_decoded_smaller_is_the_same_with_any_instruction_set(tmp_path):
    for subsampling in (0, 1, 2):
        (tmp_path / f"{subsampling}").write_bytes(jpeg(photograph(2, 203, 301), subsampling=subsampling))
    command = [sys.executable, "-c", DIGEST, str(tmp_path)]
    found = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for switches in ({}, {"JSIMD_FORCENONE": "1"})  # libjpeg-turbo's own
        for environment in [os.environ | {"PYTHONPATH": str(ROOT)} | switches]
    ]
    assert len(found[0].splitlines()) == 9
    assert found[0] == found[1]


# ---- both stages -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Photographs so large that most crops are decoded smaller, by the student's views more often than the teacher's;
    captured from the command line."""
    folder = tmp_path_factory.mktemp("scaled")
    rng = np.random.default_rng(3)
    samples = [
        Sample(f"{n:04d}", n % 3, jpeg(photograph(n, *rng.integers(60, 150, 2).tolist()), n % 8 + 1), "jpg")
        for n in range(16)
    ]
    recipe, manifest = photographs(folder, samples, views=views_of(decoding="scaled"))
    file, where = command_line(folder, recipe, manifest)
    done = invoke("cache-teacher", file, "--store", folder / "store", "--device", "cpu", *where)
    assert done.exit_code == 0, done.output
    return recipe, manifest, folder, file, where


def test_the_teacher_says_of_scaled_views_what_the_store_says_and_students_see_them(captured):
    recipe, manifest, folder, _, _ = captured
    assert json.loads((folder / "store" / "store.json").read_text())["views"]["decoding"] == "scaled"
    store = open_store(folder / "store")
    teacher = load_teacher(recipe, manifest, [folder], 3, CPU)
    loader = training_images(recipe, manifest, [folder])
    block = loader[0]
    joined = join(store, block, 0, np.ones(len(block), dtype=np.int64))
    scales = [decoding_scales(recipe.views, joined.view.own["box"], size) for size in (16, 24)]
    assert len({*scales[0].tolist(), *scales[1].tolist()}) >= 3
    assert (scales[0] != scales[1]).any()
    pixels, _ = render_choice(Decoder(block), joined.view, recipe.views, 24)
    torch.testing.assert_close(teacher.logits(pixels), joined.signal[0].logits["values"], rtol=1e-5, atol=1e-4)
    full = recipe.views.model_copy(update={"decoding": "full"})
    assert not torch.equal(pixels, render_choice(Decoder(block), joined.view, full, 24)[0])

    streams = [
        make_loader(
            recipe,
            source_of(recipe, loader, stores, recipe.objectives["kd"], store.identity.groups),
            3,
            CPU,
            live_size=24,
        )
        for stores in ([store], [])
    ]
    for stored, live in zip(*(stream.epoch(1) for stream in streams), strict=True):
        assert torch.equal(stored.images, live.images)
        torch.testing.assert_close(
            teacher.logits(live.live_images), stored.signal[0].logits["values"], rtol=1e-5, atol=1e-4
        )


def test_a_student_trains_from_scaled_views_and_a_recipe_that_decodes_otherwise_is_refused(captured, tmp_path):
    _, _, folder, file, where = captured
    store = ["--store", folder / "store", "--objective", "kd", *where]
    done = invoke("distill", file, "--out", tmp_path / "run", "--set", "training.epochs=1", *store)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "result.json").is_file()

    message = refused("distill", file, "--out", tmp_path / "other", "--set", "views.decoding=full", *store)
    assert "views.decoding: scaled in the store, not there in the recipe" in message
    assert "Correct the recipe's views, or capture another store." in message
    wrong = refused("distill", file, "--out", tmp_path / "wrong", "--set", "views.decoding=half", *store)
    assert "views" in wrong
    assert "'full' or 'scaled'" in wrong
