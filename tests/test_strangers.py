"""Stores from strangers: no link in them is followed, no page of theirs is shown, and no memory is theirs to take."""

import base64
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, invoke, make_recipe, refused
from tampering import vouch_for_ledger
from test_descriptions import finished_run
from test_old_stores import DIGEST, FIXTURE, STORE, STORE_4

from offline_kd.store.card import is_whole_card
from offline_kd.store.chunks import encode_chunk
from offline_kd.store.layout import parts_of
from offline_kd.store.opening import open_store
from offline_kd.store.reader import stored_object
from offline_kd.store.schema import Addition, StoreIdentity, StoreManifest
from offline_kd.store.sync import copy_store
from offline_kd.store.verification import verify
from offline_kd.support.errors import StoreCorrupt, StoreError
from offline_kd.support.pages import render_page
from offline_kd.support.places import Folder, place_at
from offline_kd.support.processes import this_machine

GIGABYTE = 10**9


@pytest.fixture
def stranger(tmp_path) -> Path:
    return Path(shutil.copytree(STORE, tmp_path / "stranger"))


def vouch(path: Path) -> None:
    """Make ledger and manifest vouch for what lies there."""
    manifest = StoreManifest.model_validate_json((path / "manifest.json").read_text())
    for name in manifest.entries:
        entry = json.loads((path / "ledger" / name).read_text())
        for key in entry["objects"]:
            content = (path / "targets.zarr" / key).read_bytes()
            entry["objects"][key] = stored_object(content).model_dump()
        (path / "ledger" / name).write_text(json.dumps(entry))
    vouch_for_ledger(path)


# ---- links ---------------------------------------------------------------------------------------------------------


def link_away(path: Path, name: str, outside: Path) -> Path:
    """Move a file or folder of a store out of it, and leave a link to it."""
    elsewhere = outside / name.replace("/", "-")
    outside.mkdir(exist_ok=True)
    shutil.move(path / name, elsewhere)
    (path / name).symlink_to(elsewhere)
    return elsewhere


def state_of(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


LINKED = ["targets.zarr/logits/code", "ledger", "manifest.json", "targets.zarr/label/c/0"]


@pytest.mark.parametrize("name", LINKED)
def test_no_command_follows_a_link_inside_a_store(name, stranger, tmp_path, where):
    if name != "targets.zarr/label/c/0":
        (stranger / "targets.zarr/label/c/0").write_bytes(b"damaged")  # a reason to write there
    link_away(stranger, name, tmp_path / "outside")
    before = state_of(tmp_path / "outside")
    recipe = (FIXTURE / "recipe.yaml", "--set", f"teacher.weights={FIXTURE / 'first.safetensors'}", "--device", "cpu")
    faults = json.loads(invoke("store", "verify", stranger, "--json").stdout)["faults"]
    assert any("is a link" in fault["problem"] for fault in faults), faults
    for command in (
        ("store", "push", stranger, tmp_path / "pushed"),
        ("store", "pull", STORE, stranger),
        ("store", "repair", stranger, *recipe, *where),
        ("cache-teacher", *recipe[:1], "--store", stranger, *recipe[1:], *where),
    ):
        result = invoke(*command)
        if not (stranger / name).is_symlink():  # repair removes a link to a file, for the file that belongs there
            break
        assert result.exit_code == 1, command
        assert "is a link" in result.stderr
    assert state_of(tmp_path / "outside") == before
    assert not (tmp_path / "pushed" / "manifest.json").exists()


def test_a_store_may_lie_behind_a_link(tmp_path):
    (tmp_path / "link").symlink_to(STORE)
    assert open_store(tmp_path / "link").digest == DIGEST
    assert verify(Folder(tmp_path / "link")).faults == []


def test_writing_replaces_a_link_that_was_left_for_it_and_deleting_removes_the_link(tmp_path):
    outside, place = tmp_path / "outside", Folder(tmp_path / "store")
    outside.write_text("mine")
    place.put("a", b"1")
    (tmp_path / "store" / "b").symlink_to(outside)
    partial = (
        f"a.{this_machine()}-{os.getpid()}-{threading.get_ident()}.partial"  # what a writer writes before it renames
    )
    (tmp_path / "store" / partial).symlink_to(outside)
    place.put("a", b"2")
    for work in (place.read, place.size, lambda name: place.put(name, b"3"), lambda name: place.create(name, b"3")):
        with pytest.raises(StoreCorrupt, match="is a link"):
            work("b")
    with pytest.raises(StoreCorrupt, match="is a link"):
        place.put("../a", b"3")
    place.delete("b")
    assert outside.read_text() == "mine"
    assert place.sizes() == {"a": 1}


def test_an_empty_location_is_refused(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for command in (
        ("cache-teacher", FIXTURE / "recipe.yaml", "--store", "", *where),
        ("store", "pull", STORE, ""),
        ("store", "info", ""),
    ):
        result = invoke(*command)
        assert result.exit_code == 2
        assert "an empty value" in result.stderr
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(StoreError, match="location is empty"):
        place_at("")


# ---- pages ---------------------------------------------------------------------------------------------------------


def test_the_page_of_a_stranger_is_not_copied(stranger, tmp_path):
    for name in ("index.html", "README.md"):
        (stranger / name).write_text("<script>alert(1)</script>")
    vouch(stranger)
    assert verify(Folder(stranger)).faults == []
    assert invoke("store", "pull", stranger, tmp_path / "pulled").exit_code == 0
    copies = {name: (tmp_path / "pulled" / name).read_bytes() for name in ("index.html", "README.md", "recipe.yaml")}
    assert all(b"alert(1)" not in content and b"networks:small" in content for content in copies.values())
    assert copies["index.html"].count(b"data:image/png") > 4
    assert (tmp_path / "pulled/manifest.json").read_bytes() == (stranger / "manifest.json").read_bytes()
    found = verify(Folder(tmp_path / "pulled"))
    assert found.faults == []
    assert [note.split(":")[0] for note in found.notes] == ["README.md", "index.html", "recipe.yaml"]
    assert "index.html: was made by a copy" in invoke("store", "verify", tmp_path / "pulled").stderr
    # A copy's card is not vouched for, but a flipped bit in it shows.
    for name, content in copies.items():
        assert is_whole_card(content)
        changed = bytearray(content)
        changed[len(changed) // 3] ^= 1
        (tmp_path / "pulled" / name).write_bytes(changed)
        assert name in {fault.file for fault in verify(Folder(tmp_path / "pulled")).faults}


def test_a_part_has_a_card_of_what_it_holds(tmp_path):
    copy_store(STORE, tmp_path / "part", only=["decisions"], views=1)
    page = (tmp_path / "part" / "index.html").read_text()
    assert "views 0:1, decisions only" in page
    assert verify(Folder(tmp_path / "part")).faults == []
    copy_store(STORE, tmp_path / "logits", only=["logits"])
    found = open_store(tmp_path / "logits").read_tables("codec")  # which the logits cannot be decoded without
    assert found["mean"].shape == (10,)


def test_labels_and_probes_that_cannot_be_are_no_traceback_in_a_card(stranger, tmp_path):
    parts = parts_of(StoreIdentity.model_validate_json((stranger / "store.json").read_text()))
    for name in ("label", "probe/row", "probe/view"):
        path = Path(shutil.copytree(stranger, tmp_path / name.replace("/", "-")))
        spec = next(spec for spec in parts[""].specs if spec.name == name)
        wild = encode_chunk(spec, np.full(spec.chunks, 99_999, dtype=spec.dtype))
        (path / "targets.zarr" / spec.object_key(0, 0)).write_bytes(wild)
        vouch(path)
        assert f"has {name} from 99999 to 99999" in refused("store", "pull", path, tmp_path / "pulled")


def test_pages_allow_nothing_but_their_own_style_sheet_and_script(tmp_path):
    nothing = {"views": [], "maps": [], "about": "", "digest": ""}
    view = {"pictures": [("a", "data:,")], "caption": "c", "likeliest": [("cat", "50.0")], "features": ["f"]}
    maps = [
        {"name": "n", "module": "m", "count": "1", "grid": "1 x 1", "templates": [
            {"colour": "rgb(1, 2, 3)", "number": 1, "patches": [], "vectors": "1"}
        ]}
    ]  # fmt: skip
    pages = {
        "report": _report(tmp_path),
        "sample": render_page("sample", title="t", **(nothing | {"views": [view], "maps": maps})),
        "card": (_made_here(tmp_path)).decode(),
    }
    for name, page in pages.items():
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
        assert "default-src 'none'" in policy, name
        assert "unsafe" not in policy
        assert "form-action 'none'" in policy
        style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
        assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
        assert not re.search(r"<[^>]* style=", page), name
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
        assert len(scripts) == page.count("<script") == (name == "report"), name
        for script in scripts:
            assert (
                f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
            )


def _report(folder: Path) -> str:
    run = finished_run(folder / "<script>alert(1)</script>", make_recipe(), "kd", 0)
    assert invoke("report", run, "--out", folder / "report.html").exit_code == 0
    return (folder / "report.html").read_text()


def _made_here(folder: Path) -> bytes:
    copy_store(STORE, folder / "copy")
    return (folder / "copy" / "index.html").read_bytes()


# ---- memory --------------------------------------------------------------------------------------------------------

CHILD = """
import json, re, sys
from pathlib import Path
from offline_kd.store.opening import open_store
from offline_kd.support.places import place_at
from offline_kd.store.verification import verify
from offline_kd.support.errors import OfflineKDError, StoreError

def peak():
    # Not getrusage: what that says begins with what the process had that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

found = {"before": peak()}
for name, location in json.loads(sys.argv[1]).items():
    said = []
    def opened():
        store = open_store(location, download_bytes=0)
        for part in ("codec", "last"):
            store.read_tables(part)
        store.read(0, 0, list(store.arrays))
        store.read(0, 1, list(store.arrays))
        store.row_index
    def verified():
        faults = verify(place_at(location)).faults
        said.append(f"{len(faults)} faults")
    for work in (opened, verified):
        try:
            work()
            said.append("done")
        except OfflineKDError as error:
            said.append(str(error)[:300])
    found[name] = [peak(), *said]
print(json.dumps(found))
"""


def hostile_stores(folder: Path, everything: bool = True) -> dict[str, str]:
    """Stores that would take gigabytes of whoever believes them, by what they do."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(STORE, folder / name))

    stores = {}
    sparse = ["manifest.json", "ledger/000000-00000-00001.json", "targets.zarr/logits/code/c/0/0/0", "index.html"]
    for name in [*sparse, "store.json", "additions/second.json"] if everything else sparse:
        stores[f"sparse {name}"] = path = copy(f"sparse-{name.replace('/', '-')}")
        os.truncate(path / name, 2**32)
    stores["sparse page"] = page = Path(shutil.copytree(STORE_4, folder / "sparse-page"))
    os.truncate(page / "hashes/000000-00000-00001.bin", 2**32)
    stores["bomb of rows"] = bomb(copy("rows"), lambda c: c.update(rows_per_block=500_000))
    manifests = {
        "lists": b'{"views": [' + b"[]," * (2**23 - 10) + b"[]]}",
        "wide": ('{"digest": "' + "\U0001f600" + "a" * (3 * 2**23 - 40) + '"}').encode(),
        "wrong": b'{"entries": {' + b",".join(b'"%062d":1' % n for n in range(350_000)) + b"}}",
    }
    for name, content in list(manifests.items())[: None if everything else 1]:
        stores[f"manifest of {name}"] = path = copy(f"manifest-{name}")
        (path / "manifest.json").write_bytes(content)
    if not everything:
        return {name: str(path) for name, path in stores.items()}
    stores["tars"] = path = copy("tars")
    identity = json.loads((path / "store.json").read_text())
    identity["dataset"]["tars"] = [{"file": f"{n}", "count": 1} for n in range(400_000)]
    (path / "store.json").write_text(json.dumps(identity))
    stores["stated size"] = path = copy("stated")
    entry = path / "ledger/000000-00000-00001.json"
    content = json.loads(entry.read_text())
    content["objects"]["logits/code/c/0/0/0"]["bytes"] = 2**32
    entry.write_text(json.dumps(content))
    os.truncate(path / "targets.zarr/logits/code/c/0/0/0", 2**32)
    vouch_for_ledger(path)
    stores["bomb of pixels"] = bomb(copy("pixels"), lambda c: c["dataset"].update(height=3000, width=3000))
    return {name: str(path) for name, path in stores.items()}


def bomb(path: Path, change) -> Path:
    """Objects that unpack to hundreds of megabytes of zeros, each vouched for."""
    raw = json.loads((path / "store.json").read_text())
    change(raw)
    (path / "store.json").write_text(json.dumps(raw))
    additions = [Addition.model_validate_json(file.read_text()) for file in (path / "additions").iterdir()]
    for part in parts_of(StoreIdentity.model_validate(raw), additions).values():
        for spec in part.specs:
            content = encode_chunk(spec, np.zeros(spec.chunks, dtype=spec.dtype))
            for group in (0, 1):
                (path / "targets.zarr" / spec.object_key(0, group)).write_bytes(content)
    vouch(path)
    return path


class TooMuch(http.server.SimpleHTTPRequestHandler):
    """Metadata as it is, and gigabytes for every object."""

    def do_GET(self) -> None:
        if "/c/" not in self.path:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(2**32))
        self.end_headers()
        try:
            for _ in range(2**12):
                self.wfile.write(bytes(2**20))
        except OSError:
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opening_and_reading_hostile_stores_stays_below_a_gigabyte(everything, tmp_path):
    stores = hostile_stores(tmp_path, everything)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(TooMuch, directory=str(STORE)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    stores["web"] = f"http://127.0.0.1:{web.server_port}"
    command = [sys.executable, "-c", CHILD, json.dumps(stores)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    web.shutdown()
    web.server_close()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before = found.pop("before")
    peaks = {name: (peak - before) // 2**20 for name, (peak, *_) in found.items()}
    # The program by itself takes 0.59 GB, most of it PyTorch; builds for GPUs take more.
    assert max(peak for peak, *_ in found.values()) < max(GIGABYTE, before + 400_000_000), peaks
    assert not [name for name, (_, *said) in found.items() if said == ["done", "0 faults", "done"]], found
