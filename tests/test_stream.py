"""The right label for the pixels: what stage 2 pairs is what the teacher was shown, whatever happened in between."""

import gc
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import DIGEST_BYTES, BlockLoader, ImageBlock
from offline_kd.data.manifest import Dataset, Split, Tar
from offline_kd.data.packing import encode_png, pack
from offline_kd.data.tars import Sample, read_tar
from offline_kd.distill.loader import Loader
from offline_kd.distill.reader import Options, Piece, Source
from offline_kd.distill.sampler import Order, home_workers
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.store.opening import open_store
from offline_kd.support.errors import RecipeError, StoreMismatch
from offline_kd.views.epochs import view_groups, view_of_epoch
from offline_kd.views.pad_crop_flip import PadCropFlip

NUM_SAMPLES, NUM_VIEWS = 1438, 9


def all_batches(stream, epochs):
    return [batch for epoch in epochs for batch in stream.epoch(epoch)]


def test_the_student_sees_the_very_pixels_and_gets_the_very_logits_of_the_teacher(
    recipe, manifest, roots, tmp_path, monkeypatch
):
    """Every one of the 12,942 rows, spied on at the teacher's input and compared to the bit."""
    seen: list[torch.Tensor] = []
    asked = Teacher._ask

    def spy(self: Teacher, images: torch.Tensor, points: Sequence[TapPoint]) -> object:
        seen.append(images.clone())
        return asked(self, images, points)

    monkeypatch.setattr(Teacher, "_ask", spy)
    cache_teacher(recipe, manifest, roots, tmp_path / "store", CPU)
    monkeypatch.undo()
    store = open_store(tmp_path / "store")
    loader = training_images(recipe, manifest, roots)
    first = 359  # the gate's images came before
    pixels = torch.cat(seen)[first : first + NUM_SAMPLES * NUM_VIEWS]

    # Stage 1 asks block by block, group by group, sample by sample, view by view.
    shown: dict[tuple[int, int], torch.Tensor] = {}
    at = 0
    for block in loader:
        for group in store.identity.groups:
            for key in block.key_hash.tolist():
                for view in group:
                    shown[key, view] = pixels[at]
                    at += 1
    assert at == len(pixels)

    teacher = load_teacher(recipe, manifest, roots, 10, CPU)
    stream = make_loader(recipe, source_of(recipe, loader, [store], recipe.objectives["kd"]), 5, CPU)
    used = set()
    for epoch in range(NUM_VIEWS):
        for batch in stream.epoch(epoch):
            group, position = view_of_epoch(5, batch.key_hash, epoch, store.identity.groups)
            logits = batch.teacher_logits
            torch.testing.assert_close(logits, teacher.logits(batch.images), rtol=1e-5, atol=1e-4)
            for row, key in enumerate(batch.key_hash.tolist()):
                view = store.identity.groups[group].start + int(position[row])
                assert torch.equal(batch.images[row], shown[key, view])
                used.add((key, view))
    assert len(used) == NUM_SAMPLES * NUM_VIEWS


def test_a_run_without_the_store_has_the_same_views_in_the_same_order(recipe, manifest, roots, store_path):
    store = open_store(store_path)
    loader = training_images(recipe, manifest, roots)
    with_store = make_loader(recipe, source_of(recipe, loader, [store], recipe.objectives["kd"]), 3, CPU)
    without = make_loader(recipe, source_of(recipe, loader), 3, CPU)
    for epoch in (0, 4, 11):
        for one, other in zip(with_store.epoch(epoch), without.epoch(epoch), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert np.array_equal(one.key_hash, other.key_hash)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(recipe, manifest, roots, store_path, workers):
    store = open_store(store_path)
    loader = training_images(recipe, manifest, roots)
    alone = make_loader(recipe, source_of(recipe, loader, [store], recipe.objectives["kd"]), 1, CPU)
    helped_recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    helped = make_loader(
        helped_recipe, source_of(helped_recipe, loader, [store], helped_recipe.objectives["kd"]), 1, CPU
    )
    for one, other in zip(all_batches(alone, (0, 1)), all_batches(helped, (0, 1)), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.signal[0].logits["values"], other.signal[0].logits["values"])


class MadeUp:
    """A loader of made-up blocks of the given sizes."""

    is_remote = False

    def __init__(self, sizes: list[int]) -> None:
        self.split = Split(tars=[Tar(file=str(index), count=size) for index, size in enumerate(sizes)])
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return len(self.split.tars)

    def fetch_ahead(self, number: int) -> None:
        pass

    def __getitem__(self, number: int) -> ImageBlock:
        ids = np.arange(self.starts[number], self.starts[number + 1], dtype=np.uint64)
        return ImageBlock(
            where=str(number),
            sha256="",
            keys=[str(key) for key in ids],
            key_hash=ids,
            image_digest=np.zeros((len(ids), DIGEST_BYTES), dtype=np.uint8),
            image_crc=ids.astype(np.uint32),
            labels=ids.astype(np.int32),
            encoded=[],
            pixels=torch.zeros(len(ids), 3, 4, 4, dtype=torch.uint8),
        )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=7),
    st.integers(2, 30),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_every_epoch_has_every_sample_once_in_full_batches(sizes, batch_size, pool_blocks, epoch, seed):
    views = PadCropFlip(kind="pad_crop_flip", padding=1)
    source = Source(MadeUp(sizes), views, view_groups(views.num_views, 6))
    stream = Loader(source, Options(batch_size, seed, pool_blocks), CPU)
    batches = list(stream.epoch(epoch))
    ids = np.concatenate([batch.key_hash for batch in batches])
    assert sorted(ids.tolist()) == list(range(sum(sizes)))
    assert len(batches) == stream.steps_per_pass
    lengths = [len(batch.labels) for batch in batches]
    assert all(length == batch_size for length in lengths[:-1])
    assert lengths[-1] < batch_size + max(2, batch_size // 8)
    assert lengths[-1] > 1 or sum(sizes) == 1
    again = np.concatenate([batch.key_hash for batch in stream.epoch(epoch)])
    assert np.array_equal(again, ids)


def stream_of(sizes: list[int], *, batch_size: int, pool_blocks: int = 2, seed: int = 0, **more: object) -> Loader:
    views = PadCropFlip(kind="pad_crop_flip", padding=1)
    source = Source(MadeUp(sizes), views, view_groups(views.num_views, 6))
    return Loader(source, Options(batch_size, seed, pool_blocks, **more), CPU)


def shown(stream: Loader, epoch: int = 0, first_step: int = 0) -> list[list[int]]:
    """Keys by step."""
    return [batch.key_hash.tolist() for batch in stream.epoch(epoch, first_step)]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 24),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 40),
    st.integers(0, 10**6),
)
def test_any_ranks_share_every_batch_and_any_others_go_on_with_exactly_what_was_not_seen(
    sizes, batch_size, world, others, pool_blocks, at_once, stop, seed
):
    """What one process shows, in its order, dealt out: up to any step by some ranks, from there on by others."""
    more = {"batch_size": batch_size, "pool_blocks": pool_blocks, "views_per_decode": at_once, "seed": seed}
    alone = shown(stream_of(sizes, **more), at_once)
    assert sorted(key for keys in alone for key in keys) == sorted(at_once * list(range(sum(sizes))))
    assert len(alone) == stream_of(sizes, **more).steps_per_pass
    assert [len(keys) for keys in alone[:-1]] == [batch_size] * (len(alone) - 1)
    assert len(alone[-1]) < batch_size + max(2, batch_size // 8)
    stop = min(stop, len(alone))
    for ranks, begin, end in ((min(world, batch_size), 0, stop), (min(others, batch_size), stop, None)):
        streams = [stream_of(sizes, rank=rank, world=ranks, **more) for rank in range(ranks)]
        shares = [shown(stream, at_once, begin)[: None if end is None else end - begin] for stream in streams]
        for step, keys in enumerate(alone[begin:end]):
            for rank in range(ranks):
                assert shares[rank][step] == keys[rank::ranks]
        assert {len(share) for share in shares} == {len(alone[begin:end])}


def test_ranks_without_a_row_get_empty_batches_that_a_network_and_a_loss_take(recipe, manifest, roots, store_path):
    images = training_images(recipe, manifest, roots)
    source = source_of(recipe, images, [open_store(store_path)], recipe.objectives["kd"])
    # Of 1,438 rows the second batch has 438.
    stream = Loader(source, Options(batch_size=1000, rank=999, world=1000), CPU, recipe.data.normalisation)
    first, last = stream.epoch(0)
    assert (len(first), len(last)) == (1, 0)
    for one, other in zip(first.fields(), last.fields(), strict=True):
        assert (one.dtype, one.shape[1:]) == (other.dtype, other.shape[1:])
    assert last.teacher_logits.shape == (0, 10)
    assert [batch.step for batch in (first, last)] == [0, 1]


def test_seven_unequal_tars_three_workers_and_five_ranks_show_every_sample_once():
    sizes = [40, 7, 33, 1, 58, 12, 21]
    for rank in (0, 4):
        stream = stream_of(sizes, batch_size=16, rank=rank, world=5, workers=3)
        alone = stream_of(sizes, batch_size=16, rank=rank, world=5)
        for epoch in range(2):
            assert shown(stream, epoch) == shown(alone, epoch)
        next(stream.epoch(2))  # and given up
        assert shown(stream, 0, 4) == shown(alone, 0)[4:]


def test_pieces_of_later_pools_wait_with_the_workers_however_uneven_tars_are(monkeypatch):
    """One worker reads giants in several pieces each, the other tiny tars: nothing piles up in the training process."""
    monkeypatch.setattr("offline_kd.distill.reader.PIECE_BYTES", 64 * 3 * 4 * 4)  # 64 images
    sizes = [1, 500, 2, 3, 1, 400, 2, 1, 3, 2, 300, 1]
    stream = stream_of(sizes, batch_size=32, pool_blocks=3, workers=2)
    assert stream.reader.rows_in_piece(3 * 4 * 4) == 64
    # Those of the pool that is shown have become rows.
    assert max(sum(type(one) is Piece for one in gc.get_objects()) for _ in stream.epoch(0)) == 0


def test_more_ranks_than_a_batch_has_rows_are_refused():
    with pytest.raises(RecipeError, match="rank 3 of 3 with batches of 8: ranks are numbered from 0"):
        stream_of([10], batch_size=8, rank=3, world=3)
    with pytest.raises(RecipeError, match=r"rank 0 of 9 with batches of 8: .*as many as a batch has rows"):
        stream_of([10], batch_size=8, world=9)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(0, 9),
    st.sampled_from([1.0, 1.25, 2.0]),
)
def test_a_tar_stays_with_its_worker_unless_a_pool_would_be_shared_badly(
    counts, pool_blocks, num_workers, epoch, uneven
):
    order, homes = Order(0, epoch, 1, counts, pool_blocks, 8), home_workers(counts, num_workers)
    for pool in range(order.num_pools):
        tars = order.tars[order.positions(pool)].tolist()
        workers = order.workers(pool, homes, uneven)
        load, at_home = [0] * num_workers, [0] * num_workers
        for tar, worker in zip(tars, workers, strict=True):
            load[worker] += counts[tar]
            at_home[homes[tar]] += counts[tar]
        even = sum(load) / num_workers
        assert max(load) <= max(uneven * even, even + max(counts[tar] for tar in tars))
        if max(at_home) <= uneven * even or order.num_pools == 1:
            assert workers == [homes[tar] for tar in tars]


def test_several_views_of_a_decoded_image_are_those_of_so_many_epochs():
    sizes = [30, 11, 25]
    at_once = stream_of(sizes, batch_size=8, views_per_decode=3)
    assert at_once.steps_per_pass == -(-3 * 66 // 8)
    keys = [key for keys in shown(at_once, 3) for key in keys]
    assert sorted(keys) == sorted(3 * list(range(66)))

    def boxes(stream: Loader, epochs: range) -> list[tuple[int, ...]]:
        parts = []
        for epoch in epochs:
            stream.reader.start[0], stream.reader.start[1] = epoch, 0
            parts += list(stream.reader)
        return sorted(
            (int(key), *box.tolist(), int(flip))
            for part in parts
            for key, box, flip in zip(part.rows.key_hash, part.rows.box, part.rows.flip, strict=True)
        )

    assert boxes(at_once, range(3, 4)) == boxes(stream_of(sizes, batch_size=8), range(3, 6))


def test_order_changes_with_epoch_and_seed(recipe, manifest, roots):
    loader = training_images(recipe, manifest, roots)
    orders = {
        tuple(
            np.concatenate(
                [batch.key_hash for batch in make_loader(recipe, source_of(recipe, loader), seed, CPU).epoch(epoch)]
            )
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_hidden_labels_are_the_same_samples_in_every_epoch_and_for_every_seed(recipe, manifest, roots):
    few = recipe.model_copy(update={"data": recipe.data.model_copy(update={"labelled_fraction": 0.1})})
    loader = training_images(few, manifest, roots)
    shown = []
    for seed, epoch in ((0, 0), (0, 3), (1, 0)):
        batches = list(make_loader(few, source_of(few, loader), seed, CPU).epoch(epoch))
        labels, keys = torch.cat([batch.labels for batch in batches]), np.concatenate([b.key_hash for b in batches])
        shown.append({int(key) for key in keys[(labels >= 0).numpy()]})
    assert shown[0] == shown[1] == shown[2]
    assert 110 < len(shown[0]) < 180


# ---- other forms of the dataset --------------------------------------------------------------------------------------


def digits(data_root: Path) -> list[Sample]:
    files = sorted((data_root / "digits").glob("train-*.tar"))
    return [sample for file in files for sample in read_tar(file)[0]]


def loader_of(folder: Path, parts: list[list[Sample]]) -> BlockLoader:
    tars = [pack(part, folder / "set", f"part{index}", 10_000)[0] for index, part in enumerate(parts)]
    dataset = Dataset(folder="set", classes=[str(digit) for digit in range(10)], splits={"train": Split(tars=tars)})
    return BlockLoader(dataset, dataset.splits["train"], [folder])


def rows_by_key(recipe, loader, store, epoch=2):
    rows = {}
    for batch in make_loader(recipe, source_of(recipe, loader, [store], recipe.objectives["kd"]), 0, CPU).epoch(epoch):
        logits = batch.teacher_logits
        for row, key in enumerate(batch.key_hash.tolist()):
            rows[key] = (batch.images[row], int(batch.labels[row]), logits[row])
    return rows


def test_a_resharded_reordered_part_of_the_dataset_gets_the_right_rows(
    recipe, manifest, roots, data_root, store_path, tmp_path
):
    store = open_store(store_path)
    expected = rows_by_key(recipe, training_images(recipe, manifest, roots), store)
    samples = digits(data_root)[::-1][:1100]
    loader = loader_of(tmp_path, [samples[:300], samples[300:310], samples[310:]])
    found = rows_by_key(recipe, loader, store)
    assert len(found) == 1100
    for key, (image, label, logits) in found.items():
        assert torch.equal(image, expected[key][0])
        assert label == expected[key][1]
        assert torch.equal(logits, expected[key][2])


def first_epoch(recipe, loader, store_path):
    store = open_store(store_path)
    list(make_loader(recipe, source_of(recipe, loader, [store], recipe.objectives["kd"]), 0, CPU).epoch(0))


def test_another_dataset_with_the_same_keys_is_refused(recipe, data_root, store_path, tmp_path):
    others = [
        Sample(sample.key, sample.label, encode_png(np.full((8, 8), index % 256, dtype=np.uint8)), "png")
        for index, sample in enumerate(digits(data_root))
    ]
    with pytest.raises(StoreMismatch, match=r"the image of sample '0000' \(and 1437 more\) has sha256"):
        first_epoch(recipe, loader_of(tmp_path, [others]), store_path)


def test_one_changed_image_is_named(recipe, data_root, store_path, tmp_path):
    samples = digits(data_root)
    darker = encode_png(np.zeros((8, 8), dtype=np.uint8))
    samples[77] = Sample(samples[77].key, samples[77].label, darker, "png")
    with pytest.raises(StoreMismatch, match=rf"the image of sample '{samples[77].key}' \(and 0 more\)"):
        first_epoch(recipe, loader_of(tmp_path, [samples]), store_path)


def test_one_changed_label_is_named(recipe, data_root, store_path, tmp_path):
    samples = digits(data_root)
    one = samples[99]
    samples[99] = Sample(one.key, (one.label + 1) % 10, one.encoded, "png")
    message = rf"sample '{one.key}' \(and 0 more\) has label {(one.label + 1) % 10}, in the store .* it has {one.label}"
    with pytest.raises(StoreMismatch, match=message):
        first_epoch(recipe, loader_of(tmp_path, [samples]), store_path)


def test_a_sample_that_the_teacher_never_saw_is_named(recipe, data_root, store_path, tmp_path):
    samples = digits(data_root)[:50]
    samples[3] = Sample("new-image", 0, samples[3].encoded, "png")
    with pytest.raises(StoreMismatch, match=re.escape("sample 'new-image' (and 0 more) is not in the store")):
        first_epoch(recipe, loader_of(tmp_path, [samples]), store_path)
