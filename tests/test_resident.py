"""Batches made on the device, from what is kept there, are the streamed ones to the bit."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, make_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import make_samples, photographs
from test_images import with_bad_ones
from test_stream import MadeUp
from torch._subclasses.fake_tensor import FakeTensorMode

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data.blocks import ImageBlock
from offline_kd.data.manifest import Dataset, Manifest, Split, data_roots
from offline_kd.data.packing import digits_samples, pack
from offline_kd.distill import resident as residence
from offline_kd.distill.loader import Loader
from offline_kd.distill.reader import Options, Source
from offline_kd.distill.resident import Resident, resident_if_it_fits, rows_at
from offline_kd.distill.training import Shared, distill, make_loader, source_of, training_images
from offline_kd.recipe import Recipe, dump_recipe
from offline_kd.store.opening import open_store
from offline_kd.store.rows import Rows, StoredSignal
from offline_kd.support.errors import RecipeError, StoreMismatch
from offline_kd.training_recipe import Residence
from offline_kd.views.epochs import view_groups
from offline_kd.views.pad_crop_flip import PadCropFlip

CODECS = {
    "f16": {"name": "f16"},
    "int": {"name": "int", "bits": 4},
    "klt": {"name": "klt", "step": 0.3, "fit_rows": 300},
    "topk": {"name": "topk", "k": 4, "tail_temperature": 4},
}
DECISIONS = {
    "last": {"kind": "templates", "module": "body.5", "templates": 8, "top": 2, "iterations": 2},
    "first": {"kind": "subclasses", "module": "body.5", "per_class": 2, "iterations": 2},
}
LETKD2 = [
    {"term": "ce"},
    {"term": "kd", "temperature": 4},
    {"term": "decisions", "decisions": "last"},
    {"term": "subclass_decisions", "decisions": "first", "after": "body.4"},
]


def kept(recipe: Recipe, choice: Residence = "always") -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"resident": choice})})


def assert_equal(streamed: Iterable[Rows], resident: Iterable[Rows]) -> None:
    """In everything that a step may see of a batch, memory formats included."""
    steps = 0
    for one, other in zip(streamed, resident, strict=True):
        assert np.array_equal(one.key_hash, other.key_hash)
        assert (one.step, one.box, one.flip, one.choice) == (other.step, other.box, other.flip, other.choice)
        for tensor, same in zip(one.fields(), other.fields(), strict=True):
            assert (tensor.dtype, tensor.shape) == (same.dtype, same.shape)
            assert len(tensor) < 2 or tensor.stride() == same.stride()
            assert torch.equal(tensor, same)
        assert one.decisions.keys() == other.decisions.keys()
        if one.decode is not None:
            assert torch.equal(one.teacher_logits, other.teacher_logits)
        steps += 1
    assert steps


# ---- stores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CODECS)
def made(request, teacher_weights, manifest, roots, tmp_path_factory):
    """A recipe on a tar, and its store: 2 views in 2 groups; with f16, decisions of both kinds."""
    with_decisions = request.param == "f16"
    recipe = make_recipe(
        data={"tars": [2], "labelled_fraction": 0.4},
        teacher={"weights": str(teacher_weights)},
        views={"count": 2},
        capture={
            "codec": CODECS[request.param],
            "views_per_group": 1,
            "fidelity_rows": 20,
            "decisions": DECISIONS if with_decisions else {},
        },
        objectives={"kd": LETKD2[:2]} | ({"letkd2": LETKD2} if with_decisions else {}),
    )
    place = tmp_path_factory.mktemp("resident") / "store"
    cache_teacher(recipe, manifest, roots, place, CPU)
    return recipe, place


def loaders(recipe: Recipe, manifest: Manifest, roots: list, place: object, **options: object) -> tuple[Loader, Loader]:
    """A streamed one and one with everything on the device, from the last objective of the recipe."""
    images, terms = training_images(recipe, manifest, roots), list(recipe.objectives.values())[-1]
    source = source_of(recipe, images, [open_store(place)] if place else [], terms)
    both = [make_loader(kept(recipe, choice), source, 3, CPU) for choice in ("never", "always")]
    assert [loader.resident is None for loader in both] == [True, False]
    changed = [Loader(source, replace(loader.options, **options), CPU, None, loader.resident) for loader in both]
    return changed[0], changed[1]


def test_batches_of_every_codec_are_the_streamed_ones_through_all_views_and_again(made, manifest, roots):
    recipe, place = made
    streamed, resident = loaders(recipe, manifest, roots, place)
    for epoch in range(3):
        assert_equal(streamed.epoch(epoch), resident.epoch(epoch))
    assert sum(int((batch.labels < 0).sum()) for batch in resident.epoch(0)) > 150
    streamed, resident = loaders(recipe, manifest, roots, place, views_per_decode=3, batch_size=50)
    assert_equal(streamed.epoch(3), resident.epoch(3))


def test_whatever_the_order_the_ranks_and_the_step_to_go_on_from(recipe, manifest, roots, store_path):
    for rank in (0, 2):
        streamed, resident = loaders(recipe, manifest, roots, store_path, rank=rank, world=3, pool_blocks=2)
        assert_equal(streamed.epoch(4, 13), resident.epoch(4, 13))


def test_a_run_goes_on_resident_where_it_was_streamed_to_the_same_student(
    recipe, manifest, roots, store_path, tmp_path
):
    few = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"tars": [2]}),
            "training": recipe.training.model_copy(update={"checkpoint_steps": 3, "epochs": 1}),
        }
    )
    about = {"objective": "kd", "stores": [str(store_path)]}
    whole = distill(few, manifest, roots, tmp_path / "whole", CPU, **about)
    ended = 0

    class Ended(Exception):
        pass

    def until(self: Loader, epoch: int, first_step: int = 0) -> Iterator[Rows]:
        nonlocal ended
        for batch in epochs(self, epoch, first_step):
            if (epoch, batch.step) == (0, 4):
                ended += 1
                raise Ended
            yield batch

    epochs = Loader.epoch
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Loader, "epoch", until)
        with pytest.raises(Ended):
            distill(few, manifest, roots, tmp_path / "again", CPU, **about)
    result = distill(kept(few), manifest, roots, tmp_path / "again", CPU, **about)
    assert ended == 1
    assert result.student_sha256 == whole.student_sha256


def test_what_a_stream_refuses_is_refused_when_it_is_loaded(recipe, manifest, roots, store_path, tmp_path):
    samples = digits_samples()["train"]
    samples[700] = replace(samples[700], label=(samples[700].label + 1) % 10)
    tars = pack(samples, tmp_path / "digits", "train", 512)
    digits = manifest.datasets["digits"]
    split = digits.splits["train"].model_copy(update={"tars": tars})
    changed = digits.model_copy(update={"splits": digits.splits | {"train": split}})
    other = manifest.model_copy(update={"datasets": {"digits": changed}})
    streamed, resident = loaders(recipe, other, data_roots([tmp_path]), store_path)
    said = []
    for loader in (streamed, resident):
        with pytest.raises(StoreMismatch, match="has label") as refused:
            list(loader.epoch(0))
        said.append(str(refused.value))
    assert said[0] == said[1]


# ---- any order, without a store --------------------------------------------------------------------------------------


class Coloured(MadeUp):
    """With pixels that differ between all rows."""

    def __getitem__(self, number: int) -> ImageBlock:
        block = super().__getitem__(number)
        pixels = np.random.default_rng(number).integers(0, 256, (len(block), 3, 4, 4), dtype=np.uint8)
        return replace(block, pixels=torch.from_numpy(pixels))

    def in_order(self, numbers: Iterable[int]) -> Iterator[tuple[int, ImageBlock]]:
        return ((number, self[number]) for number in numbers)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 20),
)
def test_whatever_the_sizes_batches_pools_seeds_and_ranks(sizes, batch_size, pool_blocks, seed, at_once, world, first):
    views = PadCropFlip(kind="pad_crop_flip", padding=1)
    source = Source(Coloured(sizes), views, view_groups(views.num_views, 6))
    resident = Resident(source, 0, CPU)
    for rank in range(min(world, batch_size)):
        options = Options(
            batch_size, seed, pool_blocks, 0.5, views_per_decode=at_once, rank=rank, world=min(world, batch_size)
        )
        streamed, there = Loader(source, options, CPU), Loader(source, options, CPU, None, resident)
        first = min(first, len(streamed) - 1)
        assert_equal(streamed.epoch(7 * at_once, first), there.epoch(7 * at_once, first))
        if options.world == 1:
            lengths = [[len(batch) for batch in there.epoch(epoch * at_once)] for epoch in range(3)]
            assert lengths[0] == lengths[1] == lengths[2]
            assert set(lengths[0][:-1]) <= {batch_size}


# ---- bad images, resampled views -------------------------------------------------------------------------------------


def test_bad_images_of_one_size_are_left_out_and_listed(tmp_path, capsys):
    samples = digits_samples()["train"][:120]
    samples[7] = replace(samples[7], encoded=b"no image")
    split = Split(tars=pack(samples, tmp_path / "digits", "train", 50))
    manifest = Manifest(
        datasets={"digits": Dataset(folder="digits", classes=list("0123456789"), splits={"train": split})}
    )
    recipe = make_recipe(data={"bad_images": "skip"}, objectives={"ce": [{"term": "ce"}]})
    streamed, resident = loaders(recipe, manifest, data_roots([tmp_path]), None, batch_size=16)
    for epoch in (0, 1, 9):
        assert_equal(streamed.epoch(epoch), resident.epoch(epoch))
    assert streamed.bad == resident.bad
    assert len(resident.bad) == 1


@pytest.mark.parametrize("in_store", [True, False])
def test_resampled_and_mixed_views_are_kept_as_pixels_where_that_is_asked_for(tmp_path, in_store):
    recipe, manifest = photographs(tmp_path, with_bad_ones(), data={"bad_images": "skip"})
    place = tmp_path / "store" if in_store else None
    if place:
        cache_teacher(recipe, manifest, [tmp_path], place, CPU)
    streamed, resident = loaders(recipe, manifest, [tmp_path], place)
    for epoch in (0, 3):
        assert_equal(streamed.epoch(epoch), resident.epoch(epoch))
    assert any((batch.share < 1).any() for batch in resident.epoch(0))
    assert streamed.bad == resident.bad
    assert len(resident.bad) == 3


def test_views_in_the_size_of_a_live_teacher_are_streamed_and_that_is_said(tmp_path, capsys):
    recipe, manifest = photographs(tmp_path, make_samples())
    source = source_of(recipe, training_images(recipe, manifest, [tmp_path]))
    loader = make_loader(kept(recipe), source, 0, CPU, 24)
    assert loader.resident is None
    assert "so this run is streamed" in capsys.readouterr().err


# ---- does it fit? ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_or_streamed(recipe, manifest, roots, monkeypatch, capsys):
    source, gpu = source_of(recipe, training_images(recipe, manifest, roots)), torch.device("cuda", 0)
    options = Options(batch_size=64)
    resident = Resident(source, 0, CPU)
    needed = resident.bytes_needed()
    Loader(source, options, CPU, None, resident).epoch(0)
    resident.load(Loader(source, options, CPU).reader.order())
    tables = [resident.images, *resident.table.fields()]
    assert sum(table.nbytes for table in tables) == needed
    # A device with just enough room, and with a byte too little; nothing is put there before it is needed.
    monkeypatch.setattr(residence, "free_bytes", lambda device: 2 * needed)
    for choice, device, is_kept in (
        ("auto", gpu, True), ("auto", CPU, False), ("always", CPU, True), ("never", gpu, False),
    ):  # fmt: skip
        assert (resident_if_it_fits(choice, source, options, device) is not None) == is_kept
    monkeypatch.setattr(residence, "free_bytes", lambda device: 2 * needed - 2)
    capsys.readouterr()
    assert resident_if_it_fits("auto", source, options, gpu) is None
    assert f"are streamed: on the device they would need {needed:,} bytes" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=f"need {needed:,} bytes, 50% of what is free on cpu are {needed - 1:,}: use"):
        make_loader(kept(recipe), source, 0, CPU)


def test_free_memory_is_some_and_no_more_than_there_is():
    with open("/proc/meminfo") as lines:
        total = int(next(line for line in lines if line.startswith("MemTotal")).split()[1]) * 1024
    assert 2**20 < residence.free_bytes(CPU) < total


def test_recipes_that_say_nothing_of_it_are_written_as_before():
    assert "resident" not in dump_recipe(make_recipe())
    assert "resident: always" in dump_recipe(kept(make_recipe()))


# ---- several seeds ---------------------------------------------------------------------------------------------------


def test_a_second_seed_reads_nothing_of_what_the_first_has_read(recipe, manifest, data_root, store_path, tmp_path):
    """What was read is gone by then; its student is the one that is trained alone."""
    few = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"tars": [2]}),
            "training": recipe.training.model_copy(update={"epochs": 1}),
            "views": recipe.views.with_count(3),
        }
    )
    trained = []
    for choice in ("always", "never"):
        data, store, shared = tmp_path / choice / "data", tmp_path / choice / "store", Shared()
        shutil.copytree(data_root, data)
        shutil.copytree(store_path, store)
        for name, seed in (("first", 0), ("second", 1)):
            trained.append(
                distill(
                    kept(few, choice), manifest, data_roots([data]), tmp_path / choice / name, CPU, objective="kd",
                    seed=seed, stores=[str(store)], shared=shared,
                )
            )  # fmt: skip
            shutil.rmtree(data, ignore_errors=True)
            shutil.rmtree(store, ignore_errors=True)
    alone = distill(
        few,
        manifest,
        data_roots([data_root]),
        tmp_path / "alone",
        CPU,
        objective="kd",
        seed=1,
        stores=[str(store_path)],
    )
    assert {one.student_sha256 for one in trained[1::2]} == {alone.student_sha256}
    assert trained[0].student_sha256 != alone.student_sha256


def test_runs_about_other_things_share_nothing():
    shared, made = Shared(), []

    def make(what: object) -> object:
        made.append(what)
        return [what]

    first = shared.once("images", ("a", 1), lambda: make("a"))
    assert shared.once("images", ("a", 1), lambda: make("b")) is first
    assert shared.once("images", ("a", 2), lambda: make("c")) == ["c"]
    assert shared.once("stores", ("a", 1), lambda: make("d")) == ["d"]
    assert made == ["a", "c", "d"]


# ---- for a GPU, without one ------------------------------------------------------------------------------------------


def test_no_batch_of_a_pass_is_waited_for():
    views = PadCropFlip(kind="pad_crop_flip", padding=1)
    source = Source(Coloured([30, 20]), views, view_groups(views.num_views, 6))
    loader = Loader(source, Options(8), CPU, None, Resident(source, 0, CPU))
    with torch.autograd.profiler.profile() as profile:
        assert len(list(loader.epoch(1))) == len(loader) == 7
    done = {event.name for event in profile.function_events}
    assert "aten::index_select" in done
    assert not done & {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}


@pytest.mark.parametrize("exact", [True, False])
def test_making_a_batch_needs_no_answer_of_the_device(exact):
    """Tensors of a GPU that is not there: what would wait for one, or mixes devices, is refused."""
    with FakeTensorMode(), torch.device("cuda"):
        places = 40
        pixels = None if exact else torch.zeros(places, 16, 16, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        table = Rows(
            key_hash=np.zeros(0, dtype=np.uint64),
            labels=torch.zeros(places, dtype=torch.int64),
            other_labels=torch.zeros(places, dtype=torch.int64),
            share=torch.ones(places),
            signal=[
                StoredSignal(
                    {"values": torch.zeros(places, 10, dtype=torch.float16)},
                    {"last": {"id": torch.zeros(places, 8, 8, dtype=torch.int32)}},
                )
            ],
            pixels=pixels,
            box=torch.zeros(places, 4, dtype=torch.int16) if exact else None,
            flip=torch.zeros(places, dtype=torch.uint8) if exact else None,
        )
        images = torch.zeros(20, 3, 16, 16, dtype=torch.uint8) if exact else None
        at = torch.zeros(64, dtype=torch.int64)[8:16]
        known = torch.ones(64, dtype=torch.bool)[8:16]
        rows = rows_at(table, images, at, at // 2, known, (16, 16), "reflect")
    assert rows.images.shape == (8, 3, 16, 16)
    assert {tensor.device.type for tensor in rows.fields()} == {"cuda"}
    assert rows.signal[0].logits["values"].shape == (8, 10)
