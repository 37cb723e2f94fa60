"""Images and weights in buckets, against a real S3 server on loopback: the right pixels, or a clear error."""

import functools
import hashlib
import http.server
import json
import pickle
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bad_network import BadNetwork, first_answer_is_corrupt
from conftest import CPU, ROOT, invoke, refused
from test_remote import environment_of, run_server

import offline_kd as okd
import offline_kd.data.blocks as blocks_module
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.loader import Loader
from offline_kd.distill.reader import Options, Source
from offline_kd.support.errors import DataError, StoreUnreachable
from offline_kd.support.places import Bucket
from offline_kd.views.none import NoAugmentation

# 5 ms before each answer; of 20 requests one is refused, and of 20 answers one ends in the middle.
SLOW_AND_FAULTY = {"latency": 0.005, "fail_every": 20, "cut_every": 20}

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with run_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def network(server):
    network = BadNetwork(server.endpoint, lambda method, path: "")
    yield network
    network.shutdown()
    network.server_close()


@pytest.fixture(autouse=True)
def s3(server, network, monkeypatch, tmp_path):
    """A way to the server, whose `fate` tests choose, found through the environment; good at first."""
    for name, value in environment_of(network.url, tmp_path / "downloads").items():
        monkeypatch.setenv(name, value)
    network.fate = lambda method, path: ""
    yield network
    server.control(**dict.fromkeys(SLOW_AND_FAULTY, 0))


@pytest.fixture
def root(data_root, tmp_path) -> str:
    """A bucket's folder of its own for every test, with the digits below it."""
    place = Bucket(f"s3://team/{tmp_path.name}")
    for file in (data_root / "digits").iterdir():
        place.put(f"digits/{file.name}", file.read_bytes())
    return place.url


def train_tars(manifest, *roots: str | Path, **how: object) -> BlockLoader:
    """The training digits, none of which is kept."""
    return BlockLoader(manifest.dataset("digits"), manifest.split("digits", "train"), data_roots(roots), 0, **how)


def kept_bytes(tmp_path: Path) -> int:
    return sum(file.stat().st_size for file in (tmp_path / "downloads").iterdir())


def student_of(out: Path) -> str:
    return json.loads((out / "result.json").read_text())["student_sha256"]


@pytest.mark.parametrize("mood", [{}, pytest.param(SLOW_AND_FAULTY, marks=pytest.mark.slow)], ids=["good", "faulty"])
def test_pack_capture_distil_and_verify_from_an_empty_folder(
    mood, server, recipe, teacher_weights, tmp_path, monkeypatch
):
    server.control(**mood)
    here, address = tmp_path / "empty", f"s3://team/{tmp_path.name}"
    here.mkdir()
    monkeypatch.chdir(here)
    assert invoke("data", "pack", "digits", "--out", f"{address}/digits", "--write", "manifest.yaml").exit_code == 0
    known = load_manifest(ROOT / "data_manifest.yaml").dataset("digits")
    packed = load_manifest(here / "manifest.yaml").dataset("digits")
    assert packed.splits == known.splits  # the bytes of a local copy
    assert packed.location == f"{address}/digits"
    elsewhere = ("--out", f"{address}/other/digits", "--write", "manifest.yaml")
    assert f"lies in {address}/digits, these tars in {address}/other" in refused("data", "pack", "digits", *elsewhere)

    # The teacher's weights lie there, too; the tars are found by their dataset's location.
    weights = Path(teacher_weights).read_bytes()
    Bucket(address).put("teachers/small.safetensors", weights)
    manifest = yaml.safe_load((here / "manifest.yaml").read_text())
    described = {"file": "teachers/small.safetensors", "sha256": hashlib.sha256(weights).hexdigest()}
    manifest["files"] = {"small": described}
    (here / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    ours = recipe.model_dump(mode="json", exclude_none=True)
    ours["teacher"]["weights"] = "small"
    ours["views"]["count"], ours["training"]["epochs"] = 2, 1
    ours["capture"]["views_per_group"] = 2
    (here / "recipe.yaml").write_text(yaml.safe_dump(ours))
    options = ("--manifest", "manifest.yaml", "--data-root", address)
    for command in (
        ("data", "check", "digits"),
        ("data", "check", "small"),
        ("cache-teacher", "recipe.yaml", "--store", f"{address}/store"),
        ("distill", "recipe.yaml", "--store", f"{address}/store", "--objective", "kd", "--out", f"{address}/run"),
        ("store", "verify", f"{address}/store", "--dataset"),
        ("store", "inspect", f"{address}/store", "--key", "0001", "--out", "0001.html"),
    ):
        result = invoke(*command, *options)
        assert result.exit_code == 0, result.output
    listed = re.findall(r"│ (\w+)\s+│\s+(?:dataset|file) │.*│\s+(yes|no) │", invoke("data", "list", *options).stdout)
    assert {("digits", "yes"), ("small", "yes")} <= set(listed)
    reported = invoke("report", f"{address}/run", "--out", "report.html")
    assert reported.exit_code == 0, reported.output
    left = ["0001.html", "manifest.yaml", "recipe.yaml", "report.csv", "report.html", "report.json"]
    assert sorted(file.name for file in here.iterdir()) == left


def test_a_changed_tar_is_named_with_both_sha256_and_a_missing_one_with_where_it_was_looked_for(
    root, recipe_file, store_path, where, tmp_path, manifest
):
    tar = manifest.split("digits", "train").tars[1]
    changed = Bucket(root).read(f"digits/{tar.file}").replace(b"0\n", b"1\n", 1) + bytes(512)
    Bucket(root).put(f"digits/{tar.file}", changed)
    options = ("--manifest", ROOT / "data_manifest.yaml", "--data-root", root)
    run = ("distill", recipe_file, "--store", store_path, "--objective", "kd", "--out", tmp_path / "run")
    for command in (("data", "check", "digits"), run):
        message = refused(*command, *options)
        assert f"{root}/digits/{tar.file}: sha256 {hashlib.sha256(changed).hexdigest()}" in message
        assert f"{tar.sha256}: the manifest says the latter" in message
        assert "store" not in message.removeprefix(f"Error: {root}")
    Bucket(root).delete(f"digits/{tar.file}")
    assert f"{tar.file}: not found in {root}/digits" in refused("data", "check", "digits", *options)
    options = ("--manifest", ROOT / "data_manifest.yaml", "--data-root", "s3://no-such-bucket/data")
    assert "s3://no-such-bucket/data/digits: there is no such bucket" in refused("data", "check", "digits", *options)


def test_what_is_broken_on_its_way_is_read_once_more(root, s3, manifest, data_root, tmp_path):
    s3.fate = first_answer_is_corrupt()
    there, here = train_tars(manifest, root), train_tars(manifest, data_root)
    assert all(torch.equal(one.images, other.images) for one, other in zip(there, here, strict=True))
    shutil.rmtree(tmp_path / "downloads")
    s3.fate = lambda method, path: "corrupt answer"
    with pytest.raises(StoreUnreachable, match=r"train-000001.tar: read 2 times, other bytes each time"):
        train_tars(manifest, root)[1].images  # noqa: B018
    s3.fate = lambda method, path: "corrupt request" if method == "PUT" else ""
    assert "Error" in refused("data", "pack", "digits", "--out", f"{root}/packed")


def test_the_cache_is_bounded_and_saves_requests(root, s3, manifest, tmp_path):
    asked: list[str] = []

    def fate(method: str, path: str) -> str:
        asked.append(path)
        return ""

    s3.fate = fate
    loader = train_tars(manifest, root)
    sizes = [sum(map(len, block.encoded)) or block.images.nbytes for block in loader]
    assert len(asked) == len(sizes) == 3  # one request for each, none to see whether it is there
    assert all(len(block) for block in train_tars(manifest, root))
    assert len(asked) == 3
    limit = kept_bytes(tmp_path) // 2
    shutil.rmtree(tmp_path / "downloads")
    for _ in range(2):
        assert len(list(train_tars(manifest, root, download_bytes=limit))) == 3
    assert 0 < kept_bytes(tmp_path) <= limit


def test_the_next_tars_are_fetched_while_one_is_worked_on_within_a_bound(root, manifest, monkeypatch):
    loader = train_tars(manifest, root)
    assert loader.is_remote
    order = loader.in_order([2, 0, 1])
    number, first = next(order)
    assert (number, first.name) == (2, "train-000002.tar")
    assert list(loader.coming) == [0]  # nothing was known of sizes when it began
    for number in (0, 1):
        loader.fetch_ahead(number)
    assert list(loader.coming) == [0, 1]
    monkeypatch.setattr(blocks_module, "AHEAD_BYTES", 1)
    loader.fetch_ahead(2)
    assert 2 not in loader.coming
    # What is on its way stays behind, and everything else travels to a worker process, which is not a forked one.
    sent = pickle.loads(pickle.dumps(loader))
    assert not sent.coming
    assert sent.downloads is loader.downloads  # which stores share, so that the bound is on both together
    views = NoAugmentation(kind="none")
    (pieces,) = Loader(Source(loader, views, [range(1)]), Options(batch_size=64, workers=1), CPU).workers
    assert pieces.multiprocessing_context.get_start_method() == "spawn"
    assert sent[0].keys == loader[0].keys
    assert [block.name for _, block in order] == ["train-000000.tar", "train-000001.tar"]


def test_the_first_root_that_has_a_tar_counts(root, s3, manifest, data_root, tmp_path):
    elsewhere = f"s3://team/{tmp_path.name}-other"
    tar = manifest.split("digits", "train").tars[0]
    Bucket(elsewhere).put(f"digits/{tar.file}", (data_root / "digits" / tar.file).read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=data_root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        for roots in ([elsewhere, root], [elsewhere, data_root], [web], [elsewhere, web]):
            assert len(list(train_tars(manifest, *roots, download_bytes=0))) == 3
        server.shutdown()
    loader = train_tars(manifest, data_root, root)
    assert not loader.is_remote
    with pytest.raises(DataError, match=rf"train-000001.tar: not found in {elsewhere}/digits"):
        list(train_tars(manifest, elsewhere))


def test_the_python_interface_takes_urls(root, data_root, tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    how = {"views": {"kind": "none"}, "normalisation": {"mean": [0.3] * 3, "std": [0.4] * 3}}
    here = okd.cache_teacher(network, data_root / "digits", out=tmp_path / "store", **how)
    there = okd.cache_teacher(network, f"{root}/digits", out=f"{root}/store", **how)
    assert there.digest == here.digest
    batches = [next(iter(store.loader(batch_size=64).epoch(0))) for store in (here, there)]
    assert np.array_equal(*(batch.key_hash for batch in batches))
    assert torch.equal(*(batch.images for batch in batches))
    assert "cannot be written" not in refused("data", "pack", "digits", "--out", "https://example.org/digits")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_read_from_buckets(root, recipe_file, store_path, where, tmp_path, workers):
    options = ("--manifest", ROOT / "data_manifest.yaml", "--set", f"data.workers={workers}")
    for data in (root, str(where[-1])):
        store, out = tmp_path / data[-9:].replace("/", "-"), tmp_path / f"run-{data[-9:].replace('/', '-')}"
        assert invoke("cache-teacher", recipe_file, "--store", store, *options, "--data-root", data).exit_code == 0
        run = ("distill", recipe_file, "--store", store, "--objective", "kd", "--out", out)
        assert invoke(*run, *options, "--data-root", data).exit_code == 0
    digests = {okd.open_store(one).digest for one in tmp_path.iterdir() if (one / "store.json").is_file()}
    assert len(digests) == 1
    assert len({student_of(one) for one in tmp_path.glob("run-*")}) == 1
