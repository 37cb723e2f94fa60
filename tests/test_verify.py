"""`store verify` finds every damage and names it, `store repair` mends exactly that, and hostile stores do no harm."""

import contextlib
import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, ROOT, invoke, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tampering import rewrite, vouch_for_ledger

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.store.chunks import decode_chunk, encode_chunk
from offline_kd.store.layout import ArraySpec
from offline_kd.store.opening import open_store
from offline_kd.store.verification import verify
from offline_kd.support.errors import OfflineKDError, StoreError
from offline_kd.support.places import Folder, place_at

FIXTURE_V1 = ROOT / "tests" / "fixtures" / "store_v1"


def copy_of(store_path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(store_path, folder))


def files_of(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def verified(path: Path, *options: str) -> list[dict]:
    """What `store verify --json` lists; its exit status must agree."""
    result = invoke("store", "verify", path, "--json", *options)
    faults = json.loads(result.stdout)["faults"]
    assert result.exit_code == (1 if faults else 0)
    return faults


def test_a_whole_store_has_no_fault_in_any_mode(store_path, recipe_file, where):
    assert verified(store_path) == []
    assert verified(store_path, "--quick") == []
    assert verified(store_path, "--dataset", *where) == []
    result = invoke("store", "verify", store_path, "--teacher", "300", "--recipe", recipe_file, *where)
    assert result.exit_code == 0
    assert "top1_agreement" in result.stdout


def test_a_part_of_a_dataset_or_of_a_store_is_verified_with_its_own_tars(
    recipe, recipe_file, manifest, roots, where, store_path, tmp_path
):
    """Whatever tars the recipe says: blocks are those of the store."""
    one_tar = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tars": [2]})})
    cache_teacher(one_tar, manifest, roots, tmp_path / "one", CPU)
    assert invoke("store", "pull", store_path, tmp_path / "part", "--blocks", "2:3", "--views", "0:3").exit_code == 0
    for path in (tmp_path / "one", tmp_path / "part"):
        assert verified(path, "--dataset", *where) == []
        result = invoke("store", "verify", path, "--teacher", "100", "--recipe", recipe_file, *where)
        assert result.exit_code == 0, result.output
        assert "top1_agreement" in result.stdout


def flip_one_bit(path: Path, moment: random.Random) -> str:
    """Flip a random bit of a random file, each file as likely as it is large, small ones not forgotten."""
    names = files_of(path)
    name = moment.choice(names)
    content = bytearray((path / name).read_bytes())
    bit = moment.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(content)
    return name


def same_but_for_versions(path: Path, other: Path) -> bool:
    """The software that created a store is told of in `store.json`, and in no digest; `verify` finds it changed."""
    one, another = (json.loads((where / "store.json").read_text()) | {"versions": {}} for where in (path, other))
    return one == another


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_of_100_flipped_bits_is_found_and_named(store_path, tmp_path):
    moment = random.Random(1)
    path = copy_of(store_path, tmp_path / "copy")
    for _ in range(100):
        name = flip_one_bit(path, moment)
        faults = verify(Folder(path)).faults
        assert faults, name
        # A changed identity or manifest is found as a whole; everything else by its own name.
        assert name in ("store.json", "manifest.json") or name in {fault.file for fault in faults}, (name, faults)
        (path / name).write_bytes((store_path / name).read_bytes())
    assert verify(Folder(path)).faults == []


def test_none_of_100_flipped_bits_reaches_a_batch(store_path, tmp_path):
    """Reading all that training reads gives the same arrays as before, or an error, for bits flipped anywhere."""
    moment = random.Random(2)
    path = copy_of(store_path, tmp_path / "copy")

    def all_arrays(where: Path) -> dict[tuple[int, int, str], np.ndarray]:
        store = open_store(where)
        names = list(store.arrays)
        return {
            (block, group, name): array
            for block in store.blocks
            for group in range(len(store.identity.groups))
            for name, array in store.read(block, group, names).items()
        }

    whole, refusals = all_arrays(store_path), 0
    for _ in range(100):
        name = flip_one_bit(path, moment)
        try:
            found = all_arrays(path)
        except StoreError:
            refusals += 1
        else:
            unread = name.endswith((".md", ".html", "zarr.json", "manifest.json", "recipe.yaml"))
            assert unread or (name == "store.json" and same_but_for_versions(path, store_path)), name
            assert all(np.array_equal(found[place], whole[place]) for place in whole)
        (path / name).write_bytes((store_path / name).read_bytes())
    assert refusals > 40


DAMAGES = {
    "deleted": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "doubled": lambda file: file.write_bytes(2 * file.read_bytes()),
}


@pytest.mark.parametrize(
    "damage",
    [name if name == "truncated" else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES],
)
def test_every_damaged_file_is_named(damage, store_path, tmp_path):
    path = copy_of(store_path, tmp_path / "copy")
    for name in files_of(path):
        DAMAGES[damage](path / name)
        faults = verify(Folder(path)).faults
        assert any(name in (fault.file + fault.problem) for fault in faults), (name, faults)
        if name.startswith(("targets.zarr", "ledger")) and "/c/" in name:
            assert any(name == fault.file for fault in verify(Folder(path), quick=True).faults), name
        (path / name).write_bytes((store_path / name).read_bytes())


def test_swapped_and_extra_files_are_named(store_path, tmp_path):
    path = copy_of(store_path, tmp_path / "copy")
    one, other = "targets.zarr/logits/values/c/0/0/0", "targets.zarr/logits/values/c/1/0/0"
    content = (path / one).read_bytes()
    (path / one).write_bytes((path / other).read_bytes())
    (path / other).write_bytes(content)
    (path / "targets.zarr/logits/values/c/7").mkdir()
    (path / "targets.zarr/logits/values/c/7/0").write_bytes(b"more")
    (path / "ledger/000009-00000-00003.json").write_text("{}")
    (path / "virus.exe").write_bytes(b"MZ")
    named = {fault["file"] for fault in verified(path)}
    assert named == {
        one,
        other,
        "targets.zarr/logits/values/c/7/0",
        "ledger/000009-00000-00003.json",
        "virus.exe",
    }


def test_values_that_cannot_be_are_found_though_every_checksum_is_right(store_path, tmp_path):
    for index, (name, change, problem) in enumerate(
        [
            ("logits/values", lambda z: np.where(z == z.max(), np.nan, z), "values that cannot be"),
            ("label", lambda y: y + 9, "must be 0 to 9"),
            ("view/flip", lambda flip: flip + 255, "must be 0 to 1"),
            ("key_hash", lambda keys: np.roll(keys, 1) * 0 + keys[0], "shares a key|has the key"),
            ("key", lambda keys: np.roll(keys, 1, axis=0), "512 keys are not those that were hashed"),
        ]
    ):
        path = copy_of(store_path, tmp_path / f"copy{index}")
        rewrite(path, name, 1, 0, change)
        problems = " ".join(fault["file"] + fault["problem"] for fault in verified(path))
        assert any(part in problems for part in problem.split("|")), (name, problems)


def test_verify_compares_with_the_dataset_if_asked_to(store_path, tmp_path, where):
    path = copy_of(store_path, tmp_path / "copy")
    rewrite(path, "image_digest", 1, 0, lambda digests: digests ^ 1)
    assert verified(path) == []  # digests of something
    (fault,) = verified(path, "--dataset", *where)
    assert fault["file"] == "block 1"
    assert "has sha256" in fault["problem"]


def test_repair_does_exactly_the_damaged_blocks_again_and_restores_the_digest(store_path, recipe_file, where, tmp_path):
    path = copy_of(store_path, tmp_path / "copy")
    digest = open_store(store_path).digest
    moment = random.Random(3)
    objects = [name for name in files_of(path) if name.startswith("targets.zarr/logits/values/c/")]
    damaged = moment.sample(objects, 3)
    for name, damage in zip(damaged, ("deleted", "truncated", "emptied"), strict=True):
        DAMAGES[damage](path / name)
    (path / "README.md").write_text("sold out")
    (path / "targets.zarr/label/zarr.json").unlink()
    untouched = {name: (path / name).stat().st_mtime_ns for name in objects if name not in damaged}
    result = invoke("store", "repair", path, recipe_file, *where)
    assert result.exit_code == 0, result.output
    assert "doing 3 blocks again" in result.stderr
    assert open_store(path).digest == digest
    assert verified(path) == []
    assert {name: (path / name).stat().st_mtime_ns for name in untouched} == untouched


@pytest.mark.parametrize(
    "name", ["manifest.json", "ledger/000001-00003-00006.json", "hashes/000000-00003-00006.bin", "index.html"]
)
def test_repair_mends_metadata(name, store_path, recipe_file, where, tmp_path):
    path = copy_of(store_path, tmp_path / "copy")
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    assert invoke("store", "repair", path, recipe_file, *where).exit_code == 0
    assert open_store(path).digest == open_store(store_path).digest
    assert verified(path) == []


def test_repair_removes_extra_files_only_if_asked_to(store_path, recipe_file, where, tmp_path):
    path = copy_of(store_path, tmp_path / "copy")
    (path / "notes.txt").write_text("mine")
    assert invoke("store", "repair", path, recipe_file, *where).exit_code == 0
    assert (path / "notes.txt").exists()
    assert invoke("store", "repair", path, recipe_file, "--remove-extra", *where).exit_code == 0
    assert verified(path) == []


# ---- hostile stores ------------------------------------------------------------------------------------------------


def change_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(rows_per_block=2**40), "less than or equal to"),
        (lambda c: c.update(rows_per_block=2**24, views_per_group=2**14), "declares objects of"),
        (lambda c: c["dataset"].update(height=-1), "greater than 0"),
        (lambda c: c["dataset"].update(width=2**40), "less than 32768"),
        (lambda c: c["teacher"].update(measured_top1=float("nan")), "finite number"),
        (lambda c: c["codec"].update(name="pickle"), "unknown name 'pickle'"),
        (lambda c: c["decisions"].update({"../../../etc": None}), "decisions"),
        (lambda c: c.update(schema_version="2; rm -rf /"), "valid integer"),
        (lambda c: c.update(schema_version=99), "schema version 99"),
    ],
)
def test_hostile_identities_are_refused(change, message, store_path, tmp_path):
    path = copy_of(store_path, tmp_path / "copy")
    change_json(path / "store.json", change)
    assert message in refused("store", "info", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(views={"": 10**12}), "an image has 1 to 9"),
        (lambda c: c.update(views={"": 9, "../../x": 9}), "is no name of an addition"),
        (lambda c: c.update(views={"": 9, "nothing": 9}), "additions/nothing.json: missing"),
        (lambda c: c.update(pages={}), "lists 0 pages, 3 are promised for 9 blocks"),
        (lambda c: c.update(held={"first_block": 5, "end_block": 99, "views": 9, "arrays": None}), "holds blocks 5 to"),
        (lambda c: c["fidelity"][""].update(mean_error=float("inf")), "finite number"),
        (lambda c: c.update(digest="../../x"), "string_pattern|pattern"),
    ],
)
def test_hostile_manifests_are_refused(change, message, store_path, tmp_path):
    path = copy_of(store_path, tmp_path / "copy")
    change_json(path / "manifest.json", change)
    found = refused("store", "info", path)
    assert any(part in found for part in message.split("|")), found


def test_paths_in_a_ledger_lead_nowhere(store_path, tmp_path):
    """Objects are found by the schema; what a ledger entry calls them is only compared."""
    path = copy_of(store_path, tmp_path / "copy")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    entry = path / "ledger/000000-00000-00003.json"
    change_json(entry, lambda c: c["objects"].update({f"../../{secret.name}": {"bytes": 6, "sha256": "0" * 64}}))
    vouch_for_ledger(path)
    copied = tmp_path / "pulled"
    assert invoke("store", "pull", path, copied).exit_code == 0
    assert "secret" not in " ".join(files_of(tmp_path / "pulled"))
    assert verify(Folder(path)).faults == []


def test_html_in_names_is_text_in_the_card(recipe, manifest, roots, tmp_path):
    payload = "<script>alert(1)</script>"
    dataset = manifest.dataset("digits").model_copy(
        update={"classes": [f"{payload}{index}|`$" for index in range(10)], "licence": f"{payload} [x](javascript:1)"}
    )
    changed = manifest.model_copy(update={"datasets": {"digits": dataset}})
    one_tar = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tars": [2]})})
    cache_teacher(one_tar, changed, roots, tmp_path / "store", CPU)
    page, card = ((tmp_path / "store" / name).read_text() for name in ("index.html", "README.md"))
    assert payload not in page
    assert payload not in card
    assert "&lt;script&gt;" in page
    assert "](javascript:" not in card
    assert "default-src 'none'" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


SPEC = {dtype: ArraySpec("x", dtype, (64, 8), (64, 8), ("row", "class"), 0, "whole", "") for dtype in ("|u1", "<f4")}


@pytest.mark.parametrize("dtype", list(SPEC))
def test_a_bomb_or_a_pickle_in_place_of_an_array_is_refused_before_it_is_unpacked(dtype):
    spec, big = SPEC[dtype], ArraySpec("x", dtype, (2**24,), (2**24,), ("row",), 0, "whole", "")
    bomb = encode_chunk(big, np.zeros(2**24, dtype=dtype))
    assert len(bomb) < 2**16
    with pytest.raises(StoreError, match=r"unpacks to .* bytes, its chunk has"):
        decode_chunk(spec, bomb, "here")
    import pickle

    import google_crc32c

    evil = pickle.dumps({"x": list(range(100))})
    with pytest.raises(StoreError):
        decode_chunk(spec, evil + google_crc32c.value(evil).to_bytes(4, "little"), "here")


@given(st.binary(max_size=200), st.sampled_from(list(SPEC)), st.booleans())
def test_any_bytes_in_place_of_an_object_are_refused_with_a_message(content, dtype, right_crc):
    import google_crc32c

    if right_crc:
        content += google_crc32c.value(content).to_bytes(4, "little")
    with pytest.raises(StoreError):
        decode_chunk(SPEC[dtype], content, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_metadata_with_any_field_replaced_by_anything_is_read_or_refused(data, store_path, tmp_path):
    """Fuzz: replace one field, anywhere in one metadata file, and open and verify the store."""
    path = tmp_path / "fuzzed"
    if not path.exists():
        shutil.copytree(store_path, path)
    name = data.draw(st.sampled_from(["store.json", "manifest.json", "ledger/000000-00000-00003.json"]))
    original = json.loads((store_path / name).read_text())
    content = json.loads((store_path / name).read_text())
    node, trail = content, []
    while isinstance(node, dict | list) and node and (not trail or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        trail.append((node, key))
        node = node[key]
    parent, key = trail[-1]
    parent[key] = data.draw(JSON)
    (path / name).write_text(json.dumps(content))
    try:
        with contextlib.suppress(OfflineKDError):
            open_store(path).read(0, 0, ["logits/values"])
        result = invoke("store", "info", path)
        assert result.exit_code in (0, 1)
        if result.exit_code:
            assert result.stderr.startswith("Error: ")
            assert len(result.stderr.splitlines()) == 1
        assert invoke("store", "verify", path).exit_code == 1 or json.loads((path / name).read_text()) == original
    finally:
        (path / name).write_bytes((store_path / name).read_bytes())


@given(content=st.binary(max_size=300))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_metadata_of_any_bytes_is_refused(content, store_path, tmp_path):
    path = tmp_path / "fuzzed"
    if not path.exists():
        shutil.copytree(store_path, path)
    for name in ("store.json", "manifest.json"):
        (path / name).write_bytes(content)
        with pytest.raises(OfflineKDError):
            open_store(path)
        (path / name).write_bytes((store_path / name).read_bytes())


def test_deeply_nested_json_is_refused(store_path, tmp_path):
    path = copy_of(store_path, tmp_path / "copy")
    (path / "manifest.json").write_text("[" * 100_000)
    assert "not readable as JSON" in refused("store", "info", path)


def test_memory_stays_bounded_for_a_store_that_declares_gigabytes(store_path, tmp_path):
    """A limit of the operating system, 1 GiB above what the program needs by itself."""
    path = copy_of(store_path, tmp_path / "copy")
    change_json(path / "store.json", lambda c: c.update(rows_per_block=2**22, views_per_group=9))
    program = (
        "import resource, sys; from offline_kd.store.opening import open_store\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))\n"
        "try: open_store(sys.argv[1]); print('opened')\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    assert resource.getpagesize()
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "StoreCorrupt", done.stdout + done.stderr


def test_a_fifo_in_place_of_a_file_does_not_hang(store_path, tmp_path):
    import os

    path = copy_of(store_path, tmp_path / "copy")
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    assert "is no regular file" in refused("store", "info", path)


def test_unknown_addresses_are_messages(tmp_path):
    assert "'ftp://' is not known" in refused("store", "info", "ftp://host/store")
    assert "no teacher store there" in refused("store", "info", tmp_path)
    assert "is no sha256" in refused("store", "info", f"{tmp_path}@sha256:12")
    assert str(place_at("a/b")) == "a/b"


# ---- old stores ----------------------------------------------------------------------------------------------------


def test_a_store_of_version_1_still_opens_verifies_and_trains(manifest, roots, where, tmp_path, recipe):
    import yaml

    store = open_store(FIXTURE_V1)
    assert store.digest == "5dbd833179e4ac89270dcab29cb519cd304f2d136fd8aad278948afb5a8aebfa"
    assert verified(FIXTURE_V1) == []
    assert verified(FIXTURE_V1, "--dataset", *where) == []
    assert json.loads(invoke("store", "info", FIXTURE_V1, "--json").stdout)["schema version"] == 1
    changed = recipe.model_dump(mode="json", exclude_none=True)
    changed["data"]["tars"], changed["views"]["count"] = [2], 4
    changed["teacher"].pop("weights")
    changed["capture"] = {"decisions": {}}
    changed["objectives"] = {"letkd": [{"term": "kd", "temperature": 2}, {"term": "decisions", "decisions": "last"}]}
    changed["capture"]["decisions"]["last"] = {"kind": "templates", "module": "body.5", "templates": 4, "top": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed))
    result = invoke("distill", tmp_path / "recipe.yaml", "--store", FIXTURE_V1, "--out", tmp_path / "run", *where)
    assert result.exit_code == 0, result.output
    assert "schema version 1 has a crc32c of every image, which can be forged" in " ".join(result.stderr.split())


def test_damage_to_a_store_of_version_1_is_found(tmp_path):
    path = copy_of(FIXTURE_V1, tmp_path / "copy")
    for name in files_of(path):
        if name.endswith("zarr.json") or name == "README.md":
            continue  # that version had no checksums of these
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
        assert verify(Folder(path)).faults, name
        (path / name).write_bytes((FIXTURE_V1 / name).read_bytes())


def test_a_store_of_version_1_is_not_added_to(recipe_file, where, tmp_path):
    path = copy_of(FIXTURE_V1, tmp_path / "copy")
    message = refused("cache-teacher", recipe_file, "--store", path, "--set", "data.tars=[2]", *where)
    assert "is of schema version 1, which can be read but not added to" in message


def test_control_characters_and_markup_in_names_are_text_on_the_terminal(recipe, manifest, roots, tmp_path):
    evil = "[red]x[/red]\x1b]0;title\x07\n"
    dataset = manifest.dataset("digits").model_copy(update={"licence": evil})
    changed = manifest.model_copy(update={"datasets": {"digits": dataset}})
    one_tar = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tars": [2]})})
    cache_teacher(one_tar, changed, roots, tmp_path / "store", CPU)
    shown = invoke("store", "info", tmp_path / "store").stdout
    assert "[red]x[/red]" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown
