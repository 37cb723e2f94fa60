"""What `bench` measures is what it says it measures; what its ratios should be; what `make bench` finds worse."""

import math
import shlex

import bench_growth
import pytest
import torch
import yaml
from bench_growth import Size, in_turn, per_unit, works
from bench_guard import FILE, TOLERANCE, worse_by
from conftest import CPU, RECIPE, ROOT
from torchvision.transforms import v2

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.cli.bench import command
from offline_kd.cli.bench_loaders import loader_parts, pictures_of, same_views, torchvision_parts
from offline_kd.cli.bench_material import BENCH_TARS, Bench, small_recipe
from offline_kd.cli.bench_stage_1 import stage_1_parts
from offline_kd.cli.bench_timing import RATIOS, STAGE_1, Timed, quotient, ratios_of, time_in_turn
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.support.places import Folder
from offline_kd.views.kind import draw
from offline_kd.views.pad_crop_flip import PadCropFlip
from offline_kd.views.random_resized_crop import RandomCrop
from offline_kd.views.render import render, size_of_boxes

CROPS = {"kind": "random_resized_crop", "size": 8, "interpolation": "bicubic", "count": 2, "seed": 1}


def made(recipe, manifest, roots, folder) -> Bench:
    """As `bench` makes it: two batches, two views."""
    small, manifest = small_recipe(recipe, manifest, roots, folder, (2, 2))
    roots = [folder, *roots]
    images = training_images(small, manifest, roots)
    teacher = load_teacher(small, manifest, roots, 10, CPU)
    cache_teacher(small, manifest, roots, folder / "store", CPU)
    terms = recipe.objectives["kd"]
    return Bench(small, terms, manifest, roots, images, teacher, open_store(folder / "store"), folder, CPU)


@pytest.fixture(scope="module")
def bench(recipe, manifest, roots, tmp_path_factory) -> Bench:
    return made(recipe, manifest, roots, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def bench_of_crops(manifest, roots, tmp_path_factory) -> Bench:
    """Of a teacher that was never trained, on views that are resampled."""
    decisions = {"last": {"kind": "templates", "module": "body.5", "templates": 4}}
    content = RECIPE | {"views": CROPS, "capture": {"codec": {"name": "f16"}, "decisions": decisions}}
    return made(Recipe.model_validate(content), manifest, roots, tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def stage_1(bench, bench_of_crops) -> list[tuple[Bench, dict[str, Timed]]]:
    return [(this, stage_1_parts(this)) for this in (bench, bench_of_crops)]


# ---- what is measured ----------------------------------------------------------------------------------------------


def test_the_stage_1_that_is_timed_writes_what_cache_teacher_wrote(stage_1):
    for this, parts in stage_1:
        written, part = Folder(this.folder / "stage-1"), parts["stage 1"]
        part.before()
        part.work()
        wanted = [name for folder in ("targets.zarr", "ledger") for name, _ in this.store.place.files(folder)]
        assert len(wanted) > 4 * BENCH_TARS
        for name in wanted:
            assert written.read(name) == this.store.place.read(name), name
        assert part.batches == this.batches * 2  # views
        part.before()  # every round writes a store of its own
        assert not [name for name, _ in written.files("ledger") if name.startswith("ledger/0")]


def test_decoding_is_timed_apart_where_views_are_resampled(stage_1):
    (_, exact), (_, resampled) = stage_1
    assert set(exact) == {"bare teacher", "stage 1", "commit", "bare zarr writes"}
    assert set(resampled) == {*exact, "stage 1, logits only", "decoding alone"}
    for name in ("stage 1, logits only", "decoding alone"):
        resampled[name].before()
        resampled[name].work()


def test_a_bench_has_several_blocks_and_all_samples_that_were_asked_for(bench):
    assert len(bench.images) == bench.store.identity.num_blocks == BENCH_TARS
    assert bench.images.split.count == 2 * bench.recipe.training.batch_size
    assert bench.batches == 2


def test_the_first_batch_is_the_first_batch_of_a_run_from_the_store(bench):
    loader = make_loader(bench.recipe, source_of(bench.recipe, bench.images, [bench.store], bench.terms), 0, CPU)
    parts = loader_parts(bench, loader)
    first, *_ = parts["first batch"].work()
    expected = next(loader.epoch(0))
    assert torch.equal(first.images, expected.images)
    assert torch.equal(first.teacher_logits, expected.teacher_logits)
    assert parts["first batch"].batches == 1


def test_a_store_that_is_read_anew_is_one_of_which_nothing_is_kept(bench, monkeypatch):
    loader = make_loader(bench.recipe, source_of(bench.recipe, bench.images, [bench.store], bench.terms), 0, CPU)
    parts, read = loader_parts(bench, loader), []
    verified = Store.verified
    monkeypatch.setattr(Store, "verified", lambda *about: read.append(about) or verified(*about))
    parts["loader alone"].work()
    read.clear()
    parts["loader alone"].work()
    assert not read
    for _ in range(2):
        parts["loader, store read anew"].before()
        parts["loader, store read anew"].work()
        assert len(read) >= BENCH_TARS
        read.clear()


def test_torchvisions_loader_shows_the_same_kind_of_views(bench, bench_of_crops):
    """Where pixels are copied, every image of a batch of theirs is one of our views."""
    views = PadCropFlip(kind="pad_crop_flip", padding=1)
    block = bench.images[0]
    parameters = draw(views, block.key_hash, block.sizes())
    box, flip = (torch.from_numpy(parameters[name][0]) for name in ("box", "flip"))
    ours = render(
        block.images[:1].expand(views.num_views, -1, -1, -1), box, flip, size_of_boxes(parameters["box"]), "zeros"
    )
    theirs = v2.Compose(same_views(views, tuple(block.images.shape[2:])))
    shown = [theirs(block.images[0]) for _ in range(20)]
    found = {int((ours == one).flatten(1).all(dim=1).nonzero()[0]) for one in shown}
    assert len(found) > 5
    for this in (bench, bench_of_crops):
        parts = torchvision_parts(this)
        assert set(parts) == {"torchvision, Pillow", "torchvision, tensors"}
        for part in parts.values():
            part.work()
            assert part.batches == this.batches
        for pictures in pictures_of(this).values():
            image, label = pictures[0]
            assert (image.dtype, image.shape, label) == (torch.uint8, (3, 8, 8), int(this.images[0].labels[0]))


def test_views_that_torchvision_has_no_loader_for_are_compared_with_none():
    augmented = RandomCrop.model_validate({**CROPS, "erase": {"probability": 0.5}})
    assert same_views(augmented, (0, 0)) is None
    assert len(same_views(RandomCrop.model_validate(CROPS), (0, 0))) == 2


# ---- timing and ratios ---------------------------------------------------------------------------------------------


def test_parts_take_turns_and_the_first_round_and_what_is_made_ready_are_not_counted(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr("offline_kd.cli.bench_timing.time.perf_counter", lambda: now[0])

    def works_for(name: str, seconds: float):
        def work() -> None:
            order.append(name)
            now[0] += seconds * (100 if len(order) <= 2 else 1)

        return work

    def make_ready() -> None:
        now[0] += 1000

    parts = {"a": Timed(works_for("a", 2.0), 4), "b": Timed(works_for("b", 3.0), 1, make_ready)}
    assert time_in_turn(parts, 3, CPU) == {"a": [0.5] * 3, "b": [3.0] * 3}
    assert order == ["a", "b"] * 4


def test_a_ratio_is_the_median_of_the_ratios_within_a_round():
    seconds = {"above": [1.0, 20.0, 3.0], "below": [1.0, 10.0, 1.0]}
    assert quotient("above", "below").median(seconds) == 2.0


def test_a_ratio_that_is_not_what_it_should_be_is_named_in_its_own_direction():
    low, high = quotient("a", "b", 1.02), quotient("a", "b", 1.5, rising=True)
    assert (low.aim_text, high.aim_text) == ("<= 1.02", ">= 1.5")
    assert low.misses(1.03)
    assert not low.misses(1.01)
    assert high.misses(1.4)
    assert not high.misses(1.6)


def test_stage_1_is_held_against_the_slower_of_decoding_and_teacher_where_decoding_is_measured():
    seconds = {"stage 1": [2.2], "bare teacher": [1.0], "commit": [0.2], "bare zarr writes": [0.1]}
    at_hand = {ratio.name: ratio for ratio in ratios_of(seconds, STAGE_1)}
    assert at_hand["stage 1 / bare teacher"].misses(1.06)
    seconds["decoding alone"] = [2.0]
    decoded = {ratio.name: ratio for ratio in ratios_of(seconds, STAGE_1)}
    assert decoded["stage 1 / bare teacher"].aim is None
    assert decoded["stage 1 / slower of decoding and teacher"].median(seconds) == pytest.approx(1.1)


def test_a_step_from_every_store_is_held_against_the_plain_step():
    names = [ratio.name for ratio in ratios_of(["ce step", "store step", "store step, int 8"], STAGE_1)]
    assert names == ["store step / ce step", "store step, int 8 / ce step"]


# ---- the guard -----------------------------------------------------------------------------------------------------


def test_the_guard_finds_what_became_worse_and_nothing_else():
    online, loaders = "online step / store step", "torchvision's faster loader / loader alone"
    recorded = {"store step / ce step": 1.0, "stage 1 / bare teacher": 1.1, online: 1.8, loaders: 2.0, "new": None}
    found = {"store step / ce step": 1.05, "stage 1 / bare teacher": 1.3, online: 1.5, loaders: 3.0}
    worse = {name: share for name, share in worse_by(recorded, found).items() if share > TOLERANCE}
    assert worse == {"stage 1 / bare teacher": pytest.approx(0.2 / 1.1), online: pytest.approx(0.3 / 1.8)}


def test_the_guard_finds_a_ratio_that_is_not_measured_any_more():
    assert worse_by({"gone": 1.0}, {}) == {"gone": math.inf}


def test_the_recorded_ratios_are_ones_that_bench_prints_of_recipes_that_are_there():
    for run in yaml.safe_load(FILE.read_text()):
        program, group, *arguments = shlex.split(run["command"])
        assert (program, group) == ("offline-kd", "bench")
        given = command.commands["steps"].make_context("steps", [*arguments, "--json", "--data-root", str(ROOT)]).params
        assert given["objective"] in load_recipe(ROOT / given["recipe_path"]).objectives
        assert set(run["ratios"]) <= {ratio.name for ratio in RATIOS}


# ---- growth --------------------------------------------------------------------------------------------------------


def test_growth_that_is_more_than_linear_is_marked_even_behind_a_fixed_cost():
    assert per_unit({1: 2.0, 4: 8.0}, {1: 1, 4: 4}) == {1: "1", 4: "1"}
    fixed = {1: 100.0, 10: 110.0, 100: 10_100.0}
    assert per_unit(fixed, {size: size for size in fixed}) == {1: "1", 10: "0.11", 100: "1.01 !"}


def test_the_table_of_growth_is_of_real_stores_whose_every_size_is_loaded(tmp_path, capsys):
    sizes = {n: works(tmp_path / str(n), Size(rows=16, blocks=2, classes=n, views=2)) for n in (10, 20)}
    bench_growth.show("classes", in_turn(sizes, 1))
    shown = capsys.readouterr().out
    assert "an epoch, by classes" in shown
    assert all(part in shown for part in ("loading, ms", "steps, ms", "first batch, ms", "per unit"))
