"""Signatures: who made a store is proven, and whatever was changed since, or was never signed, is refused."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import CPU, ROOT, invoke, refused
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from test_writers import with_views

import offline_kd as okd
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.distill.loop import Run
from offline_kd.distill.training import open_stores, wanted_stores
from offline_kd.recipe import dump_recipe, load_recipe
from offline_kd.store.opening import open_store
from offline_kd.store.signing import check_signed, sign, signature_names
from offline_kd.store.sync import copy_store
from offline_kd.store.verification import verify
from offline_kd.store.writer import manifest_bytes
from offline_kd.support import files
from offline_kd.support.errors import StoreError, StoreMismatch
from offline_kd.support.places import Folder, place_at

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A private key, and its public one."""
    key, private, public = ec.generate_private_key(ec.SECP256R1()), folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: key_pair(folder, name) for name in ("ours", "theirs")}


@pytest.fixture(scope="module")
def ours(keys) -> Path:
    return keys["ours"][1]


@pytest.fixture(scope="module")
def signed_store(keys, store_path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("signed") / "store"
    shutil.copytree(store_path, path)
    sign(open_store(path), keys["ours"][0])
    return path


@pytest.fixture(scope="module")
def one_tar(recipe):
    """A recipe of which a capture takes a second."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tars": [2]})})


@pytest.fixture(scope="module")
def small_store(one_tar, manifest, roots, keys, tmp_path_factory) -> Path:
    """Signed, of one block and three views."""
    path = tmp_path_factory.mktemp("small") / "store"
    cache_teacher(with_views(one_tar, 3), manifest, roots, path, CPU)
    sign(open_store(path), keys["ours"][0])
    return path


@pytest.fixture
def signed(signed_store, tmp_path) -> Path:
    """A signed store that may be damaged."""
    return shutil.copytree(signed_store, tmp_path / "signed")


def signature_of(store: Path) -> Path:
    return store / "signatures" / open_store(store).digest


def demanding(tmp_path: Path, store: Path | str, digest: str, public_key: Path) -> Path:
    """A manifest, in a folder of its own with the key beside it, that demands a signature."""
    folder = tmp_path / "project"
    folder.mkdir(exist_ok=True)
    shutil.copy(public_key, folder / "team.pub")
    manifest = yaml.safe_load((ROOT / "data_manifest.yaml").read_text())
    manifest["stores"] = {"shared": {"location": str(store), "digest": f"sha256:{digest}", "signed_by": "team.pub"}}
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return folder / "manifest.yaml"


# ---- signing, and what finds what -----------------------------------------------------------------------------------


def test_keys_of_openssl_sign_a_store_and_the_signers_own_tool_agrees(store_path, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    store, key, public = shutil.copytree(store_path, tmp_path / "store"), tmp_path / "key.pem", tmp_path / "public.pem"
    for command in (f"ecparam -name prime256v1 -genkey -noout -out {key}", f"ec -in {key} -pubout -out {public}"):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    assert invoke("store", "sign", store, "--key", key).exit_code == 0
    result = invoke("store", "verify", store, "--signed-by", public)
    assert result.exit_code == 0, result.output
    digest = open_store(store_path).digest
    assert f"signed by {public}: sha256:{digest} (9 views)" in result.stderr.replace("\n", "")
    assert open_store(store).digest == digest
    assert json.loads(invoke("store", "verify", store, "--json").stdout)["faults"] == []

    tool = [sys.executable, "-m", "model_signing", "verify", "key", "--public_key", public, "--ignore_unsigned_files"]
    command = [*tool, "--signature", signature_of(store) / "manifest.sig", store]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr
    (store / "manifest.json").write_bytes((store / "manifest.json").read_bytes() + b" ")
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_another_key_and_no_signature_are_refused(signed, store_path, keys):
    assert "Key mismatch" in refused("store", "verify", signed, "--signed-by", keys["theirs"][1], "--quick")
    assert "there is no signature" in refused("store", "verify", store_path, "--signed-by", keys["ours"][1], "--quick")
    assert "is signed by another key" in refused("store", "sign", signed, "--key", keys["theirs"][0])
    assert invoke("store", "sign", signed, "--key", keys["ours"][0]).exit_code == 0  # again, by the same


def test_a_manifest_that_was_changed_with_all_its_sums_is_found_by_the_signature_alone(signed, ours):
    manifest = open_store(signed).manifest
    better = manifest.fidelity[""].model_copy(update={"mean_error": 0.0, "teacher_top1": 100.0})
    (signed / "manifest.json").write_bytes(manifest_bytes(manifest.model_copy(update={"fidelity": {"": better}})))
    assert verify(Folder(signed)).faults == []
    message = refused("store", "verify", signed, "--signed-by", ours)
    assert "manifest.json was changed after it was signed (fidelity)" in message


def test_every_changed_byte_of_a_signature_is_found_with_and_without_the_key(signed, ours):
    for name in ("manifest.json", "manifest.sig", "SHA256SUMS"):
        file = signature_of(signed) / name
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            (fault,) = verify(Folder(signed), quick=True).faults
            assert fault.file == f"signatures/{open_store(signed).digest}"
            assert "do not fit together" in refused("store", "pull", signed, signed.parent / "pulled")
            with pytest.raises(StoreMismatch, match="do not fit together"):
                check_signed(open_store(signed), ours)
        file.write_bytes(content)
    check_signed(open_store(signed), ours)


def write_signature(folder: Path, signature: bytes, manifest: bytes | None = None) -> None:
    """With right sums, as somebody does who means it."""
    content = {"manifest.json": manifest or (folder / "manifest.json").read_bytes(), "manifest.sig": signature}
    sums = "".join(f"{hashlib.sha256(one).hexdigest()}  {name}\n" for name, one in content.items())
    for name, one in (content | {"SHA256SUMS": sums.encode()}).items():
        (folder / name).write_bytes(one)


def test_signatures_that_were_forged_with_right_sums_prove_nothing(signed, store_path, keys, ours, tmp_path):
    folder, store = signature_of(signed), open_store(signed)
    right = (folder / "manifest.sig").read_bytes()
    bundle = json.loads(right)
    said_by_ours = bundle["verificationMaterial"]["publicKey"]["hint"]
    other = shutil.copytree(store_path, tmp_path / "other")
    sign(open_store(other), keys["theirs"][0])
    theirs = json.loads((signature_of(other) / "manifest.sig").read_bytes())
    theirs["verificationMaterial"]["publicKey"]["hint"] = said_by_ours
    for forged in (
        b"",
        b"{}",
        b"\xff" * 100,
        b"[" * 50_000,
        right[:-40],
        json.dumps(bundle | {"dsseEnvelope": theirs["dsseEnvelope"]}).encode(),
        json.dumps(theirs).encode(),
        json.dumps(bundle | {"dsseEnvelope": bundle["dsseEnvelope"] | {"signatures": []}}).encode(),
    ):
        write_signature(folder, forged)
        with pytest.raises(StoreMismatch, match="by this key"):
            check_signed(store, ours)
    write_signature(folder, right, (folder / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(StoreMismatch, match="Signature mismatch"):
        check_signed(store, ours)


def test_a_signature_of_another_digest_does_not_count(signed, small_store, ours):
    theirs = signature_of(small_store)
    shutil.rmtree(signature_of(signed))
    shutil.copytree(theirs, signature_of(signed))
    assert verify(Folder(signed), quick=True).faults == []
    with pytest.raises(StoreMismatch, match=f"is one of sha256:{theirs.name}"):
        check_signed(open_store(signed), ours)


def test_what_is_no_key_is_one_line(signed, tmp_path, keys):
    (tmp_path / "no.pem").write_text("nothing")
    for wrong in (tmp_path / "no.pem", tmp_path / "absent.pem", tmp_path, "x" * 5000, keys["ours"][1]):
        assert "openssl ecparam" in refused("store", "sign", signed, "--key", wrong)
    for wrong in (tmp_path / "no.pem", tmp_path / "absent.pem", tmp_path, keys["ours"][0]):
        assert "-pubout" in refused("store", "verify", signed, "--quick", "--signed-by", wrong)


def test_a_store_of_which_a_byte_is_wrong_is_not_signed(signed, keys):
    content = json.loads((signed / "store.json").read_text())
    (signed / "store.json").write_text(json.dumps(content | {"name": "other"}))
    assert "Something was changed" in refused("store", "sign", signed, "--key", keys["ours"][0])


def test_sign_ended_at_any_durable_call_is_completed_by_the_same_command(
    small_store, keys, ours, tmp_path, monkeypatch
):
    store = shutil.copytree(small_store, tmp_path / "store")
    for again in (False, True):  # a store that nobody has signed, and one that is signed anew
        for call in range(1, 100):
            if not again:
                shutil.rmtree(store / "signatures")
            child = os.fork()
            if child == 0:
                left = [call]

                def ending(function, left=left):
                    def called(*arguments, **options):
                        left[0] -= 1
                        if left[0] == 0:
                            os._exit(77)
                        return function(*arguments, **options)

                    return called

                for name in ("replace", "fsync", "unlink", "link"):
                    monkeypatch.setattr(os, name, ending(getattr(os, name)))
                monkeypatch.setattr(files, "_write_partial", ending(files._write_partial))
                try:
                    sign(open_store(store), keys["ours"][0])
                    os._exit(0)
                finally:
                    os._exit(1)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, 77)
            assert not [one for one in verify(Folder(store), quick=True).faults if not one.is_extra]
            sign(open_store(store), keys["ours"][0])
            assert verify(Folder(store), quick=True).faults == []
            check_signed(open_store(store), ours)
            if status == 0:
                break
        assert call > 10


# ---- copies and growth ----------------------------------------------------------------------------------------------


def test_copies_and_parts_carry_the_signature(signed, ours, tmp_path):
    copy_store(signed, tmp_path / "copy")
    copy_store(tmp_path / "copy", tmp_path / "part", views=3, blocks=range(1, 2))
    for store in (tmp_path / "copy", tmp_path / "part"):
        result = invoke("store", "verify", store, "--signed-by", ours)
        assert result.exit_code == 0, result.output


class OnlyWhatIsThere(http.server.SimpleHTTPRequestHandler):
    """As buckets that may be read but not listed: asked for what is not there, they answer "forbidden"."""

    def send_error(self, code, message=None, explain=None):
        super().send_error(403 if code == 404 else code, message, explain)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_web_server_hands_out_signatures_and_need_not_have_any(signed, store_path, ours, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_KD_CACHE", str(tmp_path / "downloads"))
    for served in (signed, store_path):
        handler = functools.partial(OnlyWhatIsThere, directory=str(served))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
            threading.Thread(target=web.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{web.server_port}"
            copy_store(url, tmp_path / served.name)
            assert verify(place_at(url), quick=True).faults == []
            assert (tmp_path / served.name / "signatures").exists() == (served == signed)
            if served == signed:
                check_signed(open_store(url), ours)
            else:
                with pytest.raises(StoreMismatch, match="there is no signature"):
                    copy_store(url, tmp_path / "demanded", signed_by=ours)
                assert not (tmp_path / "demanded").exists()
            web.shutdown()


def test_growth_keeps_earlier_signatures_and_says_what_they_are_of(
    one_tar, small_store, manifest, roots, keys, ours, tmp_path
):
    store, first = shutil.copytree(small_store, tmp_path / "store"), open_store(small_store).digest
    cache_teacher(with_views(one_tar, 6), manifest, roots, store, CPU)
    assert verify(Folder(store)).faults == []
    message = refused("store", "verify", store, "--signed-by", ours)
    assert f"sha256:{open_store(store).digest} is not signed" in message
    assert f"Signed by it: sha256:{first} (earlier, 3 of 6 views)" in message
    assert invoke("store", "verify", f"{store}@sha256:{first}", "--signed-by", ours).exit_code == 0
    with pytest.raises(StoreMismatch, match="Sign what it is now"):
        sign(open_store(store, digest=first), keys["ours"][0])

    sign(open_store(store), keys["ours"][0])
    copy_store(store, tmp_path / "copy")
    result = invoke("store", "verify", tmp_path / "copy", "--signed-by", ours)
    assert result.exit_code == 0, result.output
    assert f"sha256:{open_store(store).digest} (6 views)" in result.stderr.replace("\n", "")
    assert f"sha256:{first} (earlier, 3 of 6 views)" in result.stderr.replace("\n", "")
    then = signature_of(small_store) / "manifest.json"
    assert (tmp_path / "copy" / "signatures" / first / "manifest.json").read_bytes() == then.read_bytes()


# ---- demands --------------------------------------------------------------------------------------------------------


def test_a_manifest_demands_a_signature_of_whatever_is_opened_by_name(
    signed, store_path, keys, recipe_file, data_root, tmp_path, monkeypatch
):
    digest = open_store(store_path).digest
    run = ("distill", recipe_file, "--objective", "kd", "--store", "shared", "--data-root", data_root)
    pull = ("store", "pull", "shared", tmp_path / "pulled")
    for store, key, wrong in (
        (store_path, "ours", "there is no signature"),
        (signed, "theirs", "Key mismatch"),
        (signed, "ours", ""),
    ):
        where = ("--manifest", demanding(tmp_path, store, digest, keys[key][1]))
        monkeypatch.chdir(tmp_path)  # the key lies beside the manifest, not here
        if wrong:
            for command in ((*run, "--out", tmp_path / "run"), pull, ("store", "info", "shared")):
                assert wrong in refused(*command, *where)
            assert not (tmp_path / "pulled").exists()
            assert not (tmp_path / "run" / "last.ckpt").exists()
        else:
            assert invoke("store", "info", "shared", *where).exit_code == 0
            assert invoke(*pull, *where).exit_code == 0
    monkeypatch.chdir(tmp_path / "project")
    Path("manifest.yaml").rename("data_manifest.yaml")
    assert okd.open_store("shared").digest == f"sha256:{digest}"
    (signature_of(signed) / "SHA256SUMS").unlink()
    with pytest.raises(StoreMismatch, match="there is no signature"):
        okd.open_store("shared")
    # What the manifest demands of a store can be given to it by its name.
    assert invoke("store", "sign", "shared", "--key", keys["ours"][0]).exit_code == 0
    assert okd.open_store("shared").digest == f"sha256:{digest}"


def test_a_recipe_demands_a_signature_by_a_key_beside_it(
    signed, store_path, keys, recipe, manifest, where, tmp_path, monkeypatch
):
    folder = tmp_path / "recipes"
    folder.mkdir()
    shutil.copy(keys["ours"][1], folder / "team.pub")
    (tmp_path / "extending.yaml").write_text("extends: recipes/recipe.yaml\nseeds: [1]\n")
    content = recipe.model_dump(mode="json", exclude_none=True)
    content["store"] = [{"store": str(store_path), "signed_by": "team.pub"}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    run = ("--objective", "kd", "--out", tmp_path / "run", *where)
    assert "there is no signature" in refused("distill", folder / "recipe.yaml", *run)
    content["store"][0]["store"] = str(signed)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(load_recipe(Path("recipes/recipe.yaml"))))
    for file in ("recipes/recipe.yaml", "extending.yaml", "resolved.yaml"):
        one = load_recipe(Path(file))
        opened, _ = open_stores(one, manifest, wanted_stores(one))
        assert opened[0].place == Folder(signed)
    # A run goes on when recipe and key have moved.
    there, here = load_recipe(folder / "recipe.yaml"), load_recipe(tmp_path / "resolved.yaml", ["store.0.signed_by=x"])
    assert there.store != here.store
    assert len({Run(one, "kd", [], 0, tmp_path, CPU).identity for one in (there, here)}) == 1
    shutil.copy(keys["theirs"][1], folder / "team.pub")
    with pytest.raises(StoreMismatch, match="Key mismatch"):
        open_stores(one, manifest, wanted_stores(one))


def test_without_model_signing_a_demand_is_refused_and_says_what_to_install(signed, keys, tmp_path, monkeypatch):
    for name in [one for one in sys.modules if one.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    install = "pip install 'offline-kd[sign]'"
    assert install in refused("store", "sign", signed, "--key", keys["ours"][0])
    assert install in refused("store", "verify", signed, "--quick", "--signed-by", keys["ours"][1])
    manifest = demanding(tmp_path, signed, open_store(signed).digest, keys["ours"][1])
    assert install in refused("store", "pull", "shared", tmp_path / "pulled", "--manifest", manifest)
    assert invoke("store", "pull", signed, tmp_path / "pulled").exit_code == 0  # nobody demands anything
    assert (tmp_path / "pulled" / signature_names(open_store(signed).digest)[-1]).is_file()


def test_a_store_on_the_web_is_signed_where_it_lies(keys, signed):
    handler = functools.partial(OnlyWhatIsThere, directory=str(signed))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with pytest.raises(StoreError, match="can be read only"):
            sign(open_store(f"http://127.0.0.1:{web.server_port}"), keys["ours"][0])
        web.shutdown()
