"""The right pixels: views are pure functions of counters, and rendering is exact."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import EVERYTHING

from offline_kd.data.tars import hash_key
from offline_kd.support.counter_rng import counter_hash, counter_uniform, keyed_permutation, mix, order_of_rows
from offline_kd.support.errors import RecipeError
from offline_kd.views import VIEWS
from offline_kd.views.augment import FOURTEEN, RandAugment, ThreeAugment, TrivialAugment
from offline_kd.views.center_crop import CenterCrop
from offline_kd.views.choice import choose, draw_choice
from offline_kd.views.epochs import view_groups, view_of_epoch
from offline_kd.views.kind import draw
from offline_kd.views.none import NoAugmentation
from offline_kd.views.operations import OPERATIONS, operation_name
from offline_kd.views.pad_crop_flip import PadCropFlip
from offline_kd.views.render import render

KEYS = np.array([hash_key(f"{index:05d}") for index in range(300)], dtype=np.uint64)
CIFAR = PadCropFlip(kind="pad_crop_flip")
KINDS = [
    NoAugmentation(),
    CIFAR,
    PadCropFlip(kind="pad_crop_flip", padding=2, fill="reflect", flip=False, count=7),
    CenterCrop(kind="center_crop"),
    EVERYTHING,
    EVERYTHING.model_copy(update={"augment": TrivialAugment(kind="trivialaugment"), "erase": None}),
    EVERYTHING.model_copy(update={"augment": ThreeAugment(kind="three_augment"), "mixing": None}),
]


def draw_all(views, key_hash, height, width):
    """Views of images that all have one size."""
    return draw(views, key_hash, np.tile([height, width], (len(key_hash), 1)))


def padded_crop(image: np.ndarray, top: int, left: int, flip: bool, fill: str, padding: int) -> np.ndarray:
    """The augmentation as papers write it: pad, crop, flip. `image` is [3, H, W]."""
    mode = "constant" if fill == "zeros" else "reflect"
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=mode)
    _, height, width = image.shape
    crop = padded[:, top + padding : top + padding + height, left + padding : left + padding + width]
    return crop[:, :, ::-1] if flip else crop


@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from(["zeros", "reflect"]))
def test_rendering_is_pad_crop_flip_to_the_bit(seed, padding, fill):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (4, 3, 9, 11), dtype=np.uint8)
    box = np.stack([*rng.integers(-padding, padding + 1, (2, 4)), [9] * 4, [11] * 4], axis=1).astype(np.int16)
    flip = rng.integers(0, 2, 4, dtype=np.uint8)
    pixels = render(torch.from_numpy(images), torch.from_numpy(box), torch.from_numpy(flip), (9, 11), fill)
    assert pixels.dtype == torch.uint8
    for index in range(4):
        expected = padded_crop(images[index], box[index, 0], box[index, 1], flip[index] == 1, fill, padding)
        assert np.array_equal(pixels[index].numpy(), expected)


def test_counters_are_scrambled_as_splitmix64_does():
    """The first outputs of the published generator with seed 0; a change here would break every store."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    states = np.arange(1, 4, dtype=np.uint64) * gamma
    assert [hex(value) for value in mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]
    state = 0
    for counter in (1, 2, 3):
        state = mix(np.array([((state ^ counter) + int(gamma)) % 2**64], dtype=np.uint64)).item()
    assert counter_hash(1, 2, 3).tolist() == [state]
    assert hash_key("00000042") == 10247203734011495098


def test_the_generator_gives_the_published_numbers_of_splitmix64():
    """Its five first outputs with seed 1234567, by which implementations in other languages are compared."""
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_uniform_numbers_lie_in_the_unit_interval_and_differ(a, b):
    numbers = counter_uniform(a, b, np.arange(64, dtype=np.uint64))
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(set(numbers)) == 64


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours():
    numbers = counter_uniform(7, np.arange(100_000, dtype=np.uint64))
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 100  # chi-square with 49 degrees of freedom, p about 2e-5
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.015


def test_all_views_of_a_sample_are_the_162_different_ones_in_its_own_order():
    parameters = draw_all(CIFAR, KEYS, 32, 32)
    assert parameters["box"].shape == (300, 162, 4)
    assert parameters["box"].dtype == np.int16
    for row in range(10):
        views = {(*parameters["box"][row, view], parameters["flip"][row, view]) for view in range(162)}
        assert len(views) == 162
    assert {int(box) for box in np.unique(parameters["box"][:, :, :2])} == set(range(-4, 5))
    assert not np.array_equal(parameters["box"][0], parameters["box"][1])


@given(st.integers(1, 162), st.integers(0, 5))
def test_more_views_leave_those_before_unchanged(count, seed):
    few = draw_all(CIFAR.model_copy(update={"count": count, "seed": seed}), KEYS[:5], 32, 32)
    every = draw_all(CIFAR.model_copy(update={"seed": seed}), KEYS[:5], 32, 32)
    assert np.array_equal(few["box"], every["box"][:, :count])
    assert np.array_equal(few["flip"], every["flip"][:, :count])


@given(st.sampled_from(KINDS), st.integers(0, 2**31), st.integers(1, 70))
def test_one_view_of_each_sample_is_drawn_as_among_all(views, seed, rows):
    """Also of the partners, whose same view is mixed in."""
    rng = np.random.default_rng(seed)
    sizes = np.tile([[40, 56]], (rows, 1)) if views.is_exact else rng.integers(8, 300, (rows, 2))
    view = rng.integers(0, views.num_views, rows)
    every = draw(views, KEYS[:rows], sizes)
    one = draw(views, KEYS[:rows], sizes, view)
    assert one.keys() == every.keys() == views.arrays().keys()
    expected = choose(every, np.arange(rows), view)
    found = draw_choice(views, KEYS[:rows], sizes, view)
    mixed = expected.partner_row >= 0
    assert np.array_equal(found.partner_row, expected.partner_row)
    for name, array in every.items():
        assert one[name].dtype == array.dtype
        assert one[name][:, 0].tobytes() == array[np.arange(rows), view].tobytes() == found.own[name].tobytes()
        if name not in ("partner", "share", "mix_box"):  # nothing is mixed into what is mixed in
            assert found.partner[name][mixed].tobytes() == expected.partner[name][mixed].tobytes()


def test_every_kind_is_known_by_the_name_that_recipes_use():
    for name, kind in VIEWS.items():
        assert kind.model_fields["kind"].annotation == Literal[name]


def test_codes_of_operations_are_what_stores_hold_and_never_move():
    first = (
        *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
        *("sharpness", "posterize", "solarize", "autocontrast", "equalize", "invert", "grayscale", "blur", "hue"),
    )
    codes = [op.code for op in OPERATIONS.values()]
    assert [OPERATIONS[name].code for name in first] == list(range(18))
    assert len(set(codes)) == len(codes)
    assert max(codes) < 255
    assert EVERYTHING.arrays()["op"].description == f"operation: {', '.join(first)}"


def test_operations_are_drawn_from_those_that_a_recipe_names():
    augment = RandAugment(kind="randaugment", num_ops=2, operations=["rotate", "invert"])
    views = EVERYTHING.model_copy(update={"augment": augment, "jitter": None})
    sizes = np.full((300, 2), 50)
    assert {operation_name(op) for op in np.unique(draw(views, KEYS, sizes)["op"])} == {"rotate", "invert"}
    assert views.arrays() == EVERYTHING.model_copy(update={"jitter": None}).arrays()
    fourteen = augment.model_copy(update={"operations": list(FOURTEEN)})
    default = augment.model_copy(update={"operations": None})
    drawn = [draw(views.model_copy(update={"augment": one}), KEYS, sizes) for one in (fourteen, default)]
    assert all(np.array_equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert "operations" not in default.model_dump(mode="json")  # as in stores from before there was a choice
    assert RandAugment.model_validate(augment.model_dump(mode="json")) == augment
    with pytest.raises(ValueError, match=r"unknown operation 'rotat'\. Did you mean 'rotate'"):
        RandAugment(kind="randaugment", operations=["rotat"])


def test_views_depend_on_the_key_and_the_seed_alone():
    together = draw_all(CIFAR, KEYS, 32, 32)
    assert np.array_equal(draw_all(CIFAR, KEYS[::-1].copy(), 32, 32)["box"][::-1], together["box"])
    assert np.array_equal(draw_all(CIFAR, KEYS[17:18], 32, 32)["box"][0], together["box"][17])
    assert not np.array_equal(draw_all(CIFAR.model_copy(update={"seed": 1}), KEYS, 32, 32)["box"], together["box"])


def test_offsets_and_flips_are_drawn_evenly():
    one = draw_all(CIFAR.model_copy(update={"count": 1}), np.arange(20_000, dtype=np.uint64), 32, 32)
    assert abs(one["flip"].mean() - 0.5) < 0.015
    for axis in (0, 1):
        counts = np.bincount(one["box"][:, 0, axis] + 4, minlength=9)
        assert ((counts - 20_000 / 9) ** 2 / (20_000 / 9)).sum() < 35  # 8 degrees of freedom


def test_no_augmentation_is_the_image_itself():
    parameters = draw_all(NoAugmentation(), KEYS[:2], 8, 9)
    images = torch.randint(256, (2, 3, 8, 9), dtype=torch.uint8)
    box, flip = torch.from_numpy(parameters["box"][:, 0]), torch.from_numpy(parameters["flip"][:, 0])
    assert torch.equal(render(images, box, flip, (8, 9), "zeros"), images)


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 30), st.integers(0, 40))
def test_a_sample_shows_every_view_once_before_any_comes_again(seed, num_views, per_group, cycle):
    groups = view_groups(num_views, per_group)
    shown = np.zeros((5, num_views), dtype=int)
    for epoch in range(cycle * num_views, (cycle + 1) * num_views):
        group, position = view_of_epoch(seed, KEYS[:5], epoch, groups)
        shown[np.arange(5), groups[group].start + position] += 1
    assert (shown == 1).all()


def test_the_view_of_an_epoch_depends_on_seed_key_and_epoch_alone():
    groups = view_groups(162, 3)
    group, position = view_of_epoch(3, KEYS, 20, groups)
    again, part = view_of_epoch(3, KEYS[100:140], 20, groups)
    assert group == again
    assert np.array_equal(part, position[100:140])
    assert len(set(position.tolist())) == 3  # within a group each sample has its own order
    orders = {tuple(view_of_epoch(seed, KEYS[:1], epoch, groups)[0] for epoch in range(162)) for seed in range(5)}
    assert len(orders) == 5


@given(st.integers(0, 2**62), st.integers(1, 200))
def test_rows_are_ordered_as_a_stable_argsort_does(seed, num):
    """Numbers that are far apart, that differ in their last bits only, and that are equal."""
    rng = np.random.default_rng(seed)
    far = rng.integers(0, 2**64, (4, num), dtype=np.uint64)
    close = np.uint64(2**63) + rng.integers(0, 2 * num, (4, num)).astype(np.uint64)
    for draws in (far, close, np.where(rng.random((4, num)) < 0.5, far, close)):
        assert np.array_equal(order_of_rows(draws), np.argsort(draws, axis=1, kind="stable"))


@given(st.integers(0, 2**31), st.integers(1, 200))
def test_keyed_permutations_are_permutations(seed, num):
    rows = keyed_permutation(num, seed, KEYS[:3])
    assert rows.shape == (3, num)
    assert (np.sort(rows, axis=1) == np.arange(num)).all()


def test_impossible_views_are_refused():
    with pytest.raises(RecipeError, match="only 162 different views"):
        _ = CIFAR.model_copy(update={"count": 163}).num_views
    with pytest.raises(RecipeError, match="at most one pixel less"):
        draw_all(PadCropFlip(kind="pad_crop_flip", padding=8, fill="reflect"), KEYS, 8, 8)
