"""Several writers, killed writers, growing stores: what comes out is what one undisturbed writer makes."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, ROOT, invoke, refused

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.distill.teacher_signal import Ensemble, ensemble_logits, stored_signal
from offline_kd.distill.training import make_loader, open_stores, source_of, training_images, wanted_stores
from offline_kd.models.networks import build
from offline_kd.recipe import Recipe
from offline_kd.store.opening import group_digests, open_store
from offline_kd.store.schema import LedgerEntry
from offline_kd.store.verification import verify
from offline_kd.support.places import Folder


def start_writer(recipe_file: Path, path: Path, where: list[str], *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "offline_kd", "cache-teacher", str(recipe_file), "--store", str(path)]
    # One thread each: three writers share two cores here.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options, *where], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    )


def finish(writers: list[subprocess.Popen[bytes]]) -> list[str]:
    said = [writer.communicate()[1].decode() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * len(writers), "\n".join(said)
    return said


def listed_blocks_are_whole(path: Path) -> int:
    entries = list(path.glob("ledger/*.json"))
    for file in entries:
        entry = LedgerEntry.model_validate_json(file.read_text())
        assert all((path / "targets.zarr" / key).stat().st_size == one.bytes for key, one in entry.objects.items())
    return len(entries)


def killed_writers(recipe_file: Path, path: Path, where: list[str], kills: int) -> int:
    """Three writers, of which a random one is killed at a random moment and started again, `kills` times.

    Returns how many of them had the lease of a block when they were killed.
    """
    moments, at_work = random.Random(kills), 0
    writers = [start_writer(recipe_file, path, where) for _ in range(3)]
    for kill in range(kills):
        if (path / "manifest.json").exists():  # finished between two kills: take blocks back, so that there is work
            (path / "manifest.json").unlink()
            for file in moments.sample(sorted(path.glob("ledger/*.json")), 6):
                file.unlink()
        for index, writer in enumerate(writers):
            if writer.poll() is not None:
                writer.communicate()
                writers[index] = start_writer(recipe_file, path, where)
        # Every fourth is killed whenever it may be, the others once one has begun a block: starting takes seconds.
        deadline = time.monotonic() + (moments.uniform(0.5, 8) if kill % 4 == 3 else 60)
        while time.monotonic() < deadline and not any(is_at_work(writer, path) for writer in writers):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.5))
        holders = [index for index, writer in enumerate(writers) if is_at_work(writer, path)]
        victim = moments.choice(holders or [0, 1, 2])
        at_work += is_at_work(writers[victim], path)
        writers[victim].send_signal(signal.SIGKILL)
        writers[victim].communicate()
        listed_blocks_are_whole(path)
        writers[victim] = start_writer(recipe_file, path, where)
    finish(writers)
    return at_work


def is_at_work(writer: subprocess.Popen[bytes], path: Path) -> bool:
    return writer.poll() is None and any(f'"pid":{writer.pid},' in lease for lease in leases_of_blocks(path))


def leases_of_blocks(path: Path) -> list[str]:
    found = []
    for file in path.glob("leases/block-*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(file.read_text())
    return found


@pytest.fixture(scope="module")
def slow_capture(recipe, manifest, roots, tmp_path_factory) -> tuple[Path, str]:
    """A recipe whose capture takes some seconds, and the digest of an uninterrupted one."""
    folder = tmp_path_factory.mktemp("slow")
    slow = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"model": "networks:slow"})})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(slow.model_dump(mode="json", exclude_none=True)))
    cache_teacher(slow, manifest, roots, folder / "store", CPU)
    return folder / "recipe.yaml", open_store(folder / "store").digest


@pytest.mark.slow
def test_three_writers_share_a_capture(recipe_file, where, store_path, tmp_path):
    path = tmp_path / "store"
    finish([start_writer(recipe_file, path, where) for _ in range(3)])
    assert open_store(path).digest == open_store(store_path).digest
    assert verify(Folder(path)).faults == []
    assert not list((path / "leases").iterdir())


@pytest.mark.slow
def test_writers_killed_at_random_moments_leave_the_same_store(slow_capture, where, tmp_path):
    recipe_file, digest = slow_capture
    assert killed_writers(recipe_file, tmp_path / "store", where, 4) >= 1
    assert open_store(tmp_path / "store").digest == digest
    assert verify(Folder(tmp_path / "store")).faults == []


@pytest.mark.slow
def test_writers_killed_at_twenty_random_moments_leave_the_same_store(slow_capture, where, tmp_path):
    recipe_file, digest = slow_capture
    assert killed_writers(recipe_file, tmp_path / "store", where, 20) >= 10
    assert open_store(tmp_path / "store").digest == digest
    assert verify(Folder(tmp_path / "store")).faults == []


def test_workers_of_a_job_array_do_their_own_blocks_and_the_last_one_finishes(recipe_file, where, store_path, tmp_path):
    path = tmp_path / "store"
    command = ("cache-teacher", recipe_file, "--store", path, *where)
    first = invoke(*command, "--worker", "0/2")
    assert "3 blocks are left for other writers" in first.stderr
    assert {file.name[:6] for file in path.glob("ledger/*.json")} == {"000000", "000002"}
    assert not (path / "manifest.json").exists()
    assert "not finished: 3 of 9 blocks are missing" in refused("store", "info", path)
    assert invoke(*command, "--worker", "1/2").exit_code == 0
    assert open_store(path).digest == open_store(store_path).digest
    for wrong in ("2/2", "a/b", "1"):
        assert "write I/N" in refused(*command, "--worker", wrong)


def test_torchrun_shares_a_capture(recipe_file, where, store_path, tmp_path):
    path = tmp_path / "store"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "offline_kd", "cache-teacher", str(recipe_file), "--store", str(path), *where]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert open_store(path).digest == open_store(store_path).digest


# ---- growing -------------------------------------------------------------------------------------------------------


def with_views(recipe: Recipe, count: int) -> Recipe:
    return recipe.model_copy(update={"views": recipe.views.model_copy(update={"count": count})})


def test_views_added_later_leave_what_was_there_and_readers_of_it_alone(recipe, manifest, roots, store_path, tmp_path):
    path = tmp_path / "store"
    cache_teacher(with_views(recipe, 6), manifest, roots, path, CPU)
    before, digest = open_store(path), open_store(path).digest
    written = {file: file.stat().st_mtime_ns for file in (path / "targets.zarr").rglob("c/**/*") if file.is_file()}
    old_groups = group_digests(before)
    assert list(old_groups) == ["0:3", "3:6"]
    cache_teacher(recipe, manifest, roots, path, CPU)
    after = open_store(path)
    assert after.identity.views.num_views == 9
    assert after.digest == open_store(store_path).digest  # as if it had been captured at once
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert {views: group_digests(after)[views] for views in old_groups} == old_groups
    names = list(before.arrays)
    for block in before.blocks:
        for name, array in before.read(block, 1, names).items():  # a reader that was open
            assert np.array_equal(array, after.read(block, 1, [name])[name])
    as_it_was = open_store(path, digest=digest)
    assert as_it_was.identity.views.num_views == 6
    assert verify(Folder(path)).faults == []
    with pytest.raises(Exception, match="wanted is sha256:0000"):
        open_store(path, digest="0" * 64)


def test_fewer_views_can_be_trained_from_a_store_that_has_more(recipe_file, where, store_path, tmp_path):
    options = ("--store", store_path, "--objective", "kd", *where)
    fewer = ("--set", "views.count=3")
    assert invoke("distill", recipe_file, *options, "--out", tmp_path / "run", *fewer).exit_code == 0
    message = refused("distill", recipe_file, *options, "--out", tmp_path / "odd", "--set", "views.count=4")
    assert "holds 9 views of every image in groups of 3, the recipe says 4" in message


def test_decisions_added_later_serve_students(recipe, manifest, roots, where, store_path, tmp_path):
    path = tmp_path / "store"
    cache_teacher(recipe, manifest, roots, path, CPU)
    objects = {file: file.stat().st_mtime_ns for file in (path / "targets.zarr").rglob("c/**/*") if file.is_file()}
    content = recipe.model_dump(mode="json", exclude_none=True)
    tap = {"kind": "templates", "module": "body.5", "templates": 8, "top": 2}
    content["capture"]["decisions"] = {"late": tap}
    content["objectives"] = {"letkd": [{"term": "ce"}, {"term": "decisions", "decisions": "late"}]}
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(content))
    result = invoke("cache-teacher", tmp_path / "late.yaml", "--store", path, *where)
    assert result.exit_code == 0, result.output
    assert {file: file.stat().st_mtime_ns for file in objects} == objects
    grown = open_store(path)
    assert list(grown.identity.decisions) == ["late"]
    assert grown.manifest.fidelity[""].decisions["late"]["agreement"] > 0.99
    assert open_store(path, digest=open_store(store_path).digest).identity.decisions == {}
    assert verify(Folder(path)).faults == []
    result = invoke("distill", tmp_path / "late.yaml", "--store", path, "--out", tmp_path / "run", *where)
    assert result.exit_code == 0, result.output
    assert "decisions(late)" in invoke("store", "info", path).stdout
    # The same command again, and one for the first targets alone, find nothing to do.
    assert invoke("cache-teacher", tmp_path / "late.yaml", "--store", path, *where).exit_code == 0
    assert open_store(path).digest == grown.digest


@pytest.fixture(scope="module")
def other_teacher(recipe, tmp_path_factory) -> Recipe:
    """Another teacher for the same views; what it says is not good, but it says it."""
    file = tmp_path_factory.mktemp("other") / "other.pt"
    torch.manual_seed(9)
    torch.save(build("networks:small", 10).state_dict(), file)
    teacher = recipe.teacher.model_copy(update={"weights": str(file)})
    return recipe.model_copy(update={"name": "other", "teacher": teacher})


def test_another_teacher_is_added_over_the_same_views_only_if_asked_for(
    recipe, other_teacher, manifest, roots, store_path, tmp_path
):
    path = tmp_path / "store"
    cache_teacher(recipe, manifest, roots, path, CPU)
    first = open_store(path)
    with pytest.raises(Exception, match=r"its teacher\.weights_sha256 is"):
        cache_teacher(other_teacher, manifest, roots, path, CPU)
    cache_teacher(other_teacher, manifest, roots, path, CPU, add=True)
    alone = tmp_path / "alone"
    cache_teacher(other_teacher, manifest, roots, alone, CPU)
    grown, separate = open_store(path, targets="other"), open_store(alone)
    assert grown.identity.teacher.weights_sha256 == separate.identity.teacher.weights_sha256
    for block in grown.blocks:
        for group in range(3):
            names = list(separate.arrays)
            for name, array in grown.read(block, group, names).items():
                assert np.array_equal(array, separate.read(block, group, [name])[name]), name
    assert np.array_equal(
        open_store(path).read(0, 0, ["logits/values"])["logits/values"],
        first.read(0, 0, ["logits/values"])["logits/values"],
    )
    assert open_store(path, digest=first.digest).digest == first.digest
    assert verify(Folder(path)).faults == []
    facts = json.loads(invoke("store", "info", f"{path}#other", "--json").stdout)
    assert facts["other teachers"] == ["other"]
    assert facts["teacher"]["weights_sha256"] == separate.identity.teacher.weights_sha256
    assert "holds no targets 'nobody'" in refused("store", "info", f"{path}#nobody")
    # A block of the second teacher that is damaged is repaired by its own recipe.
    (path / "targets.zarr/teachers/other/logits/values/c/1/1/0").write_bytes(b"")
    recipe_file = tmp_path / "other.yaml"
    recipe_file.write_text(yaml.safe_dump(other_teacher.model_dump(mode="json", exclude_none=True)))
    where = ["--manifest", str(ROOT / "data_manifest.yaml"), "--data-root", str(roots[0])]
    assert invoke("store", "repair", path, recipe_file, *where).exit_code == 0
    assert open_store(path).digest == grown.digest


@pytest.mark.slow
def test_decisions_of_another_teacher_can_be_added_later_too(recipe, other_teacher, manifest, roots, tmp_path):
    path, data = tmp_path / "store", recipe.data.model_copy(update={"tars": [2]})
    cache_teacher(recipe.model_copy(update={"data": data}), manifest, roots, path, CPU)
    other = other_teacher.model_copy(update={"data": data})
    cache_teacher(other, manifest, roots, path, CPU, add=True)
    content = other.model_dump(mode="json", exclude_none=True)
    content["capture"]["decisions"] = {"late": {"kind": "templates", "module": "body.5", "templates": 8}}
    cache_teacher(Recipe.model_validate(content), manifest, roots, path, CPU, add=True)
    assert list(open_store(path, targets="other").identity.decisions) == ["late"]
    assert open_store(path).identity.decisions == {}
    assert open_store(path, targets="other").read_tables("late")["centroids"].shape == (8, 16)
    assert len(open_store(path).manifest.earlier) == 2
    assert verify(Folder(path)).faults == []
    before = open_store(path).digest
    cache_teacher(Recipe.model_validate(content), manifest, roots, path, CPU, add=True)
    assert open_store(path).digest == before


def test_two_teachers_captured_separately_join_exactly_and_are_mixed(
    recipe, other_teacher, manifest, roots, store_path, where, tmp_path
):
    alone = tmp_path / "alone"
    cache_teacher(other_teacher, manifest, roots, alone, CPU)
    mixed = {"store": [{"store": str(store_path), "weight": 3.0}, {"store": str(alone), "weight": 1.0}]}
    both = Recipe.model_validate(recipe.model_dump(exclude={"store"}) | mixed)
    stores, mix = open_stores(both, manifest, wanted_stores(both))
    loader = training_images(both, manifest, roots)
    stream = make_loader(both, source_of(both, loader, stores, both.objectives["kd"]), 0, CPU)
    ask = stored_signal(stores, both.objectives["kd"], CPU, mix)
    singles = [stored_signal([store], both.objectives["kd"], CPU) for store in stores]
    for batch in stream.epoch(4):
        first_z = singles[0](replace(batch, signal=batch.signal[:1])).logits
        second_z = singles[1](replace(batch, signal=batch.signal[1:])).logits
        expected = (0.75 * first_z.softmax(-1) + 0.25 * second_z.softmax(-1)).log()
        torch.testing.assert_close(ask(batch).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ensemble_logits([first_z, second_z], Ensemble([3, 1], "logit")), 0.75 * first_z + 0.25 * second_z
    )
    file = tmp_path / "both.yaml"
    file.write_text(yaml.safe_dump(both.model_dump(mode="json", exclude_none=True)))
    result = invoke("distill", file, "--objective", "kd", "--out", tmp_path / "run", *where)
    assert result.exit_code == 0, result.output
    assert "DTKD needs the offset" in refused("distill", file, "--objective", "dtkd", "--out", tmp_path / "x", *where)
    logit = ("--set", "mix=logit", "--objective", "dtkd", "--out", tmp_path / "dtkd")
    assert invoke("distill", file, *logit, *where).exit_code == 0


def test_teachers_over_other_views_are_not_mixed(
    other_teacher, manifest, roots, store_path, where, recipe_file, tmp_path
):
    for index, (change, message) in enumerate(
        [
            ({"seed": 1}, "views.seed: 1 in the store, 0 in the recipe"),
            ({"count": 6}, "holds 6 views of every image in groups of 3"),
        ]
    ):
        views = other_teacher.views.model_copy(update=change)
        alone = tmp_path / f"alone{index}"
        cache_teacher(other_teacher.model_copy(update={"views": views}), manifest, roots, alone, CPU)
        options = ("--store", store_path, "--store", alone, "--objective", "kd", "--out", tmp_path / f"run{index}")
        assert message in refused("distill", recipe_file, *options, *where)


# ---- planning ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_is_near_what_the_capture_then_takes(recipe_file, where, store_path):
    found = json.loads(invoke("store", "plan", recipe_file, "--json", *where).stdout)
    finished = open_store(store_path).manifest
    assert found["rows"] == 1438 * 9
    assert found["total_bytes"] == pytest.approx(finished.total_bytes, rel=0.1)
    objects = [file for file in (store_path / "targets.zarr").rglob("c/**/*") if file.is_file()]
    others = [file for folder in ("ledger", "hashes") for file in (store_path / folder).iterdir()]
    assert found["objects"] == len(objects) + len(others)
    assert found["teacher_passes"] == 1438 * 9 + 359
    assert found["break_even_students"] >= 1
    assert "students from which on the store pays" in invoke("store", "plan", recipe_file, *where).stdout


def test_views_and_decisions_grow_together(recipe, manifest, roots, tmp_path):
    path, data = tmp_path / "store", recipe.data.model_copy(update={"tars": [2]})
    few = with_views(recipe.model_copy(update={"data": data}), 6)
    content = few.model_dump(mode="json", exclude_none=True)
    content["capture"]["decisions"] = {"late": {"kind": "templates", "module": "body.5", "templates": 8}}
    late = Recipe.model_validate(content)
    cache_teacher(few, manifest, roots, path, CPU)
    with pytest.raises(Exception, match="holds 6 views, the recipe adds late for 3 only"):
        cache_teacher(with_views(late, 3), manifest, roots, path, CPU)
    cache_teacher(late, manifest, roots, path, CPU)
    with pytest.raises(Exception, match="holds decisions late of 6 views, and the recipe, which has 9 views, does not"):
        cache_teacher(with_views(few, 9), manifest, roots, path, CPU)
    cache_teacher(with_views(late, 9), manifest, roots, path, CPU)
    assert open_store(path).identity.views.num_views == 9
    assert verify(Folder(path)).faults == []


@pytest.mark.slow
def test_two_additions_at_the_same_time_both_stay(recipe, manifest, roots, where, tmp_path):
    path = tmp_path / "store"
    cache_teacher(recipe, manifest, roots, path, CPU)
    writers = []
    for tap in ("one", "other"):
        content = recipe.model_dump(mode="json", exclude_none=True)
        content["capture"]["decisions"] = {tap: {"kind": "templates", "module": "body.5", "templates": 8}}
        (tmp_path / f"{tap}.yaml").write_text(yaml.safe_dump(content))
        writers.append(start_writer(tmp_path / f"{tap}.yaml", path, where))
    finish(writers)
    assert set(open_store(path).identity.decisions) == {"one", "other"}
    assert len(open_store(path).manifest.earlier) == 2
    assert verify(Folder(path)).faults == []


def test_another_teacher_is_not_added_over_images_that_changed_since(
    recipe, other_teacher, manifest, data_root, tmp_path
):
    """A dataset without sha256 in the manifest, so that only the rows themselves can tell."""
    from test_store import small_dataset

    from offline_kd.data.packing import pack
    from offline_kd.data.tars import read_tar

    samples = read_tar(data_root / "digits" / "train-000000.tar")[0][:100]
    dataset = small_dataset(tmp_path, data_root, {"train": [samples], "test": [samples]})
    unproven = {
        name: split.model_copy(update={"tars": [tar.model_copy(update={"sha256": None}) for tar in split.tars]})
        for name, split in dataset.splits.items()
    }
    changed = manifest.model_copy(update={"datasets": {"digits": dataset.model_copy(update={"splits": unproven})}})
    cache_teacher(recipe, changed, [tmp_path], tmp_path / "store", CPU)
    digest = open_store(tmp_path / "store").digest
    pack([samples[1], samples[0], *samples[2:]], tmp_path / "set", "train0", 10_000)  # two rows change places
    with pytest.raises(Exception, match=r"block 0 \(train0-000000\.tar\), key_hash is not what this capture has"):
        cache_teacher(other_teacher, changed, [tmp_path], tmp_path / "store", CPU, add=True)
    assert open_store(tmp_path / "store").digest == digest
