"""Stores of images of any size: views replayed to the bit, bad images, real photographs."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, invoke, refused
from pictures import NUM, command_line, make_samples, photographs, views_of
from tampering import rewrite

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import Decoder
from offline_kd.data.manifest import Dataset, EvaluationCrop, Manifest, Split
from offline_kd.data.tars import Sample
from offline_kd.distill.loader import Loader
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.store.join import join, left_out_of
from offline_kd.store.opening import open_store
from offline_kd.support.errors import DataError, StoreCorrupt, StoreMismatch
from offline_kd.views.center_crop import CenterCrop
from offline_kd.views.render import render_choice, render_view


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    recipe, manifest = photographs(folder, make_samples())
    cache_teacher(recipe, manifest, [folder], folder / "store", CPU)
    return recipe, manifest, folder


def test_the_teacher_says_of_replayed_views_what_the_store_says(photos):
    recipe, manifest, folder = photos
    store = open_store(folder / "store")
    teacher = load_teacher(recipe, manifest, [folder], 3, CPU)
    loader = training_images(recipe, manifest, [folder])
    seen = 0
    for number in range(len(loader)):
        block = loader[number]
        for view in range(2):
            joined = join(store, block, 0, np.full(len(block), view))
            pixels, good = render_choice(Decoder(block), joined.view, recipe.views, 24)
            assert good.all()
            torch.testing.assert_close(teacher.logits(pixels), joined.signal[0].logits["values"], rtol=1e-5, atol=1e-4)
            seen += len(block)
    assert seen == 2 * NUM
    assert open_store(folder / "store").manifest.fidelity[""].top1_agreement == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_students_see_the_same_views_with_and_without_a_store_and_workers(photos, workers):
    recipe, manifest, folder = photos
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    store = open_store(folder / "store")
    loader = training_images(recipe, manifest, [folder])
    batches = [
        list(
            make_loader(
                recipe,
                source_of(recipe, loader, stores, recipe.objectives["kd"], store.identity.groups),
                3,
                CPU,
                live_size=24,
            ).epoch(1)
        )
        for stores in ([store], [])
    ]
    teacher = load_teacher(recipe, manifest, [folder], 3, CPU)
    for with_store, without in zip(*batches, strict=True):
        assert with_store.images.shape[1:] == (3, 16, 16)
        assert torch.equal(with_store.images, without.images)
        assert torch.equal(with_store.labels, without.labels)
        assert torch.equal(with_store.other_labels, without.other_labels)
        assert torch.equal(with_store.share, without.share)
        live = teacher.logits(without.live_images)
        torch.testing.assert_close(live, with_store.signal[0].logits["values"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("box", lambda box: box + np.array([1, 0, 0, 0], dtype=np.int16)),
        ("flip", lambda flip: 1 - flip),
        ("op", lambda op: (op + 1) % 14),
        ("erase", lambda erase: np.where(erase > 0, erase // 2, np.array([4000, 4000, 4000, 4000])).astype(np.int16)),
        ("partner", lambda partner: np.where(partner >= 0, (partner + 1) % 10, 3).astype(np.int32)),
        ("share", lambda share: (share // 2).astype(np.uint16)),
    ],
)
def test_parameters_that_were_shifted_on_purpose_are_caught(photos, tmp_path, monkeypatch, array, change):
    """Stored parameters that are not those the teacher saw, in a store that is otherwise sealed and whole."""
    from offline_kd.cache import work as cache

    recipe, manifest, folder = photos
    ask = cache.ask_teacher

    def shifted(*arguments: object):
        arrays, left_out = ask(*arguments)
        arrays[f"view/{array}"] = change(arrays[f"view/{array}"])
        return arrays, left_out

    monkeypatch.setattr(cache, "ask_teacher", shifted)
    with pytest.raises(StoreCorrupt, match="renders to pixels that differ from those the teacher saw"):
        cache_teacher(recipe, manifest, [folder], tmp_path / "store", CPU)
    assert not (tmp_path / "store" / "manifest.json").is_file()


def test_mixed_views_of_other_tars_are_refused_by_name(photos, tmp_path):
    _, _, folder = photos
    store = open_store(folder / "store")
    resharded, manifest = photographs(tmp_path, make_samples()[::-1])
    block = training_images(resharded, manifest, [tmp_path])[0]
    with pytest.raises(StoreMismatch, match="are mixed with images of other tars"):
        join(store, block, 0, np.zeros(len(block), dtype=np.int64))


def test_views_without_mixing_are_found_in_resharded_tars(tmp_path):
    views = views_of(mixing=None)
    recipe, manifest = photographs(tmp_path / "a", make_samples(), views=views)
    cache_teacher(recipe, manifest, [tmp_path / "a"], tmp_path / "store", CPU)
    store = open_store(tmp_path / "store")
    other, turned = photographs(tmp_path / "b", make_samples()[::-1], views=views)
    rows = []
    for its_recipe, its_manifest, root in ((recipe, manifest, "a"), (other, turned, "b")):
        loader = training_images(its_recipe, its_manifest, [tmp_path / root])
        stream = make_loader(its_recipe, source_of(its_recipe, loader, [store], its_recipe.objectives["kd"]), 0, CPU)
        rows.append(
            {
                key: (batch.images[row], batch.signal[0].logits["values"][row])
                for batch in stream.epoch(0)
                for row, key in enumerate(batch.key_hash.tolist())
            }
        )
    assert rows[0].keys() == rows[1].keys()
    for key, (pixels, logits) in rows[0].items():
        assert torch.equal(pixels, rows[1][key][0])
        assert torch.equal(logits, rows[1][key][1])


def test_images_of_different_sizes_need_views_that_resize(tmp_path):
    recipe, manifest = photographs(tmp_path, make_samples(), views={"kind": "pad_crop_flip", "count": 2})
    with pytest.raises(DataError, match="different sizes need views that resize them"):
        training_images(recipe, manifest, [tmp_path])[0]


def test_the_centre_crop_is_one_view_and_trains(tmp_path):
    views = CenterCrop(kind="center_crop", size=16, resize=20).model_dump(mode="json")
    recipe, manifest = photographs(tmp_path, make_samples(), views=views)
    cache_teacher(recipe, manifest, [tmp_path], tmp_path / "store", CPU)
    store = open_store(tmp_path / "store")
    loader = training_images(recipe, manifest, [tmp_path])
    (one, *_) = make_loader(recipe, source_of(recipe, loader, [store], recipe.objectives["kd"]), 0, CPU).epoch(0)
    assert one.images.shape == (16, 3, 16, 16)


def test_probes_of_large_views_are_a_grid_over_them_and_find_other_crops(tmp_path):
    recipe, manifest = photographs(tmp_path, make_samples()[:12], views=views_of(mixing=None, jitter=None))
    large = recipe.teacher.model_copy(update={"crop": EvaluationCrop(size=72, resize=80)})
    recipe = recipe.model_copy(update={"teacher": large})
    cache_teacher(recipe, manifest, [tmp_path], tmp_path / "store", CPU)
    store = open_store(tmp_path / "store")
    arrays = store.read(0, 0, ["probe/row", "probe/view", "probe/pixels", "view/box"])
    assert arrays["probe/pixels"].shape == (4, 3, 36, 36)  # every second pixel of 72
    block = training_images(recipe, manifest, [tmp_path])[0]
    joined = join(store, block, 0, np.full(len(block), arrays["probe/view"][0]))
    pixels, _ = render_choice(Decoder(block), joined.view, recipe.views, 72)
    seen = pixels[int(arrays["probe/row"][0])].numpy()
    np.testing.assert_array_equal(seen[:, 1::2, 1::2], arrays["probe/pixels"][0])

    rewrite(tmp_path / "store", "view/box", 0, 0, lambda box: box + np.array([1, 0, 0, 0], dtype=np.int16))
    with pytest.raises(StoreCorrupt, match="renders to pixels that differ"):
        join(open_store(tmp_path / "store"), block, 0, np.zeros(len(block), dtype=np.int64))


@pytest.mark.slow
def test_other_versions_of_pillow_and_torchvision_render_the_same_pixels():
    """In environments of their own; needs a package registry. `python tests/replay.py` prints the table."""
    from replay import VERSIONS, compare

    found = compare()
    assert len(found) == len(VERSIONS) == 2
    for versions, by_op in found.items():
        assert {op: largest for op, (largest, _) in by_op.items() if largest} == {}, versions


@pytest.mark.parametrize(("shift", "is_let_pass"), [(1, True), (128, False)])
def test_small_differences_are_reported_where_versions_differ_and_refused_where_not(
    photos, monkeypatch, capsys, shift, is_let_pass
):
    from offline_kd.store import join as joining
    from offline_kd.views import render as rendering

    recipe, manifest, folder = photos
    store = open_store(folder / "store")
    block = training_images(recipe, manifest, [folder])[0]
    position = np.zeros(len(block), dtype=np.int64)

    def drifted(*arguments: object) -> np.ndarray:
        pixels = render_view(*arguments).copy()
        pixels[0, ::5, ::5] ^= shift
        return pixels

    monkeypatch.setattr(rendering, "render_view", drifted)
    with pytest.raises(StoreCorrupt, match="renders to pixels that differ"):
        join(store, block, 0, position)
    monkeypatch.setattr(joining, "version", lambda name: "99.0" if name == "pillow" else version(name))
    if is_let_pass:
        join(store, block, 0, position)
        assert "pillow 99.0 here" in capsys.readouterr().err
    else:
        with pytest.raises(StoreCorrupt, match="renders to pixels that differ"):
            join(store, block, 0, position)


# ---- bad images ------------------------------------------------------------------------------------------------------


def with_bad_ones() -> list[Sample]:
    samples = make_samples()
    for index, content in ((3, samples[3].encoded[: len(samples[3].encoded) // 2]), (50, b"no image"), (51, b"")):
        samples[index] = Sample(samples[index].key, samples[index].label, content, "jpg")
    return samples


def test_a_bad_image_stops_everything_unless_it_may_be_left_out(tmp_path):
    recipe, manifest = photographs(tmp_path, with_bad_ones())
    with pytest.raises(DataError, match=r"sample '0003': the image cannot be decoded .* --set data.bad_images=skip"):
        cache_teacher(recipe, manifest, [tmp_path], tmp_path / "store", CPU)


def test_bad_images_are_left_out_listed_and_never_mixed_in(tmp_path, capsys):
    recipe, manifest = photographs(tmp_path, with_bad_ones(), data={"bad_images": "skip"})
    cache_teacher(recipe, manifest, [tmp_path], tmp_path / "store", CPU)
    said = capsys.readouterr().err
    assert all(f"sample '{key}' is left out: the image cannot be decoded" in said for key in ("0003", "0050", "0051"))
    store = open_store(tmp_path / "store")
    assert store.manifest.left_out == 3
    assert [sorted(store.entry("", block, 0).left_out) for block in store.blocks] == [["0003"], ["0050", "0051"], []]
    assert [store.entry("", block, 0).rows for block in store.blocks] == [39, 38, 10]
    loader = training_images(recipe, manifest, [tmp_path])
    assert left_out_of([store], loader[1]).keys() == {10, 11}
    shown = []
    for stores in ([store], []):
        stream = make_loader(
            recipe, source_of(recipe, loader, stores, recipe.objectives["kd"], store.identity.groups), 0, CPU
        )
        batches = list(stream.epoch(0))
        shown.append(torch.cat([batch.images for batch in batches]))
        assert sum(len(batch.labels) for batch in batches) == NUM - 3
        assert len(stream.bad) == 3
        assert "0x" not in "".join(stream.bad)  # no address, which would be another in every run
    assert torch.equal(*shown)
    # They keep their places in batches, and in the ranks' shares of these.
    whole, manifest = photographs(tmp_path / "whole", make_samples())
    source = source_of(whole, training_images(whole, manifest, [tmp_path / "whole"]))
    good = set(np.concatenate([batch.key_hash for batch in batches]).tolist())
    full = [batch.key_hash.tolist() for batch in make_loader(whole, source, 0, CPU).epoch(0)]
    assert [batch.key_hash.tolist() for batch in batches] == [[key for key in keys if key in good] for keys in full]
    third = replace(stream.options, rank=2, world=3)
    shares = [batch.key_hash.tolist() for batch in Loader(stream.source, third, CPU).epoch(0)]
    assert shares == [[key for key in keys[2::3] if key in good] for keys in full]


def test_a_store_with_left_out_images_is_verified_and_trained_from_by_the_command_line(tmp_path):
    """Also where the manifest has no sha256 of a tar."""
    recipe, manifest = photographs(tmp_path, with_bad_ones(), data={"bad_images": "skip"})
    first, *others = manifest.dataset("photos").splits["train"].tars
    split = Split(tars=[first.model_copy(update={"sha256": None}), *others])
    about = {"folder": "photos", "classes": list("abc")}
    manifest = Manifest(datasets={"photos": Dataset(**about, splits={"train": split})})
    file, where = command_line(tmp_path, recipe, manifest)
    assert invoke("cache-teacher", file, "--store", tmp_path / "store", *where).exit_code == 0
    result = invoke("store", "verify", tmp_path / "store", "--dataset", *where)
    assert result.exit_code == 0, result.output
    result = invoke(
        "distill", file, "--store", tmp_path / "store", "--out", tmp_path / "run", "--objective", "kd", *where
    )
    assert result.exit_code == 0, result.output
    strict = [*where, "--set", "data.bad_images=fail"]
    message = refused(
        "distill", file, "--store", tmp_path / "store", "--out", tmp_path / "b", "--objective", "ce", *strict
    )
    assert "cannot be decoded" in message


# ---- many classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "objective", "most_bytes"),
    [
        pytest.param({"name": "topk", "k": 50, "tail_temperature": 4}, "kd", 250, marks=pytest.mark.slow),
        ({"name": "klt", "step": 0.3, "fit_rows": 180}, "wttm", 250),
        pytest.param({"name": "int", "bits": 8}, "dtkd", 21_841 * 1.01, marks=pytest.mark.slow),
    ],
)
def test_twenty_thousand_classes_go_through_both_stages_without_a_row_of_floats(tmp_path, codec, objective, most_bytes):
    """What a worker hands over is encoded; the last class is as good as any."""
    classes = [f"n{index:05d}" for index in range(21_841)]
    samples = [replace(sample, label=21_840 - sample.label) for sample in make_samples()]
    recipe, manifest = photographs(tmp_path, samples, classes, capture={"codec": codec})
    recipe_file, options = command_line(tmp_path, recipe, manifest)
    store_path = tmp_path / "store"
    assert invoke("cache-teacher", recipe_file, "--store", store_path, *options).exit_code == 0
    store = open_store(store_path)
    logits = sum(size for name, size in store.manifest.bytes_by_array.items() if name.startswith("logits/"))
    assert logits / (NUM * 2) <= most_bytes
    stream = make_loader(
        recipe,
        source_of(recipe, training_images(recipe, manifest, [tmp_path]), [store], recipe.objectives[objective]),
        0,
        CPU,
    )
    (piece, *_) = stream.reader
    encoded = piece.rows.signal[0].logits
    dense = [name for name, array in encoded.items() if array.is_floating_point() and array[0].numel() > 100]
    assert dense == []
    assert piece.rows.labels.min() > 21_836
    train = ("distill", recipe_file, "--store", store_path, "--objective", objective, "--out", tmp_path / "run")
    assert invoke(*train, "--allow-biased", *options).exit_code == 0


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_goes_on_with_other_workers_to_the_same_student(photos, tmp_path):
    """Really killed, after a checkpoint and before the epoch's end."""
    recipe, manifest, folder = photos
    file, where = command_line(tmp_path, recipe, manifest)
    where[-1] = str(folder)
    options = ["--store", str(folder / "store"), "--objective", "wttm", *where, "--set", "training.epochs=4"]
    command = [
        sys.executable,
        "-m",
        "offline_kd",
        "distill",
        str(file),
        "--out",
        str(tmp_path / "killed"),
        *options,
    ]
    run = subprocess.Popen(
        [*command, "--set", "training.checkpoint_steps=2", "--set", "data.workers=2"], stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed" / "last.ckpt").is_file():
        assert run.poll() is None
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    saved = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)["progress"]
    assert '"steps_done": 2' in saved or '"steps_done": 4' in saved, saved
    resumed = invoke("distill", file, "--out", tmp_path / "killed", *options)
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after epoch 0 and" in resumed.stderr
    whole = invoke("distill", file, "--out", tmp_path / "whole", *options)
    assert whole.exit_code == 0
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("killed", "whole")]
    assert students[0] == students[1]


def test_inspect_shows_views_of_photographs(photos, tmp_path):
    recipe, manifest, folder = photos
    _, where = command_line(tmp_path, recipe, manifest)
    where[-1] = str(folder)
    page = tmp_path / "page.html"
    result = invoke("store", "inspect", folder / "store", "--key", "0005", "--out", page, *where)
    assert result.exit_code == 0, result.output
    assert "randaugment" not in page.read_text()
    assert " at " in page.read_text()


# ---- real photographs, a real teacher of 1,000 classes ---------------------------------------------------------------


def captured_photographs(name: str, manifest: Manifest, real_data: Path, path: Path, **changes: object):
    from offline_kd.recipe import load_recipe

    root = Path(__file__).parent.parent
    recipe = load_recipe(root / f"pipelines/imagenet_sample/{name}.yaml", [f"{k}={v}" for k, v in changes.items()])
    cache_teacher(recipe, manifest, [real_data], path, CPU)
    return recipe, open_store(path)


@pytest.mark.slow
def test_a_thousand_replayed_views_of_photographs_get_the_teachers_answer(manifest, real_data, tmp_path):
    """Crops, RandAugment, erasing, mixup and cutmix; the gate has found the accuracy that is known of the teacher."""
    recipe, store = captured_photographs("lite2_lite0", manifest, real_data, tmp_path / "store")
    assert abs(store.identity.teacher.measured_top1 - 84.3) <= 0.1
    teacher = load_teacher(recipe, manifest, [real_data], 1000, CPU)
    block = training_images(recipe, manifest, [real_data])[0]
    joined = join(store, block, 0, np.arange(1000) % len(store.identity.groups[0]))
    decoder = Decoder(block)
    same, errors = 0, []
    for start in range(0, 1000, 64):
        part = joined.take(slice(start, start + 64))
        live = teacher.logits(render_choice(decoder, part.view, recipe.views, 260)[0])
        decoder.forget()
        same += (live.argmax(1) == part.signal[0].logits["values"].argmax(1)).sum().item()
        errors.append((live - part.signal[0].logits["values"]).abs().mean().item())
    assert same >= 999
    assert np.mean(errors) <= 1e-2  # f32 has no error of its own


@pytest.mark.slow
def test_codecs_keep_what_they_promise_of_a_thousand_classes(manifest, real_data, tmp_path):
    """Tables learned from four fifths of the images, measured on the others; top-100 in f16 takes 404 bytes."""
    from offline_kd.cli.bench_codecs import bench_codecs
    from offline_kd.store.codecs.int_ import Int
    from offline_kd.store.codecs.klt import Klt
    from offline_kd.store.codecs.topk import TopK

    _, store = captured_photographs("lite0_codecs", manifest, real_data, tmp_path / "store")
    codecs = [
        Int(name="int"),
        Klt(name="klt", step=1.2, refine=96, refine_step=1 / 128),
        Klt(name="klt", step=2.0),
        *(TopK(name="topk", k=100, tail_temperature=t) for t in (1, 2, 4)),
    ]
    int8, fine, short, *lists = bench_codecs(store, 14_000, codecs)
    # The list's best at each temperature: its tail is right at one.
    top100 = [one.distortion["total_variation"][t] for one, t in zip(lists, ("1", "2", "4"), strict=True)]
    found = {
        name: list(one.distortion["total_variation"].values())
        for name, one in (("int8", int8), ("fine", fine), ("short", short))
    }
    print(top100, found, int8.bytes_per_row, fine.bytes_per_row, short.bytes_per_row)
    assert max(found["int8"]) <= 0.003
    assert int8.bytes_per_row <= 870
    assert all(a <= 0.55 * b for a, b in zip(found["fine"], top100, strict=True))
    assert fine.bytes_per_row <= 210
    assert all(a <= b for a, b in zip(found["short"], top100, strict=True))
    assert short.bytes_per_row <= 120
