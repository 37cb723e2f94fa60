"""Stores whose views predict each other: who captures which view group when changes nothing."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, invoke, refused
from pictures import command_line, make_samples, photographs, views_of
from tampering import rewrite, vouch_for_ledger
from test_images import with_bad_ones

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.models.networks import build
from offline_kd.store.chunks import encode_chunk
from offline_kd.store.codecs.rans import TOTAL
from offline_kd.store.lookup import logits_of
from offline_kd.store.opening import open_store
from offline_kd.store.reader import stored_object
from offline_kd.store.verification import verify
from offline_kd.support.errors import StoreCorrupt, StoreMismatch
from offline_kd.support.places import Folder

# ---- stores ----------------------------------------------------------------------------------------------------------

CLASSES = [f"class {index}" for index in range(20)]
MEANS = {"name": "klt_means", "step": 0.4, "refine": 8, "fit_rows": 64}


def recipe_of(folder: Path, samples=None, count: int = 6, codec=MEANS, **changes: object):
    """Six views of 90 photographs, in groups of two; mixed with each other."""
    capture = {"codec": codec, "views_per_group": 2}
    views = views_of(count=count)
    return photographs(folder, samples or make_samples(), CLASSES, views=views, capture=capture, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with the photographs, the store of them that was captured at once, and one in f32."""
    folder = tmp_path_factory.mktemp("means")
    for name, codec in (("store", MEANS), ("f32", {"name": "f32"})):
        recipe, manifest = recipe_of(folder, codec=codec)
        cache_teacher(recipe, manifest, [folder], folder / name, CPU)
    return folder


def all_logits(path: Path, targets: str = "", views=range(6)) -> torch.Tensor:
    store = open_store(path, targets=targets)
    return logits_of(store, np.sort(store.row_index[1]), list(views))


def files_of(path: Path, pattern: str) -> dict[str, tuple[bytes, int]]:
    found = [file for file in sorted((path / "targets.zarr").rglob(pattern)) if file.is_file()]
    return {str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns) for file in found}


def test_every_group_is_close_to_the_teacher_and_means_lie_once_per_block(whole):
    store = open_store(whole / "store")
    assert len(files_of(whole / "store", "logits/means/c/*/*")) == 3
    assert len(files_of(whole / "store", "logits/codes/c/*/*/*")) == 9
    assert verify(Folder(whole / "store")).faults == []
    z, z_t = all_logits(whole / "store"), all_logits(whole / "f32")
    errors = (z - z_t).square().mean(dim=(0, 2)).view(3, 2).mean(dim=1).sqrt()
    assert errors.max() < 1.2 * errors.min()
    assert errors.max() < 0.5 * z_t.std()
    fidelity = store.manifest.fidelity[""]
    assert fidelity.mean_error <= fidelity.max_error < 4 * MEANS["step"]
    assert (z.roll(1, dims=0) - z_t).square().mean().sqrt() > 2 * errors.max()  # what a shifted row would be


@pytest.mark.slow
def test_views_added_later_by_another_process_are_those_captured_at_once(whole, tmp_path):
    path = tmp_path / "store"
    few, manifest = recipe_of(whole, count=2)
    cache_teacher(few, manifest, [whole], path, CPU)
    means = files_of(path, "logits/means/c/*/*")
    file, where = command_line(tmp_path, recipe_of(whole)[0], manifest)
    command = [sys.executable, "-m", "offline_kd", "cache-teacher", str(file), "--store", str(path)]
    where[where.index("--data-root") + 1] = str(whole)
    done = subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(path, "logits/means/c/*/*") == means  # and when they were written
    assert open_store(path).digest == open_store(whole / "store").digest
    assert torch.equal(all_logits(path), all_logits(whole / "store"))


@pytest.mark.slow
def test_a_capture_that_was_killed_between_groups_and_two_writers_make_the_same_store(whole, tmp_path):
    path = tmp_path / "store"
    file, where = command_line(tmp_path, *recipe_of(whole))
    where[where.index("--data-root") + 1] = str(whole)
    command = ("cache-teacher", file, "--store", path, *where)
    assert invoke(*command, "--worker", "0/2").exit_code == 0
    # The first group of one block and the last of another stay; a third block is open.
    for entry in ("000000-00002-00004", "000000-00004-00006", "000002-00000-00002", "000002-00002-00004"):
        (path / f"ledger/{entry}.json").unlink()
        block, group = int(entry[:6]), int(entry[7:12]) // 2
        (path / f"targets.zarr/logits/codes/c/{block}/{group}/0").unlink()
    assert invoke(*command, "--worker", "1/2").exit_code == 0
    assert invoke(*command).exit_code == 0
    assert open_store(path).digest == open_store(whole / "store").digest
    assert verify(Folder(path)).faults == []


@pytest.mark.parametrize(
    ("damaged", "redone"), [("logits/codes/c/1/0/0", 1), ("logits/means/c/1/0", 3)], ids=["code", "mean"]
)
def test_repair_does_again_what_hangs_on_the_damaged_object(whole, tmp_path, damaged, redone):
    path = tmp_path / "store"
    subprocess.run(["cp", "-r", whole / "store", path], check=True)
    before = files_of(path, "logits/*/c/**/*")
    content = bytearray((path / "targets.zarr" / damaged).read_bytes())
    content[len(content) // 2] ^= 4
    (path / "targets.zarr" / damaged).write_bytes(content)
    file, where = command_line(tmp_path, *recipe_of(whole))
    where[where.index("--data-root") + 1] = str(whole)
    result = invoke("store", "repair", path, file, *where)
    assert result.exit_code == 0, result.output
    assert f"doing {redone} blocks again" in result.stderr
    after = files_of(path, "logits/*/c/**/*")
    assert {name: one[0] for name, one in after.items()} == {name: one[0] for name, one in before.items()}
    assert {name for name in after if after[name] != before[name]} == {f"targets.zarr/{damaged}"}
    assert verify(Folder(path)).faults == []


def test_a_part_of_a_store_gives_batches_and_lookups_of_the_same_logits(whole, tmp_path):
    part = tmp_path / "part"
    pulled = invoke("store", "pull", whole / "store", part, "--blocks", "0:2", "--views", "0:4")
    assert pulled.exit_code == 0, pulled.output
    assert verify(Folder(part)).faults == []
    expected = all_logits(whole / "store", views=range(4))[:80]
    assert torch.equal(all_logits(part, views=range(4)), expected)
    recipe, manifest = recipe_of(whole, count=4, data={"tars": [0, 1]})
    images, store = training_images(recipe, manifest, [whole]), open_store(part)
    hashes = np.concatenate([images[0].key_hash, images[1].key_hash])
    stream = make_loader(recipe, source_of(recipe, images, [store], recipe.objectives["kd"]), 0, CPU)
    tables = {name: torch.from_numpy(one.astype("f4")) for name, one in store.codec_tables.items()}
    shown = 0
    for batch in stream.epoch(0):
        z = store.identity.codec.decode(batch.signal[0].logits, 20, tables)
        rows = [int(np.flatnonzero(hashes == one)[0]) for one in batch.key_hash]
        matches = (z[:, None] == expected[rows]).all(dim=2)  # one of the four views of that image
        assert matches.any(dim=1).all()
        shown += len(rows)
    assert shown == 80


@pytest.mark.slow
def test_another_teacher_is_added_with_means_of_its_own(whole, tmp_path):
    torch.manual_seed(9)
    torch.save(build("cifar:resnet8", 20).state_dict(), tmp_path / "other.pt")
    recipe, manifest = recipe_of(whole)
    teacher = recipe.teacher.model_copy(update={"weights": str(tmp_path / "other.pt")})
    other, path = recipe.model_copy(update={"name": "other", "teacher": teacher}), tmp_path / "store"
    subprocess.run(["cp", "-r", whole / "f32", path], check=True)
    cache_teacher(other, manifest, [whole], path, CPU, add=True)
    at_once = all_logits(path, "other")
    # Two groups of a block again, by what the third has kept.
    for views in ("00000-00002", "00002-00004"):
        (path / f"ledger/000001-{views}.other.json").unlink()
    (path / "targets.zarr/teachers/other/logits/codes/c/1/0/0").unlink()
    (path / "manifest.json").unlink()
    cache_teacher(other, manifest, [whole], path, CPU, add=True)
    assert torch.equal(all_logits(path, "other"), at_once)
    assert torch.equal(all_logits(path), all_logits(whole / "f32"))
    assert verify(Folder(path)).faults == []


# ---- rows and means --------------------------------------------------------------------------------------------------


def test_bad_images_shift_no_mean_against_its_rows_whenever_a_group_is_captured(tmp_path):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    changes = {"data": {"bad_images": "skip"}}
    for path, counts in ((whole, [6]), (grown, [2, 6])):
        for count in counts:
            recipe, manifest = recipe_of(tmp_path, with_bad_ones(), count, **changes)
            cache_teacher(recipe, manifest, [tmp_path], path, CPU)
    exact, manifest = recipe_of(tmp_path, with_bad_ones(), codec={"name": "f32"}, **changes)
    cache_teacher(exact, manifest, [tmp_path], tmp_path / "f32", CPU)
    z, z_t = all_logits(grown), all_logits(tmp_path / "f32")
    assert len(z) == 87
    assert torch.equal(z, all_logits(whole))
    for turn in (-1, 1):
        shifted = z_t.roll(turn, dims=0)
        assert ((z - z_t).square().mean(dim=(1, 2)) < (z - shifted).square().mean(dim=(1, 2))).all()


@pytest.mark.slow
@pytest.mark.parametrize("first_is_bad", [True, False])
def test_groups_of_other_images_than_those_of_the_means_are_refused(tmp_path, first_is_bad):
    """A dataset that nobody vouches for, in which an image was mended, or broke, between two captures."""
    path = tmp_path / "store"
    for samples, count in zip([with_bad_ones(), make_samples()][:: 1 if first_is_bad else -1], (2, 6), strict=True):
        recipe, manifest = recipe_of(tmp_path, samples, count, data={"bad_images": "skip"})
        (split,) = (split for split in manifest.datasets["photos"].splits.values())
        tars = [tar.model_copy(update={"sha256": None}) for tar in split.tars]
        splits = {"train": split.model_copy(update={"tars": tars})}
        unproven = manifest.datasets["photos"].model_copy(update={"splits": splits})
        manifest = manifest.model_copy(update={"datasets": {"photos": unproven}})
        if count == 2:
            with contextlib.suppress(StoreMismatch):  # it cannot be finished when it is not known which image is bad
                cache_teacher(recipe, manifest, [tmp_path], path, CPU)
    means = files_of(path, "logits/means/c/*/*")
    with pytest.raises(StoreMismatch, match="are not those of which the store has other views already"):
        cache_teacher(recipe, manifest, [tmp_path], path, CPU)
    assert files_of(path, "logits/means/c/*/*") == means


def test_a_store_whose_rows_were_shifted_is_not_finished(whole, tmp_path):
    path = tmp_path / "store"
    subprocess.run(["cp", "-r", whole / "store", path], check=True)
    rewrite(path, "logits/codes", 1, 2, lambda code: np.roll(code, 1, axis=0))
    (path / "manifest.json").unlink()
    recipe, manifest = recipe_of(whole)
    with pytest.raises(StoreCorrupt, match="the teacher run again differs from the store by up to"):
        cache_teacher(recipe, manifest, [whole], path, CPU)


def test_tables_that_no_coder_has_are_refused_in_one_line(whole, tmp_path):
    for name, change, problem in (
        ("view_frequency", lambda one: one // 2, f"do not sum to {TOTAL}"),
        ("refine_frequency", lambda one: np.roll(one, 3, axis=1), "reaches further on one side of 0"),
        ("level_frequency", lambda one: one[:, ::-1], "of other levels than 0 to 7"),
    ):
        path = tmp_path / name
        shutil.copytree(whole / "store", path)
        store = open_store(path)
        (spec,) = (one for one in store.parts[""].tables["codec"] if one.name == f"codec/{name}")
        file, entry_file = path / "targets.zarr" / spec.object_key(0, 0), path / "ledger/templates-codec.json"
        content = encode_chunk(spec, np.ascontiguousarray(change(store.codec_tables[name])))
        file.write_bytes(content)
        about = json.loads(entry_file.read_text())
        about["objects"][spec.object_key(0, 0)] = stored_object(content).model_dump()
        entry_file.write_text(json.dumps(about))
        vouch_for_ledger(path)
        with pytest.raises(StoreCorrupt, match=problem):
            all_logits(path)


def test_a_store_of_the_first_form_of_the_codec_is_refused_in_one_line_and_never_decoded(whole, tmp_path):
    """Its arrays were `mean` and `code`, of which every row was a code with zeros behind it."""
    path = tmp_path / "store"
    shutil.copytree(whole / "store", path)
    for now, then in (("means", "mean"), ("codes", "code")):
        (path / f"targets.zarr/logits/{then}").mkdir()
        (path / f"targets.zarr/logits/{now}/c").rename(path / f"targets.zarr/logits/{then}/c")
        for entry in path.glob("ledger/0*.json"):
            entry.write_text(entry.read_text().replace(f"logits/{now}/", f"logits/{then}/"))
    vouch_for_ledger(path)
    problem = "not for logits/(means|codes)/c/0/0.*: what this store holds is in a form .* Capture the store again"
    with pytest.raises(StoreCorrupt, match=problem):
        all_logits(path)
    assert any(re.search(problem, one.problem) for one in verify(Folder(path)).faults)
    recipe, manifest = recipe_of(whole, count=8)
    with pytest.raises(StoreCorrupt, match=problem):
        cache_teacher(recipe, manifest, [whole], path, CPU)


def test_not_finite_logits_are_refused(recipe_file, where, tmp_path):
    codec = ("--set", "capture.codec={name: klt_means, step: 0.5, refine: 4}")
    model = ("--set", "teacher.model=networks:nan_on_some_views", "--set", "data.tars=[2]")
    message = refused("cache-teacher", recipe_file, "--store", tmp_path / "store", *codec, *model, *where)
    assert "learns from logits that are not finite" in message
    assert not list((tmp_path / "store").glob("ledger/0*"))
