"""The right label for the pixels: what stage 2 pairs is what the teacher was shown, whatever happened in between."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import DIGEST_BYTES, BlockLoader, ImageBlock
from offline_kd.data.manifest import Dataset, Split, Tar
from offline_kd.data.packing import encode_png, pack
from offline_kd.data.tars import Sample, read_tar
from offline_kd.distill.loader import Loader
from offline_kd.distill.reader import Options, Source
from offline_kd.distill.training import make_loader, source_of, training_images
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
    asked = Teacher.logits

    def spy(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        seen.append(images.clone())
        return asked(self, images)

    monkeypatch.setattr(Teacher, "logits", spy)
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


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=7),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_ranks_share_every_epoch_evenly_and_no_sample_is_lost_or_doubled(sizes, per_rank, world, pool_blocks, seed):
    options = {"batch_size": per_rank * world, "pool_blocks": pool_blocks, "seed": seed}
    together = shown(stream_of(sizes, **options))
    rest = sum(sizes) % options["batch_size"]
    assume(world == 1 or not max(2, options["batch_size"] // 8) <= rest < 2 * world)  # refused
    ranks = [shown(stream_of(sizes, rank=rank, world=world, **options)) for rank in range(world)]
    assert sorted(key for keys in together for key in keys) == list(range(sum(sizes)))
    if sum(sizes) >= 2 * world:
        for step, keys in enumerate(together):
            shares = [rank[step] for rank in ranks]
            assert sorted(key for share in shares for key in share) == sorted(keys)
            assert all(len(share) == per_rank for share in shares) or step == len(together) - 1
    counts = [sum(map(len, rank)) for rank in ranks]
    assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 40), st.sampled_from([1, 2, 4]))
def test_what_is_left_of_an_epoch_after_a_stop_is_exactly_what_was_not_seen(sizes, stop, world):
    batch_size = 8
    before = shown(stream_of(sizes, batch_size=batch_size))
    stop = min(stop, len(before))
    assume(world == 1 or not 2 <= sum(sizes) % batch_size < 2 * world)  # refused
    rest = [shown(stream_of(sizes, batch_size=batch_size, rank=rank, world=world), 0, stop) for rank in range(world)]
    seen = [key for keys in before[:stop] for key in keys]
    left = [key for rank in rest for keys in rank for key in keys]
    assert sorted(seen + left) == list(range(sum(sizes)))
    if world == 1:
        assert rest[0] == before[stop:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_seven_unequal_tars_three_workers_and_two_ranks_show_every_sample_once():
    sizes = [40, 7, 33, 1, 58, 12, 21]
    seen = []
    for rank in range(2):
        stream = stream_of(sizes, batch_size=16, rank=rank, world=2, workers=3)
        alone = stream_of(sizes, batch_size=16, rank=rank, world=2)
        for epoch in range(2):
            assert shown(stream, epoch) == shown(alone, epoch)
        assert shown(stream, 0, 4) == shown(alone, 0)[4:]
        seen += [key for keys in shown(stream) for key in keys]
    assert sorted(seen) == list(range(sum(sizes)))


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


def test_a_number_of_ranks_that_cannot_share_evenly_is_refused():
    with pytest.raises(RecipeError, match="5 ranks: their number must divide the batch size, 8, and 96"):
        stream_of([10], batch_size=8, world=5)


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
