"""The right pixels: views are pure functions of counters, and rendering is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_kd.data.tars import hash_key
from offline_kd.support.counter_rng import counter_hash, counter_uniform, keyed_permutation, mix
from offline_kd.support.errors import RecipeError
from offline_kd.views.epochs import view_groups, view_of_epoch
from offline_kd.views.kind import draw
from offline_kd.views.none import NoAugmentation
from offline_kd.views.pad_crop_flip import PadCropFlip
from offline_kd.views.render import render

KEYS = np.array([hash_key(f"{index:05d}") for index in range(300)], dtype=np.uint64)
CIFAR = PadCropFlip(kind="pad_crop_flip")


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
    pixels = render(torch.from_numpy(images), torch.from_numpy(box), torch.from_numpy(flip), fill)
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
    assert torch.equal(render(images, box, flip, "zeros"), images)


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
def test_keyed_permutations_are_permutations(seed, num):
    rows = keyed_permutation(num, seed, KEYS[:3])
    assert rows.shape == (3, num)
    assert (np.sort(rows, axis=1) == np.arange(num)).all()


def test_impossible_views_are_refused():
    with pytest.raises(RecipeError, match="only 162 different views"):
        _ = CIFAR.model_copy(update={"count": 163}).num_views
    with pytest.raises(RecipeError, match="at most one pixel less"):
        draw_all(PadCropFlip(kind="pad_crop_flip", padding=8, fill="reflect"), KEYS, 8, 8)
