"""Several writers, killed writers, growing stores: what comes out is what one undisturbed writer makes."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, ROOT, invoke, refused

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.distill.teacher_signal import Ensemble, ensemble_logits, stored_signal
from offline_kd.distill.training import make_loader, open_stores, source_of, training_images
from offline_kd.models.networks import build
from offline_kd.recipe import Recipe
from offline_kd.store.leases import Leases, leases_at
from offline_kd.store.leftovers import sweep
from offline_kd.store.opening import group_digests, open_store
from offline_kd.store.places import Folder
from offline_kd.store.schema import LedgerEntry
from offline_kd.store.verification import verify
from offline_kd.support.errors import LeaseLost
from offline_kd.support.processes import this_machine


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


def test_three_writers_share_a_capture(recipe_file, where, store_path, tmp_path):
    path = tmp_path / "store"
    finish([start_writer(recipe_file, path, where) for _ in range(3)])
    assert open_store(path).digest == open_store(store_path).digest
    assert verify(Folder(path)).faults == []
    assert not list((path / "leases").iterdir())


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


# ---- leases --------------------------------------------------------------------------------------------------------


def test_only_one_writer_gets_a_lease_and_it_passes_on_when_it_is_given_back(tmp_path):
    with leases_at(Folder(tmp_path)) as one, leases_at(Folder(tmp_path)) as other:
        assert one.claim("block-0")
        assert not other.claim("block-0")
        assert one.is_mine("block-0")
        one.release("block-0")
        assert other.claim("block-0")
        assert not one.is_mine("block-0")


def test_a_lease_whose_holder_shows_no_life_is_taken_over_and_its_old_holder_knows(tmp_path):
    with leases_at(Folder(tmp_path)) as one, leases_at(Folder(tmp_path), seconds=0.2) as other:
        assert one.claim("block-0")
        assert not other.claim("block-0")
        time.sleep(0.3)
        assert other.claim("block-0")
        assert not one.is_mine("block-0")
        assert other.is_mine("block-0")


def test_a_lease_that_was_given_back_and_taken_again_is_not_that_of_a_writer_that_slept(tmp_path):
    place = Folder(tmp_path)
    with leases_at(place) as slept, leases_at(place, seconds=0) as other, leases_at(place) as third:
        assert slept.claim("block-0")
        while not other.claim("block-0"):
            time.sleep(0.01)
        other.release("block-0")
        assert third.claim("block-0")
        assert slept.held["block-0"][0] == third.held["block-0"][0] == 1  # the number is used again, the token is not
        assert not slept.is_mine("block-0")
        slept.release("block-0")
        assert third.is_mine("block-0")


def lease(**changes: object) -> str:
    about = {"token": "0" * 32, "writer": "a" * 32, "machine": "another", "pid": 7, "written": 0.0}
    return json.dumps(about | changes)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 2000,
        "null",
        "\0",
        '"' + "x" * 10_000,
        lease(pid=-1),
        lease(pid=2**70),
        lease(pid=[1]),
        lease(writer="../../store"),
        lease(written=float("nan")),
        lease(written=float("inf")),
        lease(written=time.time() + 1e7),
        '{"writer": "a", "machine": "b", "pid": 1, "renewed": Infinity}',
    ],
)
def test_no_content_of_a_lease_keeps_writers_away_for_longer_than_a_lease(content, tmp_path):
    place = Folder(tmp_path)
    place.put("leases/block-0.1", content.encode())
    place.put("leases/block-0.\u00b2", b"{}")
    place.put("leases/writer-" + "a" * 32, lease(written=1e300).encode())
    sweep(place)
    with leases_at(place, seconds=0.1) as leases:
        if not leases.claim("block-0"):
            time.sleep(0.15)
            assert leases.claim("block-0")
        assert leases.is_mine("block-0")


@dataclass(frozen=True)
class Counting(Folder):
    deleted: list[str] = field(default_factory=list)

    def delete(self, name: str) -> None:
        self.deleted.append(name)
        super().delete(name)


def test_a_lease_of_generation_three_million_is_given_back_in_two_steps(tmp_path):
    place = Counting(tmp_path)
    place.put("leases/block-0.3000000", b"{}")
    leases = Leases(place)
    assert leases.claim("block-0")
    assert leases.held["block-0"][0] == 3_000_001
    leases.release("block-0")
    assert place.deleted == ["leases/block-0.3000000", "leases/block-0.3000001"]
    leases.close()


class Hasty(Folder):
    """Another writer creates what one wants to create, and removes it at once."""

    def create(self, name: str, content: bytes) -> bool:
        super().create(name, b"of another")
        super().delete(name)
        return False


def test_a_lease_that_comes_and_goes_during_a_claim_is_not_ours_and_no_error(tmp_path):
    with leases_at(Hasty(tmp_path)) as leases:
        assert not leases.claim("block-0")


def test_leases_are_renewed_while_they_are_held(tmp_path):
    with leases_at(Folder(tmp_path), seconds=0.4) as one, leases_at(Folder(tmp_path), seconds=0.4) as other:
        assert one.claim("block-0")
        time.sleep(1.0)
        assert not other.claim("block-0")


def test_the_lease_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from offline_kd.store.leases import Leases\n"
        "from offline_kd.store.places import Folder\n"
        "assert Leases(Folder(Path(sys.argv[1]))).claim('block-0'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=ROOT)
    with leases_at(Folder(tmp_path)) as leases:
        assert leases.claim("block-0")


def test_a_slow_writer_does_not_write_over_the_one_that_took_its_block_over(recipe, manifest, roots, tmp_path):
    """The worst case: a teacher that is not reproducible, and a writer that wakes up after its lease is gone."""
    from offline_kd.store.layout import parts_of
    from offline_kd.store.writer import commit

    one_tar = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tars": [2]})})
    cache_teacher(one_tar, manifest, roots, tmp_path / "store", CPU)
    store = open_store(tmp_path / "store")
    arrays = {name: array.copy() for name, array in store.read(0, 0, list(store.arrays)).items()}
    arrays["logits/values"] += 1e-6
    entry = store.entry("", 0, 0)
    part, views = parts_of(store.created)[""], store.identity.groups[0]
    with pytest.raises(Exception, match="another writer took this over"):
        commit(
            store.place, part, 0, 0, views, arrays, tar=entry.tar, tar_sha256=entry.tar_sha256, still_mine=lambda: False
        )
    assert verify(store.place).faults == []


def test_of_two_writers_that_disagree_the_entry_vouches_for_what_is_there(store_path, tmp_path):
    """A writer that slept vouches in the moment in which the lease's holder replaces what it wrote."""
    from offline_kd.store.layout import parts_of
    from offline_kd.store.writer import commit

    path = Path(shutil.copytree(store_path, tmp_path / "store"))
    store = open_store(path)
    arrays = {name: array.copy() for name, array in store.read(2, 0, list(store.arrays)).items()}
    arrays["logits/values"] += 1e-6
    entry, part, views = store.entry("", 2, 0), parts_of(store.created)[""], store.identity.groups[0]
    standing = commit(store.place, part, 2, 0, views, arrays, tar=entry.tar, tar_sha256=entry.tar_sha256)
    file = path / "ledger" / entry.file_name
    assert LedgerEntry.model_validate_json(file.read_text()) == standing
    for key, stored in standing.objects.items():
        assert hashlib.sha256((path / "targets.zarr" / key).read_bytes()).hexdigest() == stored.sha256
    # One that lost its lease does not vouch, whatever it wrote.
    file.unlink()
    about = {"tar": entry.tar, "tar_sha256": entry.tar_sha256, "still_mine": lambda: False}
    with pytest.raises(LeaseLost):
        commit(store.place, part, 2, 0, views, arrays, **about)
    assert not file.exists()


# What a writer does whose clock is wrong by so many seconds, and for which a lease lasts so many.
WRITER = (
    "import sys, time; right = time.time; time.time = lambda: right() + float(sys.argv[1])\n"
    "from offline_kd.store import leases; leases.LEASE_SECONDS = float(sys.argv[2])\n"
    "from offline_kd.cli.main import main; main(sys.argv[3:])"
)


@pytest.mark.parametrize("first_clock", [3600, pytest.param(-3600, marks=pytest.mark.slow)])
def test_clocks_an_hour_apart_and_a_writer_that_slept_past_its_lease(
    first_clock, recipe, manifest, roots, where, tmp_path
):
    content = recipe.model_dump(mode="json", exclude_none=True)
    content["teacher"]["model"], content["data"]["tars"] = "networks:slow", [2]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    cache_teacher(Recipe.model_validate(content), manifest, roots, tmp_path / "alone", CPU)
    path = tmp_path / "store"

    def start(clock: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WRITER, str(clock), "2", "cache-teacher", str(tmp_path / "recipe.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "--store", str(path), *where], stderr=subprocess.PIPE, cwd=ROOT, env=environment
        )

    slept = start(first_clock)
    while not is_at_work(slept, path):
        assert slept.poll() is None
        time.sleep(0.002)
    slept.send_signal(signal.SIGSTOP)
    try:
        other = start(-first_clock)
        other.communicate(timeout=300)  # it would be two hours, by the clock
        assert other.returncode == 0
        committed = {file: file.read_bytes() for file in path.glob("ledger/*")}
    finally:
        slept.send_signal(signal.SIGCONT)
    said = slept.communicate(timeout=300)[1].decode()
    assert slept.returncode == 0, said
    assert {file: file.read_bytes() for file in path.glob("ledger/*")} == committed
    assert open_store(path).digest == open_store(tmp_path / "alone").digest
    assert verify(Folder(path)) == verify(Folder(tmp_path / "alone"))
    assert list((path / "leases").iterdir()) == []


# ---- what ended writers leave --------------------------------------------------------------------------------------


def test_what_ended_writers_leave_is_no_fault_and_goes_away_but_not_what_others_use(
    store_path, recipe_file, where, tmp_path
):
    path = Path(shutil.copytree(store_path, tmp_path / "store"))
    child = subprocess.Popen(["true"])
    child.wait()
    ended, living, elsewhere = f"{this_machine()}-{child.pid}", f"{this_machine()}-{os.getpid()}", f"{'0' * 16}-1"
    for owner in (ended, living, elsewhere):
        (path / f"targets.zarr/label/zarr.json.{owner}-140.partial").write_bytes(b"half")
        (path / f"scratch-{owner}-abc").mkdir()
        (path / f"scratch-{owner}-abc" / "features").write_bytes(b"many")
        (path / "leases").mkdir(exist_ok=True)
        machine, pid = owner.split("-")
        about = lease(machine=machine, pid=int(pid), written=time.time())
        (path / "leases" / f"block-000000.{pid}").write_text(about)
    (path / "leases" / "finish.1").write_text("")
    assert verify(Folder(path)).faults == []
    assert verify(Folder(path)).leftovers == 10
    result = invoke("store", "verify", path)
    assert result.exit_code == 0
    assert "no fault; 10 files of writers at work, or ended: harmless" in result.stderr
    command = {
        "cache-teacher": ("cache-teacher", recipe_file, "--store", path, *where),
        "repair": ("store", "repair", path, recipe_file, *where),
        "pull": ("store", "pull", store_path, path),
    }
    kept = {str(file.relative_to(path)) for file in path.rglob("*") if ended not in file.name}
    kept -= {"leases/finish.1", f"leases/block-000000.{child.pid}"}
    kept -= {f"scratch-{ended}-abc/features"}
    for name, arguments in command.items():
        (path / "leases" / "finish.1").write_text("")
        assert invoke(*arguments).exit_code == 0, name
        assert {str(file.relative_to(path)) for file in path.rglob("*")} == kept, name
    (path / "notes.partial").write_text("mine")
    assert [fault.file for fault in verify(Folder(path)).faults] == ["notes.partial"]


def test_a_thread_renews_for_every_writer_of_a_process(tmp_path):
    leases = Leases(Folder(tmp_path))
    assert leases.thread.is_alive()
    leases.close()
    assert not leases.thread.is_alive()


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
    stores, mix = open_stores(both, manifest, ())
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
        [({"seed": 1}, "holds the views"), ({"count": 6}, "holds 6 views of every image in groups of 3")]
    ):
        views = other_teacher.views.model_copy(update=change)
        alone = tmp_path / f"alone{index}"
        cache_teacher(other_teacher.model_copy(update={"views": views}), manifest, roots, alone, CPU)
        options = ("--store", store_path, "--store", alone, "--objective", "kd", "--out", tmp_path / f"run{index}")
        assert message in refused("distill", recipe_file, *options, *where)


# ---- planning ------------------------------------------------------------------------------------------------------


def test_a_plan_is_near_what_the_capture_then_takes(recipe_file, where, store_path):
    found = json.loads(invoke("store", "plan", recipe_file, "--json", *where).stdout)
    finished = open_store(store_path).manifest
    assert found["rows"] == 1438 * 9
    assert found["total_bytes"] == pytest.approx(finished.total_bytes, rel=0.1)
    objects = [file for file in (store_path / "targets.zarr").rglob("c/**/*") if file.is_file()]
    assert found["objects"] == len(objects) + len(finished.entries)
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
