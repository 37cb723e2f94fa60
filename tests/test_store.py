"""A store is complete and unchanged, or it is refused; the same command always makes the same one."""

import json
import pickletools
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import CPU, ROOT, invoke, refused
from safetensors.torch import load_file
from tampering import rewrite

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data.manifest import Dataset, Split
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample, read_tar
from offline_kd.models.networks import build
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.layout import array_specs
from offline_kd.store.opening import open_store
from offline_kd.store.schema import SCHEMA_VERSION, LedgerEntry, store_digest
from offline_kd.support.errors import DataError, RecipeError, StoreCorrupt, StoreError, StoreMismatch

CORE_CODECS = {"bytes", "blosc", "zstd", "crc32c"}


def copy_of(store_path, tmp_path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "copy"))


def objects_of(path: Path) -> list[Path]:
    return sorted(file for file in (path / "targets.zarr").rglob("*") if file.is_file() and "/c/" in str(file))


def test_a_store_is_what_the_schema_says_and_describes_itself(store_path):
    store = open_store(store_path)
    assert (store.identity.num_blocks, len(store.identity.groups)) == (3, 3)
    group = zarr.open(store_path / "targets.zarr", mode="r")
    for spec in array_specs(store.identity):
        array = group[spec.name]
        assert array.shape == spec.shape
        assert array.dtype == np.dtype(spec.dtype)
        assert array.metadata.dimension_names == spec.dimensions
        assert array.attrs["description"]
        metadata = json.loads((store_path / "targets.zarr" / spec.name / "zarr.json").read_text())
        assert {codec["name"] for codec in metadata["codecs"]} <= CORE_CODECS
    assert group["logits/values"].shape == (3 * 512, 9, 10)
    rows = group["key_hash"][:]
    assert (rows[:1438] != 2**64 - 1).all()
    assert (rows[1438:] == 2**64 - 1).all()
    assert np.isnan(group["logits/values"][1438:]).all()
    assert np.isfinite(group["logits/values"][:1438]).all()


def test_nothing_in_a_store_is_a_pickle(store_path):
    for file in store_path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))
            with pytest.raises(Exception, match=r".*"):
                for _ in pickletools.genops(content):
                    pass


def test_the_card_and_the_manifest_tell_what_was_measured(store_path):
    manifest = open_store(store_path).manifest
    fidelity = manifest.fidelity[""]
    assert 200 <= fidelity.rows < 300
    assert fidelity.top1_agreement == 1.0
    assert fidelity.max_error < 1e-4
    card = (store_path / "README.md").read_text()
    assert manifest.digest in card
    assert "digits/train: 1,438 images of 8x8 in 3 tars, 10 classes" in card
    assert "9 of 9 per image: pad_crop_flip, padding 1, fill zeros, flip no, seed 0" in card
    assert "{'" not in card


def logits_of(path: Path) -> dict[str, np.ndarray]:
    group = zarr.open(path / "targets.zarr", mode="r")
    return {spec.name: group[spec.name][:] for spec in array_specs(open_store(path).identity)}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("workers", "batch_size"),
    [(1, 256), (4, 7), *(pytest.param(*both, marks=pytest.mark.slow) for both in ((0, 7), (4, 256)))],
)
def test_content_does_not_depend_on_workers_or_batch_size(
    workers, batch_size, recipe, manifest, roots, store_path, tmp_path
):
    changed = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"workers": workers}),
            "capture": recipe.capture.model_copy(update={"batch_size": batch_size}),
        }
    )
    cache_teacher(changed, manifest, roots, tmp_path / "store", CPU)
    expected, found = logits_of(store_path), logits_of(tmp_path / "store")
    for name in expected:
        if name.startswith("logits/"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert np.array_equal(found[name], expected[name]), name


def test_int_stores_are_smaller_and_within_their_bound(recipe, manifest, roots, store_path, tmp_path):
    packed = recipe.model_copy(update={"capture": recipe.capture.model_copy(update={"codec": Int(name="int")})})
    finished = cache_teacher(packed, manifest, roots, tmp_path / "store", CPU)
    fidelity = finished.fidelity[""]
    assert fidelity.max_error <= fidelity.max_error_allowed
    assert 0 < fidelity.mean_error < 0.2
    assert finished.total_bytes < 0.6 * open_store(store_path).manifest.total_bytes


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_the_same_command_again_changes_nothing(recipe, manifest, roots, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in objects_of(path)}
    digest = open_store(path).manifest.digest
    assert cache_teacher(recipe, manifest, roots, path, CPU).digest == digest
    assert {file: file.stat().st_mtime_ns for file in objects_of(path)} == before


def test_another_capture_is_not_mixed_into_a_store(recipe, manifest, roots, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    for change, field in (
        ({"views": recipe.views.model_copy(update={"seed": 3})}, "views.seed"),
        ({"capture": recipe.capture.model_copy(update={"codec": Int(name="int")})}, "codec.name"),
        ({"capture": recipe.capture.model_copy(update={"views_per_group": 1})}, "views_per_group"),
        ({"data": recipe.data.model_copy(update={"tars": [0]})}, "dataset.fingerprint"),
    ):
        with pytest.raises(StoreMismatch, match=f"its {field} is .*, this run's is"):
            cache_teacher(recipe.model_copy(update=change), manifest, roots, path, CPU)


def test_teacher_weights_that_differ_are_refused(recipe, recipe_file, where, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    torch.manual_seed(9)
    torch.save(build("networks:small", 10).state_dict(), tmp_path / "other.pt")
    override = ("--set", f"teacher.weights={tmp_path / 'other.pt'}")
    assert "its teacher.weights_sha256 is" in refused("cache-teacher", recipe_file, "--store", path, *override, *where)
    out = ("--out", tmp_path / "run", "--objective", "kd")
    message = refused("distill", recipe_file, "--store", path, *out, *override, *where)
    assert "was made by teacher 'networks:small' with weights" in message


def run_capture(recipe_file: Path, path: Path, where: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "offline_kd", "cache-teacher", str(recipe_file), "--store", str(path), *where]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        # A shell that started the tests in the background made everything below it deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupted_captures(recipe_file, store_path, tmp_path, where, kills: int, send: signal.Signals) -> Path:
    """Start the capture again and again, each time stopping it when some more blocks were committed."""
    path = tmp_path / "store"
    moments = random.Random(kills)
    for _ in range(kills):
        process = run_capture(recipe_file, path, where)
        committed = len(list((path / "ledger").glob("*.json"))) if path.exists() else 0
        until = committed + moments.randint(0, 1)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (path / "ledger").exists() and len(list((path / "ledger").glob("*.json"))) >= until:
                time.sleep(moments.random() * 0.02)
                break
        process.send_signal(send)
        process.communicate()
        for file in (path / "ledger").glob("*.json") if path.exists() else ():
            entry = LedgerEntry.model_validate_json(file.read_text())  # a listed block is whole
            assert all((path / "targets.zarr" / key).stat().st_size == one.bytes for key, one in entry.objects.items())
    process = run_capture(recipe_file, path, where)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return path


def test_a_killed_capture_goes_on_to_the_same_store(recipe_file, store_path, tmp_path, where):
    path = interrupted_captures(recipe_file, store_path, tmp_path, where, 3, signal.SIGKILL)
    assert open_store(path).digest == open_store(store_path).digest


@pytest.mark.slow
def test_a_capture_killed_twenty_times_goes_on_to_the_same_store(recipe_file, store_path, tmp_path, where):
    path = interrupted_captures(recipe_file, store_path, tmp_path, where, 20, signal.SIGKILL)
    assert open_store(path).digest == open_store(store_path).digest


def test_ctrl_c_keeps_what_was_committed_and_says_so(recipe_file, tmp_path, where, store_path):
    for attempt in range(5):  # a busy machine may let the capture end before this process gets its turn
        path = tmp_path / f"store{attempt}"
        process = run_capture(recipe_file, path, where)
        while process.poll() is None and len(list(path.glob("ledger/*.json"))) < 1:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        if process.returncode != 0:
            break
    assert process.returncode == 130
    assert b"Interrupted. What was committed is safe" in errors
    assert b"Traceback" not in errors
    committed = {file.name: file.stat().st_mtime_ns for file in path.glob("ledger/*.json")}
    assert invoke("cache-teacher", recipe_file, "--store", path, *where).exit_code == 0
    for name, written in committed.items():
        assert (path / "ledger" / name).stat().st_mtime_ns == written
    assert open_store(path).digest == open_store(store_path).digest


# ---- damage --------------------------------------------------------------------------------------------------------


def distill_from(path, recipe_file, where, tmp_path) -> str:
    options = ("--store", path, "--out", tmp_path / "run", "--objective", "kd", "--set", "training.epochs=9")
    return refused("distill", recipe_file, *options, *where)


def test_a_missing_block_is_named(recipe_file, where, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    (path / "targets.zarr/logits/values/c/1/2/0").unlink()
    message = distill_from(path, recipe_file, where, tmp_path)
    assert "targets.zarr/logits/values/c/1/2/0: missing, though 000001-00006-00009.json was committed" in message
    assert "run `offline-kd store repair`, or copy the store again" in message
    # The advice works: the block is made again and the store is the same as before.
    assert invoke("store", "repair", path, recipe_file, *where).exit_code == 0
    assert open_store(path).digest == open_store(store_path).digest


def test_an_unfinished_store_is_not_trained_from(recipe_file, where, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    (path / "manifest.json").unlink()
    assert "not finished: 0 of 9 blocks are missing, only manifest.json" in distill_from(
        path, recipe_file, where, tmp_path
    )
    (path / "ledger/000002-00000-00003.json").unlink()
    assert "1 of 9 blocks are missing, the first is ledger/000002-00000-00003.json" in distill_from(
        path, recipe_file, where, tmp_path
    )


def test_every_kind_of_damage_to_any_object_is_found_before_its_rows_are_used(recipe_file, where, store_path, tmp_path):
    whole = objects_of(store_path)
    chosen = random.Random(0).sample([file.relative_to(store_path) for file in whole], 12)
    damages = {
        "flip": lambda content: (
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
        ),
        "cut": lambda content: content[:-1],
        "empty": lambda content: b"",
        "zeros": lambda content: bytes(len(content)),
    }
    for index, file in enumerate(chosen):
        path = Path(shutil.copytree(store_path, tmp_path / f"copy{index}"))
        name, damage = list(damages.items())[index % len(damages)]
        (path / file).write_bytes(damage((path / file).read_bytes()))
        if file.parts[1] == "key":  # which training does not read
            message = invoke("store", "verify", path).stdout
        else:
            message = distill_from(path, recipe_file, where, tmp_path / f"{index}")
        assert str(file) in message, (name, message)


def test_objects_that_changed_places_are_found(recipe_file, where, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    one, other = path / "targets.zarr/logits/values/c/0/0/0", path / "targets.zarr/logits/values/c/0/1/0"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert "targets.zarr/logits/values/c/0/" in distill_from(path, recipe_file, where, tmp_path)


def test_changed_metadata_is_found(recipe_file, where, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    identity = json.loads((path / "store.json").read_text())
    identity["teacher"]["measured_top1"] = 99.99
    (path / "store.json").write_text(json.dumps(identity))
    assert "Something was changed after the store was finished" in distill_from(path, recipe_file, where, tmp_path)
    (path / "store.json").write_text("{")
    assert "store.json: not readable as JSON" in distill_from(path, recipe_file, where, tmp_path)
    del identity["codec"]
    (path / "store.json").write_text(json.dumps(identity))
    assert "'codec': Field required" in distill_from(path, recipe_file, where, tmp_path)
    shutil.rmtree(path)
    assert "no teacher store there" in distill_from(path, recipe_file, where, tmp_path)


def test_a_store_of_a_newer_schema_is_refused(recipe_file, where, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    identity = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**identity, "schema_version": SCHEMA_VERSION + 1, "new_field": []}))
    message = distill_from(path, recipe_file, where, tmp_path)
    assert f"version {SCHEMA_VERSION + 1}, this offline-kd reads up to {SCHEMA_VERSION}. Upgrade" in message
    with pytest.raises(StoreError, match=f"schema version {SCHEMA_VERSION + 1}"):
        open_store(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("view/box", lambda box: box + np.array([1, 0, 0, 0], dtype=box.dtype), "renders to pixels that differ"),
        ("view/box", lambda box: box - np.array([0, 1, 0, 0], dtype=box.dtype), "renders to pixels that differ"),
        ("view/box", lambda box: np.roll(box, 1, axis=0), "renders to pixels that differ"),
        ("view/box", lambda box: np.roll(box, 1, axis=1), "renders to pixels that differ"),
        ("view/flip", lambda flip: 1 - flip, "renders to pixels that differ"),
        ("key_hash", lambda keys: np.roll(keys, 1), "the image of sample .* has sha256|has label"),
        ("image_digest", lambda digests: np.roll(digests, 1, axis=0), "has sha256"),
        ("label", lambda label: np.roll(label, 1), "has label"),
    ],
)
def test_a_store_made_with_a_shift_by_one_is_refused(name, change, message, recipe_file, where, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    for group in range(3) if name.startswith("view/") else range(1):
        rewrite(path, name, 1, group, change)
    assert re.search(message, distill_from(path, recipe_file, where, tmp_path))


def test_targets_that_are_not_the_teachers_keep_a_store_from_being_finished(
    recipe, manifest, roots, store_path, tmp_path
):
    path = copy_of(store_path, tmp_path)
    for group in range(3):
        rewrite(path, "logits/values", 0, group, lambda logits: np.roll(logits, 1, axis=0))
    (path / "manifest.json").unlink()
    with pytest.raises(StoreCorrupt, match=r"differs from the store by up to .*, codec and arithmetic explain"):
        cache_teacher(recipe, manifest, roots, path, CPU)
    assert not (path / "manifest.json").exists()


def test_fidelity_is_measured_on_as_many_rows_as_asked_for(recipe, manifest, roots, tmp_path):
    one_tar = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"tars": [2]}),
            "capture": recipe.capture.model_copy(update={"fidelity_rows": 1000}),
        }
    )
    finished = cache_teacher(one_tar, manifest, roots, tmp_path / "store", CPU)
    assert finished.fidelity[""].rows >= 1000  # of 414 images with 9 views


def test_stores_can_be_moved_and_need_not_be_writable(recipe_file, where, store_path, tmp_path):
    path = copy_of(store_path, tmp_path)
    moved = path.rename(tmp_path / "elsewhere")
    for file in [moved, *moved.rglob("*")]:
        file.chmod(0o555 if file.is_dir() else 0o444)
    result = invoke("distill", recipe_file, "--store", moved, "--out", tmp_path / "run", "--objective", "kd", *where)
    assert result.exit_code == 0, result.output
    for file in [moved, *moved.rglob("*")]:
        file.chmod(0o755)


# ---- bad input to stage 1 ------------------------------------------------------------------------------------------


def test_a_teacher_that_fails_its_gate_writes_nothing(recipe_file, where, tmp_path):
    gate = "teacher.expected={dataset: digits, split: test, top1: 12.5, tolerance: 0.1}"
    message = refused("cache-teacher", recipe_file, "--store", tmp_path / "store", "--set", gate, *where)
    assert "expected 12.50 +- 0.1" in message
    assert not (tmp_path / "store").exists()


def test_nan_from_the_teacher_is_named_and_nothing_is_committed(recipe_file, where, teacher_weights, tmp_path):
    command = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *where)
    message = refused(*command, "--set", "teacher.model=networks:nan_on_some_views")
    assert re.search(r"logit 0 is nan for sample '\d{4}' of train-000000.tar, view \d", message)
    assert not (tmp_path / "store" / "ledger").exists()
    assert not list((tmp_path / "store" / "leases").iterdir())
    weights = load_file(teacher_weights)
    weights["head.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    message = refused(*command, "--set", f"teacher.weights={tmp_path / 'nan.pt'}")
    assert "teacher gate: logit 3 of image 0 is nan" in message


def small_dataset(folder: Path, data_root: Path, splits: dict[str, list[list[Sample]]], classes: int = 10) -> Dataset:
    """A dataset of real digits, tar by tar as given."""
    tars = {
        split: [pack(part, folder / "set", f"{split}{index}", 10_000)[0] for index, part in enumerate(parts)]
        for split, parts in splits.items()
    }
    names = [str(index) for index in range(classes)]
    return Dataset(folder="set", classes=names, splits={name: Split(tars=part) for name, part in tars.items()})


def test_a_key_used_in_two_tars_is_named(recipe, manifest, roots, data_root, tmp_path):
    samples = read_tar(data_root / "digits" / "train-000000.tar")[0]
    dataset = small_dataset(tmp_path, data_root, {"train": [samples[:50], samples[49:90]], "test": [samples[:100]]})
    changed = manifest.model_copy(update={"datasets": {"digits": dataset}})
    with pytest.raises(
        DataError, match=rf"train1-000000\.tar: key '{samples[49].key}' was used before, in train0-000000"
    ):
        cache_teacher(recipe, changed, [tmp_path], tmp_path / "store", CPU)
    # After a restart, when the first tar is committed already and not read again, before the store is finished.
    places = r"train0-000000\.tar \(row 49\), train1-000000\.tar \(row 0\)"
    with pytest.raises(DataError, match=rf"key '{samples[49].key}' is that of 2 samples: {places}"):
        cache_teacher(recipe, changed, [tmp_path], tmp_path / "store", CPU)


def test_a_teacher_with_another_number_of_classes_is_refused(recipe, manifest, data_root, tmp_path):
    samples = read_tar(data_root / "digits" / "train-000000.tar")[0]
    dataset = small_dataset(tmp_path, data_root, {"train": [samples], "test": [samples]}, classes=11)
    changed = manifest.model_copy(update={"datasets": {"digits": dataset}})
    with pytest.raises(Exception, match=r"'head.bias' is \[10\], the network's is \[11\]"):
        cache_teacher(recipe, changed, [tmp_path], tmp_path / "store", CPU)


def test_groups_that_do_not_divide_the_views_are_refused(manifest, roots, recipe, tmp_path):
    odd = recipe.model_copy(update={"capture": recipe.capture.model_copy(update={"views_per_group": 4})})
    with pytest.raises(RecipeError, match=r"does not divide the 9 views. Use one of \[1, 3, 9\]"):
        cache_teacher(odd, manifest, roots, tmp_path / "store", CPU)


def test_a_full_disk_is_a_message_and_nothing_is_half_committed(recipe_file, where, tmp_path, store_path):
    """A real file system of 512 KiB; needs the right to mount one."""
    small_disk = tmp_path / "disk"
    small_disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small_disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        path = small_disk / "store"
        message = refused("cache-teacher", recipe_file, "--store", path, *where)
        assert "No space left on device" in message
        assert not (path / "manifest.json").exists()
        for file in (path / "ledger").glob("*.json"):
            entry = LedgerEntry.model_validate_json(file.read_text())
            assert all((path / "targets.zarr" / key).stat().st_size == one.bytes for key, one in entry.objects.items())
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        assert invoke("cache-teacher", recipe_file, "--store", path, *where).exit_code == 0
        assert open_store(path).digest == open_store(store_path).digest
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)


def test_store_info_is_in_groups_for_people_and_whole_as_json(store_path):
    facts = json.loads(invoke("store", "info", store_path, "--json").stdout)
    assert {"digest", "blocks", "rows", "views", "bytes", "codecs", "teacher", "dataset", "fidelity"} <= set(facts)
    assert facts["rows"] == 1438 * 9
    assert facts["digest"] == f"sha256:{open_store(store_path).digest}"
    said = invoke("store", "info", store_path).stdout
    titles = [line for line in said.splitlines() if not line.startswith(" ")]
    assert titles == ["Store", "Images", "Teacher", "Targets", "Fidelity", "Largest arrays", "Made with"]
    assert "12,942: 1,438 samples, 9 views of each" in said
    assert "pad_crop_flip, padding 1, fill zeros, flip no, seed 0" in said
    assert "{" not in said


def test_the_digest_speaks_of_content_only(store_path):
    store = open_store(store_path)
    raw = json.loads((store_path / "store.json").read_text())
    entries = store.listed
    assert store_digest(raw, [], entries) == store.digest
    assert store_digest({**raw, "versions": {"torch": "0"}}, [], dict(reversed(entries.items()))) == store.digest
    assert store_digest({**raw, "views": {**raw["views"], "count": 3}}, [], entries) == store.digest
    assert store_digest(raw, [], dict(list(entries.items())[:-1])) != store.digest
    assert store_digest({**raw, "name": "other"}, [], entries) != store.digest
