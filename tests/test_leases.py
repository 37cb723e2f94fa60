"""Leases: one holder at a time, whatever they contain, whoever slept, whatever clocks say; what ended writers leave."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import CPU, ROOT, invoke
from test_writers import is_at_work

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.recipe import Recipe
from offline_kd.store.layout import parts_of
from offline_kd.store.leases import Leases, leases_at
from offline_kd.store.leftovers import sweep
from offline_kd.store.opening import open_store
from offline_kd.store.schema import LedgerEntry
from offline_kd.store.verification import verify
from offline_kd.store.writer import commit
from offline_kd.support.errors import LeaseLost
from offline_kd.support.places import Folder
from offline_kd.support.processes import this_machine


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
        "from offline_kd.support.places import Folder\n"
        "assert Leases(Folder(Path(sys.argv[1]))).claim('block-0'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=ROOT)
    with leases_at(Folder(tmp_path)) as leases:
        assert leases.claim("block-0")


def test_a_slow_writer_does_not_write_over_the_one_that_took_its_block_over(recipe, manifest, roots, tmp_path):
    """The worst case: a teacher that is not reproducible, and a writer that wakes up after its lease is gone."""
    one_tar = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tars": [2]})})
    cache_teacher(one_tar, manifest, roots, tmp_path / "store", CPU)
    store = open_store(tmp_path / "store")
    arrays = {name: array.copy() for name, array in store.read(0, 0, list(store.arrays)).items()}
    arrays["logits/values"] += 1e-6
    entry = store.entry("", 0, 0)
    part = parts_of(store.created)[""]
    with pytest.raises(Exception, match="another writer took this over"):
        commit(store.place, part, 0, entry, arrays, lambda: False)
    assert verify(store.place).faults == []


def test_of_two_writers_that_disagree_the_entry_vouches_for_what_is_there(store_path, tmp_path):
    """A writer that slept vouches in the moment in which the lease's holder replaces what it wrote."""
    path = Path(shutil.copytree(store_path, tmp_path / "store"))
    store = open_store(path)
    arrays = {name: array.copy() for name, array in store.read(2, 0, list(store.arrays)).items()}
    arrays["logits/values"] += 1e-6
    entry, part = store.entry("", 2, 0), parts_of(store.created)[""]
    standing = commit(store.place, part, 0, entry, arrays)
    file = path / "ledger" / entry.file_name
    assert LedgerEntry.model_validate_json(file.read_text()) == standing
    for key, stored in standing.objects.items():
        assert hashlib.sha256((path / "targets.zarr" / key).read_bytes()).hexdigest() == stored.sha256
    # One that lost its lease does not vouch, whatever it wrote.
    file.unlink()
    with pytest.raises(LeaseLost):
        commit(store.place, part, 0, entry, arrays, lambda: False)
    assert not file.exists()


# What a writer does whose clock is wrong by so many seconds, and for which a lease lasts so many.
WRITER = (
    "import sys, time; right = time.time; time.time = lambda: right() + float(sys.argv[1])\n"
    "from offline_kd.store import leases; leases.LEASE_SECONDS = float(sys.argv[2])\n"
    "from offline_kd.cli.main import main; main(sys.argv[3:])"
)


@pytest.mark.slow
@pytest.mark.parametrize("first_clock", [3600, -3600])
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
