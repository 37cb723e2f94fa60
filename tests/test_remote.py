"""Stores in buckets, against a real S3 server on loopback: the right bytes, or a clear error."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, RUN_FILES, invoke, refused
from test_signing import key_pair

from offline_kd.store.leases import leases_at
from offline_kd.store.opening import open_store
from offline_kd.store.sync import copy_store
from offline_kd.store.verification import verify
from offline_kd.support.downloads import Downloads
from offline_kd.support.errors import StoreError
from offline_kd.support.places import Bucket, Folder

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


class S3:
    """The server's address, and how it behaves."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.endpoint, self.process = f"http://127.0.0.1:{port}", process

    def control(self, **mood: float) -> dict[str, int]:
        query = "&".join(f"{name}={value}" for name, value in mood.items())
        with urllib.request.urlopen(f"{self.endpoint}/_control?{query}") as answer:
            return json.loads(answer.read())


def environment_of(endpoint: str, downloads: Path) -> dict[str, str]:
    """By which the server is found, as S3 servers are, and what is read from it kept here."""
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "OFFLINE_KD_CACHE": str(downloads),
    }


@contextlib.contextmanager
def run_server(folder: Path):
    port_file = folder / "port"
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "s3_server.py"), str(port_file)])
    try:
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server = S3(int(port_file.read_text()), process)
        urllib.request.urlopen(urllib.request.Request(f"{server.endpoint}/team", method="PUT")).close()
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with run_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """The server in a good mood, found through the environment as S3 servers are."""
    for name, value in environment_of(server.endpoint, tmp_path / "downloads").items():
        monkeypatch.setenv(name, value)
    server.control(latency=0, fail_every=0, cut_every=0, lose_every=0)
    yield server
    server.control(latency=0, fail_every=0, cut_every=0, lose_every=0)


@pytest.fixture
def address(tmp_path) -> str:
    """A place of its own for every test."""
    return f"s3://team/{tmp_path.name}/store"


def train(recipe_file, where, store, out, *more) -> dict:
    options = ("--store", store, "--out", out, "--objective", "kd", *more)
    result = invoke("distill", recipe_file, *options, *where)
    assert result.exit_code == 0, result.output
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def local_student(recipe, store_path, tmp_path_factory) -> str:
    """sha256 of the student that the local store gives."""
    from offline_kd.distill.run import pack_digits

    folder = tmp_path_factory.mktemp("local")
    pack_digits(folder / "data" / "digits")
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    where = ["--manifest", str(ROOT / "data_manifest.yaml"), "--data-root", str(folder / "data")]
    return train(file, where, store_path, folder / "run")["student_sha256"]


def test_a_store_that_is_pushed_and_pulled_is_the_same(s3, address, store_path, tmp_path):
    assert invoke("store", "push", store_path, address).exit_code == 0
    assert json.loads(invoke("store", "info", address, "--json").stdout)["digest"].endswith(
        open_store(store_path).digest
    )
    assert json.loads(invoke("store", "verify", address, "--json").stdout)["faults"] == []
    assert json.loads(invoke("store", "verify", address, "--quick", "--json").stdout)["faults"] == []
    result = invoke("store", "pull", address, tmp_path / "pulled")
    assert result.exit_code == 0
    assert verify(Folder(tmp_path / "pulled")).faults == []
    here, there = (
        {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for path in (store_path, tmp_path / "pulled")
    )
    assert here == there


def test_a_store_and_images_in_buckets_are_explored_as_those_on_a_disk(s3, address, store_path, data_root, tmp_path):
    copy_store(store_path, address)
    for tar in (data_root / "digits").glob("train-*.tar"):
        Bucket(f"{address}-images").put(tar.name, tar.read_bytes())
    places = {"here": (store_path, data_root / "digits"), "afar": (address, f"{address}-images")}
    for out, (store, images) in places.items():
        explored = invoke("store", "explore", store, "--data", images, "--out", tmp_path / out, "--samples", 4)
        assert explored.exit_code == 0, explored.output
        assert "4 with pictures" in explored.stderr
    for name in ("samples.csv", "classes.csv", "confusions.csv"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "afar" / name).read_bytes()
    pages = [sorted((tmp_path / out / "thumbs").iterdir()) for out in places]
    assert [one.read_bytes() for one in pages[0]] == [one.read_bytes() for one in pages[1]]


def test_a_store_is_signed_in_a_bucket_and_copies_carry_the_signature(s3, address, store_path, tmp_path):
    key, public = key_pair(tmp_path, "ours")
    _, another = key_pair(tmp_path, "theirs")
    copy_store(store_path, address)
    assert "there is no signature" in refused("store", "verify", address, "--quick", "--signed-by", public)
    assert invoke("store", "sign", address, "--key", key).exit_code == 0
    assert invoke("store", "pull", address, tmp_path / "pulled").exit_code == 0
    assert invoke("store", "push", tmp_path / "pulled", f"{address}-2").exit_code == 0
    for place in (address, tmp_path / "pulled", f"{address}-2"):
        assert invoke("store", "verify", place, "--quick", "--signed-by", public).exit_code == 0
        assert "Key mismatch" in refused("store", "verify", place, "--quick", "--signed-by", another)
        assert open_store(place).digest == open_store(store_path).digest


def test_training_from_a_bucket_gives_the_student_of_the_local_store(
    s3, address, store_path, recipe_file, where, tmp_path, local_student
):
    invoke("store", "push", store_path, address)
    assert train(recipe_file, where, address, tmp_path / "run")["student_sha256"] == local_student
    before = s3.control()["GET"]
    assert train(recipe_file, where, address, tmp_path / "again")["student_sha256"] == local_student
    assert s3.control()["GET"] - before < 20  # metadata; objects came from the local cache
    options = ("--set", "data.workers=2")
    assert train(recipe_file, where, address, tmp_path / "workers", *options)["student_sha256"] == local_student


def test_the_local_cache_is_bounded(s3, address, store_path, recipe_file, where, tmp_path, local_student):
    invoke("store", "push", store_path, address)
    limit = 100_000
    found = train(recipe_file, where, address, tmp_path / "run", "--download-bytes", str(limit))
    assert found["student_sha256"] == local_student
    kept = sum(file.stat().st_size for file in (tmp_path / "downloads").iterdir())
    assert 0 < kept <= limit


def test_the_oldest_downloads_go_first(tmp_path):
    downloads = Downloads(tmp_path, 1000)
    for number in range(10):
        downloads.put(f"{number}", bytes(300))
        os.utime(tmp_path / f"{number}", (number, number))
    assert downloads.get("9", 1000) == bytes(300)
    assert downloads.get("0", 1000) is None
    downloads.put("large", bytes(1001))
    assert downloads.get("large", 2000) is None
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1000


def test_a_part_is_a_store_that_says_what_it_is(s3, address, store_path, recipe_file, where, tmp_path):
    invoke("store", "push", store_path, address)
    part = tmp_path / "part"
    result = invoke("store", "pull", address, part, "--blocks", "0:2", "--views", "0:6", "--only", "logits")
    assert result.exit_code == 0, result.output
    assert "blocks 0:2, views 0:6, logits only" in result.stderr
    facts = json.loads(invoke("store", "info", part, "--json").stdout)
    assert facts["digest"].endswith(open_store(store_path).digest)
    assert facts["holds"] == "blocks 0:2, views 0:6, logits only"
    assert facts["rows"] == 1024 * 6
    assert json.loads(invoke("store", "verify", part, "--json").stdout)["faults"] == []
    train(recipe_file, where, part, tmp_path / "run", "--set", "data.tars=[0,1]", "--set", "views.count=6")
    options = ("--store", part, "--out", tmp_path / "x", "--objective", "kd", *where)
    assert "holds 6 views" in refused("distill", recipe_file, *options)
    message = refused("distill", recipe_file, *options, "--set", "views.count=6")
    assert "(and 413 more) is not in the store" in message
    assert "is a partial copy" in refused("cache-teacher", recipe_file, "--store", part, *where)
    assert "take whole groups" in refused("store", "pull", address, tmp_path / "odd", "--views", "0:4")
    assert "holds 0:3" in refused("store", "pull", address, tmp_path / "odd", "--blocks", "2:4")
    assert "not sha256" in refused("store", "pull", address, part)  # another part is not written over it
    # A part of a part, and views that were added later, are stores as well.
    assert invoke("store", "pull", part, tmp_path / "smaller", "--blocks", "1:2").exit_code == 0
    assert verify(Folder(tmp_path / "smaller")).faults == []


def test_a_part_without_decisions_says_so(s3, recipe, manifest, roots, where, tmp_path, address):
    import yaml
    from conftest import CPU

    from offline_kd.cache.pipeline import cache_teacher

    content = recipe.model_dump(mode="json", exclude_none=True)
    content["capture"]["decisions"] = {"last": {"kind": "templates", "module": "body.5", "templates": 8}}
    content["objectives"] = {"letkd": [{"term": "ce"}, {"term": "decisions", "decisions": "last"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    cache_teacher(type(recipe).model_validate(content), manifest, roots, tmp_path / "store", CPU)
    assert invoke("store", "push", tmp_path / "store", address, "--only", "logits").exit_code == 0
    assert "decisions" not in " ".join(json.loads(invoke("store", "info", address, "--json").stdout)["serves"])
    assert json.loads(invoke("store", "verify", address, "--json").stdout)["faults"] == []
    asked = ("--teacher", "100", "--recipe", tmp_path / "recipe.yaml", *where)
    assert invoke("store", "verify", address, *asked).exit_code == 0
    assert invoke("store", "pull", tmp_path / "store", tmp_path / "late", "--only", "decisions").exit_code == 0
    assert "there are no logits" in refused("store", "verify", tmp_path / "late", *asked)
    options = ("--store", address, "--out", tmp_path / "run", *where)
    assert "holds ['logits'] only, not decisions/last" in refused("distill", tmp_path / "recipe.yaml", *options)


@pytest.mark.parametrize(
    "mood",
    [{"cut_every": 3}, *(pytest.param({name: 3}, marks=pytest.mark.slow) for name in ("fail_every", "lose_every"))],
)
def test_a_server_that_fails_gives_the_right_result_all_the_same(
    mood, s3, address, store_path, recipe_file, where, tmp_path, local_student
):
    s3.control(**mood)
    result = invoke("store", "push", store_path, address)
    assert result.exit_code == 0, result.output
    assert invoke("store", "pull", address, tmp_path / "pulled").exit_code == 0
    assert verify(Folder(tmp_path / "pulled")).faults == []
    assert train(recipe_file, where, address, tmp_path / "run")["student_sha256"] == local_student


def test_a_server_that_only_hangs_up_is_a_clear_error(s3, address, store_path, tmp_path):
    invoke("store", "push", store_path, address)
    s3.control(cut_every=1)
    message = refused("store", "pull", address, tmp_path / "pulled")
    assert address in message
    assert "Check the address, the credentials and the network" in message
    assert not (tmp_path / "pulled" / "manifest.json").exists()


def test_a_server_that_is_gone_and_a_bucket_that_is_not_are_messages(s3, address, monkeypatch, tmp_path):
    import offline_kd.support.places as place_module

    assert "no teacher store there" in refused("store", "info", "s3://team/nothing/here")
    assert "there is no such bucket on this server" in refused("store", "info", "s3://no-such-bucket/here")
    monkeypatch.setattr(place_module, "RETRIES", {"max_retries": 1})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Check the address, the credentials and the network" in refused("store", "info", address)


def test_a_push_that_is_killed_leaves_nothing_that_opens_and_goes_on(s3, address, store_path, tmp_path):
    s3.control(latency=0.03)
    command = [sys.executable, "-m", "offline_kd", "store", "push", str(store_path), address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT)
    before = s3.control()["PUT"]
    while process.poll() is None and s3.control()["PUT"] - before < 40:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "not finished" in refused("store", "info", address)
    s3.control(latency=0)
    result = invoke("store", "push", store_path, address)
    assert result.exit_code == 0
    assert int(result.stderr.split(" bytes, ")[-1].split()[0].replace(",", "")) >= 10  # were there already
    assert verify(Bucket(address)).faults == []


def test_damage_in_a_bucket_is_not_spread(s3, address, store_path, recipe_file, where, tmp_path):
    invoke("store", "push", store_path, address)
    bucket, name = Bucket(address), "targets.zarr/logits/values/c/1/1/0"
    content = bytearray(bucket.read(name))
    content[len(content) // 2] ^= 8
    bucket.put(name, bytes(content))
    message = refused("store", "pull", address, tmp_path / "pulled")
    assert name in message
    assert not (tmp_path / "pulled" / "manifest.json").exists()
    options = ("--store", address, "--out", tmp_path / "run", "--objective", "kd", "--set", "training.epochs=9")
    assert name in refused("distill", recipe_file, *options, *where)
    (fault,) = verify(bucket).faults
    assert fault.file == name
    # Pushing again over it mends it.
    assert invoke("store", "push", store_path, address).exit_code == 0
    assert verify(bucket).faults == []


def test_only_one_of_two_creators_wins(s3, tmp_path):
    for place in (Bucket(f"s3://team/{tmp_path.name}"), Folder(tmp_path / "folder")):
        for turn in range(20):
            with ThreadPoolExecutor(4) as threads:
                contents = [f"{who}".encode() for who in range(4)]
                won = list(threads.map(place.create, [f"x/{turn}"] * 4, contents))
            assert sum(won) == 1
            assert place.read(f"x/{turn}") == f"{won.index(True)}".encode()
        assert len(place.sizes("x")) == 20
        place.delete("x/0")
        assert place.size("x/0") is None
        assert place.size("x/1") == 1
        with pytest.raises(FileNotFoundError):
            place.read("x/0")
        with pytest.raises(StoreError, match="no more than 0 can be right"):
            place.read("x/1", limit=0)


@pytest.mark.slow
def test_writers_share_a_capture_in_a_bucket(s3, address, recipe_file, where, store_path):
    s3.control(fail_every=7)
    command = [sys.executable, "-m", "offline_kd", "cache-teacher", str(recipe_file), "--store", address, *where]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, env=environment) for _ in range(2)]
    said = [writer.communicate()[1].decode() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    assert open_store(address).digest == open_store(store_path).digest
    assert verify(Bucket(address)).faults == []


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_bucket_that_another_one_completes(
    s3, address, recipe_file, where, store_path
):
    s3.control(latency=0.01)  # so that there is time to kill it
    command = [sys.executable, "-m", "offline_kd", "cache-teacher", str(recipe_file), "--store", address, *where]
    bucket = Bucket(address)
    for entries in (1, 4):
        writer = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT)
        while writer.poll() is None and len(bucket.sizes("ledger")) < entries:
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        assert bucket.size("manifest.json") is None
        assert bucket.sizes("leases")
    s3.control(latency=0)
    committed = {name: bucket.read(name) for name in bucket.sizes("ledger")}
    assert invoke("cache-teacher", recipe_file, "--store", address, *where).exit_code == 0
    assert open_store(address).digest == open_store(store_path).digest
    assert {name: bucket.read(name) for name in committed} == committed
    assert verify(bucket).faults == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_any_web_server_can_publish_a_store(store_path, recipe_file, where, tmp_path, monkeypatch, local_student):
    monkeypatch.setenv("OFFLINE_KD_CACHE", str(tmp_path / "downloads"))
    handler = functools.partial(Quiet, directory=str(store_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}"
        assert invoke("store", "info", url).exit_code == 0
        assert json.loads(invoke("store", "verify", url, "--json").stdout)["faults"] == []
        assert invoke("store", "pull", url, tmp_path / "pulled").exit_code == 0
        assert verify(Folder(tmp_path / "pulled")).faults == []
        assert train(recipe_file, where, url, tmp_path / "run")["student_sha256"] == local_student
        message = refused("store", "push", store_path, f"{url}/new")
        assert "read only" in message
        web.shutdown()


def test_recipes_and_the_manifest_pin_stores(store_path, recipe_file, tmp_path, data_root, recipe):
    import yaml

    digest = open_store(store_path).digest
    manifest = yaml.safe_load((ROOT / "data_manifest.yaml").read_text())
    manifest["stores"] = {"ours": {"location": str(store_path), "digest": f"sha256:{digest}"}}
    file = tmp_path / "manifest.yaml"
    file.write_text(yaml.safe_dump(manifest))
    where = ("--manifest", file, "--data-root", data_root)
    run = ("distill", recipe_file, "--objective", "kd", *where)
    assert invoke(*run, "--out", tmp_path / "a", "--set", f"store=ours@sha256:{digest}").exit_code == 0
    assert invoke(*run, "--out", tmp_path / "b", "--store", "ours").exit_code == 0
    assert "Correct one" in refused(*run, "--out", tmp_path / "c", "--set", f"store=ours@sha256:{'0' * 64}")
    assert invoke("store", "info", "ours", *where).exit_code == 0
    manifest["stores"]["ours"]["digest"] = f"sha256:{'1' * 64}"
    file.write_text(yaml.safe_dump(manifest))
    assert f"wanted is sha256:{'1' * 64}" in refused(*run, "--out", tmp_path / "d", "--store", "ours")


def test_a_copy_follows_a_store_that_grew(recipe, manifest, roots, tmp_path, s3, address):
    from conftest import CPU

    from offline_kd.cache.pipeline import cache_teacher

    six = recipe.model_copy(update={"views": recipe.views.model_copy(update={"count": 6})})
    cache_teacher(six, manifest, roots, tmp_path / "store", CPU)
    copy_store(tmp_path / "store", address)
    cache_teacher(recipe, manifest, roots, tmp_path / "store", CPU)
    copied = copy_store(tmp_path / "store", address)
    assert copied.already_there > 50
    assert open_store(address).identity.views.num_views == 9
    assert verify(Bucket(address)).faults == []


# ---- run directories -------------------------------------------------------------------------------------------------


def test_a_run_is_written_into_a_bucket_goes_on_there_and_is_reported(
    s3, address, store_path, recipe_file, where, tmp_path, local_student, monkeypatch
):
    out, options = f"{address}-run", ("--store", store_path, "--objective", "kd", *where)
    assert invoke("distill", recipe_file, *options, "--out", out).exit_code == 0
    place = Bucket(out)
    # The lease was given back.
    assert set(place.sizes()) == RUN_FILES | {"teacher_evaluation.safetensors"}
    assert json.loads(place.read("result.json"))["student_sha256"] == local_student
    assert "finished already" in invoke("distill", recipe_file, *options, "--out", out).stderr

    for name in ("result.json", "student.safetensors"):  # as it was before its end, and the newest checkpoint torn
        place.delete(name)
    place.put("last.ckpt", place.read("last.ckpt")[:1000])
    assert "no result.json: not a run directory" in refused("report", out, "--out", tmp_path / "page.html")
    with leases_at(place, seconds=0.4) as other:  # shows that it lives all the time
        assert other.claim("run")
        monkeypatch.setattr("offline_kd.store.leases.LEASE_SECONDS", 0.4)
        assert f"{out}: another process is writing this run" in refused("distill", recipe_file, *options, "--out", out)
    result = invoke("distill", recipe_file, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert "going on from previous.ckpt" in result.stderr
    assert json.loads(place.read("result.json"))["student_sha256"] == local_student
    assert hashlib.sha256(place.read("student.safetensors")).hexdigest() == local_student

    again = f"{out}/"  # the same run
    assert invoke("report", out, again, "--out", tmp_path / "page.html").exit_code == 0
    assert "<td>kd</td>" in (tmp_path / "page.html").read_text()
    assert "web addresses can only be read" in refused(
        "distill", recipe_file, *options, "--out", "http://a.example/run"
    )
    assert "`run` writes a folder" in refused("run", recipe_file, *where, "--out", out)


def test_the_lines_that_training_a_teacher_into_a_bucket_says_find_it(
    s3, address, recipe_file, data_root, where, tmp_path
):
    fresh = ("teacher.weights=null", "teacher.training.epochs=1", "views.count=3", "capture.fidelity_rows=20")
    sets = [word for one in fresh for word in ("--set", one)]
    said = " ".join(invoke("train", recipe_file, "--teacher", "--out", address, *sets, *where).stderr.split())
    entry, root = re.search(r"data_manifest.yaml: files: (.*), and give --data-root (\S+)", said).groups()
    name = re.search(r"set in the recipe: teacher.weights: (\S+)", said)[1]
    known = yaml.safe_load((ROOT / "data_manifest.yaml").read_text()) | {"files": json.loads(entry)}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(known))
    options = ("--manifest", tmp_path / "m.yaml", "--data-root", data_root, "--data-root", root)
    capture = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *sets, "--set", f"teacher.weights={name}")
    assert invoke(*capture, *options).exit_code == 0
    trained = json.loads(Bucket(address).read("result.json"))["student_sha256"]
    assert open_store(tmp_path / "store").identity.teacher.weights_sha256 == trained
