"""What does not grow with a store: requests to open it, to read from it, and to plan the rest of a capture."""

import shutil
from pathlib import Path

import bench_scale
import pytest
from bench_scale import Counted, asked, first_batch, first_pool, make, plan
from test_old_stores import DIGEST_4, STORE_4

from offline_kd.store.opening import open_store
from offline_kd.store.schema import page_name
from offline_kd.store.sync import copy_store
from offline_kd.store.verification import take_back, verify
from offline_kd.support.errors import StoreError
from offline_kd.support.places import Folder

FEW, MANY, GROUPS = 16, 1400, 2  # tars, tars, view groups


def requests(work, *arguments: object) -> list[str]:
    asked.clear()
    work(*arguments)
    return list(asked)


def test_requests_to_open_to_begin_and_to_resume_do_not_grow_with_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scale, "LINKED", 0)  # only what is read has objects
    found = {}
    for tars in (FEW, MANY):
        make(tmp_path / f"{tars}", tars, GROUPS)
        place = Counted(tmp_path / f"{tars}" / "store")
        found[tars] = [
            requests(open_store, place),
            requests(first_batch, place, tmp_path / f"{tars}" / "images"),
            requests(plan, place),
        ]
    (opened, began, planned), (opened_many, began_many, planned_many) = found.values()
    assert opened == opened_many == ["store.json", "manifest.json"]
    pages = {page_name(block, range(1)) for block in first_pool(MANY)}
    assert len(pages) == 2
    assert len(began_many) - len(began) == len(pages) - 1
    assert len(began) == len(set(began))
    assert planned == planned_many
    assert planned.count("ledger") == 1  # a list of it
    assert not [name for name in planned if name.startswith(("ledger/", "hashes/")) or "/c/" in name]


FIRST, OTHER = "hashes/000000-00000-00001.bin", "hashes/000000-00001-00002.second.bin"


def change(path: Path) -> None:
    (path / FIRST).write_bytes(bytes(32))


def swap(path: Path) -> None:
    one, other = ((path / name).read_bytes() for name in (FIRST, OTHER))
    (path / FIRST).write_bytes(other)
    (path / OTHER).write_bytes(one)


@pytest.mark.parametrize("damage", [change, swap, lambda path: (path / FIRST).unlink()])
def test_a_page_of_hashes_that_was_changed_exchanged_or_lost_is_found_and_named(damage, tmp_path):
    path = Path(shutil.copytree(STORE_4, tmp_path / "store"))
    damage(path)
    store = open_store(path, digest=DIGEST_4)  # metadata alone says nothing of it
    with pytest.raises(StoreError, match=f"{FIRST}: (sha256 .*, committed was|missing, though manifest.json lists it)"):
        store.read(0, 0, ["label"])
    store.read(0, 1, ["label"])
    wrong = {FIRST, OTHER} if damage is swap else {FIRST}
    for quick in (True, False):
        faults = verify(Folder(path), quick=quick).faults
        assert {fault.file for fault in faults} == wrong
        assert (
            take_back(Folder(tmp_path / "nothing"), faults, remove_extra=False) == []
        )  # no block is done again for it
    with pytest.raises(StoreError, match=FIRST):
        copy_store(path, tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_a_page_that_was_replaced_together_with_an_entry_does_not_fit_the_digest(tmp_path):
    from tampering import vouch_for_ledger

    path = Path(shutil.copytree(STORE_4, tmp_path / "store"))
    entry = path / "ledger" / "000000-00000-00001.json"
    entry.write_text(entry.read_text().rstrip())
    assert [fault.file for fault in verify(Folder(path)).faults] == [f"ledger/{entry.name}"]
    vouch_for_ledger(path)
    assert verify(Folder(path)).faults == []
    assert verify(Folder(path), digest=DIGEST_4).faults
