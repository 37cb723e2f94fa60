"""Through a network that drops, delays, truncates and corrupts, everything ends bit-equal or with one true sentence."""

import functools
import http.server
import json
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from bad_network import FATES, BadNetwork, at_random, first_answer_is_corrupt
from conftest import ROOT, invoke, refused
from test_old_stores import DIGEST, FIXTURE, STORE
from test_remote import environment_of, run_server

import offline_kd.support.places as places_module
import offline_kd.support.web as web_module
from offline_kd.store.opening import open_store
from offline_kd.store.sync import copy_store
from offline_kd.store.verification import verify
from offline_kd.support.errors import StoreError, StoreUnreachable
from offline_kd.support.places import Bucket, Folder, place_at

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
OF_THE_NETWORK = ("other bytes each time", "Check the address, the credentials", "did not arrive as it was sent")
# What would send somebody to repair a store that is whole.
OF_THE_STORE = ("repair", "committed was", "committed were", "Something was changed")
TRIES = 25


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with run_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def network(server, monkeypatch, tmp_path):
    """A way to the server, whose `fate` tests choose; good at first."""
    network = BadNetwork(server.endpoint, lambda method, path: "")
    for name, value in environment_of(network.url, tmp_path / "downloads").items():
        monkeypatch.setenv(name, value)
    yield network
    network.shutdown()
    network.server_close()


@pytest.fixture
def address(tmp_path) -> str:
    return f"s3://team/{tmp_path.name}/store"


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def until_done(*arguments: object) -> int:
    """Run a command again while it is refused with a sentence about the network; returns how often it ran."""
    for tries in range(1, TRIES + 1):
        result = invoke(*arguments)
        if result.exit_code == 0:
            return tries
        (message,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert any(part in message for part in OF_THE_NETWORK), message
        assert not any(part in message.split(": read")[0] for part in OF_THE_STORE), message
    raise AssertionError(f"not done after {TRIES} tries: {arguments}")


def train(store: object, out: Path, data_root: Path) -> str:
    where = ("--manifest", ROOT / "data_manifest.yaml", "--data-root", data_root, "--device", "cpu")
    until_done("distill", FIXTURE / "recipe.yaml", "--store", store, "--objective", "kd", "--out", out, *where)
    return json.loads((out / "result.json").read_text())["student_sha256"]


@pytest.fixture(scope="module")
def student_of_here(data_root, tmp_path_factory) -> str:
    return train(STORE, tmp_path_factory.mktemp("here"), data_root)


@pytest.mark.slow
def test_what_is_corrupted_once_on_its_way_is_read_again_and_right(
    network, address, data_root, tmp_path, student_of_here
):
    network.fate = first_answer_is_corrupt()
    assert copy_store(STORE, address).digest == DIGEST
    network.fate = first_answer_is_corrupt()
    copy_store(address, tmp_path / "pulled")
    assert open_store(tmp_path / "pulled").digest == DIGEST
    network.fate = first_answer_is_corrupt()
    assert verify(Bucket(address)).faults == []
    network.fate = first_answer_is_corrupt()
    assert train(address, tmp_path / "run", data_root) == student_of_here
    assert network.suffered["corrupt answer"] > 100


@pytest.mark.slow
def test_bytes_that_are_always_changed_are_blamed_on_the_network_and_damage_on_the_store(network, address, tmp_path):
    copy_store(STORE, address)
    network.fate = lambda method, path: "corrupt answer" if "logits/code/c/" in path else ""
    message = refused("store", "pull", address, tmp_path / "pulled")
    assert "other bytes each time" in message
    assert "What lies there may be whole" in message
    assert "other bytes each time" in refused("store", "verify", address)
    network.fate = lambda method, path: ""
    name = "targets.zarr/logits/code/c/0/0/0"
    Bucket(address).put(name, bytes(len(Bucket(address).read(name))))
    message = refused("store", "pull", address, tmp_path / "pulled")
    assert f"{name}: sha256" in message
    assert "repair" in message


def test_repair_takes_nothing_back_because_of_a_bad_network(network, address, where):
    copy_store(STORE, address)
    before = Bucket(address).sizes()
    network.fate = lambda method, path: "corrupt answer" if "ledger" in path else ""
    recipe = ("--set", f"teacher.weights={FIXTURE / 'first.safetensors'}", "--device", "cpu")
    assert "other bytes each time" in refused("store", "repair", address, FIXTURE / "recipe.yaml", *recipe, *where)
    network.fate = lambda method, path: ""
    assert Bucket(address).sizes() == before


@pytest.mark.parametrize(
    ("share", "fates"),
    [
        pytest.param(0.15 / len(FATES), FATES, marks=pytest.mark.slow),
        pytest.param(0.15, ("corrupt answer",), marks=pytest.mark.slow),
        pytest.param(0.05, FATES, marks=pytest.mark.slow),
    ],
)
def test_through_a_bad_network_everything_ends_bit_equal(
    share, fates, network, address, where, data_root, tmp_path, request
):
    captured = address.replace("/store", "/captured")
    network.fate = at_random(share, fates)
    until_done("store", "push", STORE, address)
    until_done("store", "pull", address, tmp_path / "pulled")
    weights = f"teacher.weights={FIXTURE / 'first.safetensors'}"
    capture = ("cache-teacher", FIXTURE / "recipe.yaml", "--device", "cpu", "--set", weights, *where)
    until_done(*capture, "--store", captured)
    if share > 0.04:
        assert train(address, tmp_path / "run", data_root) == request.getfixturevalue("student_of_here")
    assert min(network.suffered[name] for name in fates) > 0, network.suffered
    network.fate = lambda method, path: ""
    assert files_of(tmp_path / "pulled") == {name: Bucket(address).read(name) for name in files_of(tmp_path / "pulled")}
    assert verify(Bucket(address)).faults == verify(Folder(tmp_path / "pulled")).faults == []
    assert invoke(*capture, "--store", tmp_path / "captured").exit_code == 0
    assert open_store(captured).digest == open_store(tmp_path / "captured").digest
    assert verify(Bucket(captured)).faults == []


def test_a_missing_bucket_is_one_line(network):
    assert "there is no such bucket" in refused("store", "push", STORE, "s3://no-such-bucket/store")
    assert "there is no such bucket" in refused("store", "info", "s3://no-such-bucket/store")


# ---- web servers ---------------------------------------------------------------------------------------------------


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def serve(handler: object) -> http.server.ThreadingHTTPServer:
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    return web


@pytest.fixture
def elsewhere():
    """Another server, that also has the store, and counts its visitors."""
    asked: list[str] = []

    class Counting(Files):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    web = serve(functools.partial(Counting, directory=str(STORE)))
    yield f"http://127.0.0.1:{web.server_port}", asked
    web.shutdown()
    web.server_close()


def test_redirects_lead_to_the_same_server_only(elsewhere):
    other, asked = elsewhere

    class Redirecting(Files):
        def do_GET(self) -> None:
            if self.path.startswith("/moved/"):
                super().do_GET()
                return
            self.send_response(302)
            self.send_header("Location", self.path.replace("/near/", "/moved/").replace("/far/", f"{other}/"))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def translate_path(self, path: str) -> str:
            return str(STORE / path.removeprefix("/moved/"))

    web = serve(Redirecting)
    here = f"http://127.0.0.1:{web.server_port}"
    assert open_store(f"{here}/near").digest == DIGEST
    message = refused("store", "info", f"{here}/far")
    assert f"redirects to {other}, another server, which is not followed" in message
    assert asked == []
    web.shutdown()
    web.server_close()


def test_a_server_that_falls_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(web_module, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(web_module, "ATTEMPTS", 1)
    monkeypatch.setattr(places_module, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(places_module, "RETRIES", {"max_retries": 0, "retry_timeout": timedelta(0)})
    awake = threading.Event()

    class Silent(Files):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.send_header("ETag", "x")
            self.end_headers()
            self.wfile.write(b"{")
            awake.wait(60)

    web = serve(Silent)
    here = f"http://127.0.0.1:{web.server_port}"
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "ENDPOINT_URL": here}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    began = time.monotonic()
    for address in (here, "s3://team/store"):
        with pytest.raises(StoreUnreachable, match="Check the address, the credentials and the network"):
            open_store(address)
    assert time.monotonic() - began < 20
    awake.set()
    web.shutdown()
    web.server_close()


def test_a_web_server_sends_no_more_than_was_committed(tmp_path):
    class Endless(Files):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(2**40))
            self.end_headers()

    web = serve(Endless)
    with pytest.raises(StoreError, match=r"1,099,511,627,776 bytes, no more than .* can be right: it was not read"):
        place_at(f"http://127.0.0.1:{web.server_port}").read("store.json", 100)
    web.shutdown()
    web.server_close()
