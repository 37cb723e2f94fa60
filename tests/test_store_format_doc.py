"""A reader that follows docs/store-format.md, with zarr, json and numpy alone, reads what the package's own does."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import zarr

STORES = Path(__file__).parent / "fixtures"
STORE, STORE_3, STORE_2 = (STORES / name / "store" for name in ("store_v4", "store_v3", "store_v2"))


# ---- the reader: nothing of offline_kd -----------------------------------------------------------------------------


def canonical_digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checked_manifest(store: Path) -> tuple[dict, dict]:
    """Identity and manifest, after the digest was computed."""
    identity = json.loads((store / "store.json").read_bytes())
    manifest = json.loads((store / "manifest.json").read_bytes())
    about = {name: value for name, value in identity.items() if name not in ("versions", "schema_version")}
    about["views"] = {name: value for name, value in about["views"].items() if name != "count"}
    additions = [
        json.loads((store / "additions" / f"{name}.json").read_bytes()) for name in sorted(manifest["views"]) if name
    ]
    listed = manifest["entries"] | manifest.get("pages", {})
    assert canonical_digest([about, additions, sorted(listed.items())]) == manifest["digest"]
    return identity, manifest


def checked_entry(store: Path, manifest: dict, name: str) -> dict:
    """A ledger entry, after it and every object that it vouches for were compared with their sums."""
    content = (store / "ledger" / name).read_bytes()
    if name in manifest["entries"]:  # of tables; before schema 4, of blocks as well
        assert hashlib.sha256(content).hexdigest() == manifest["entries"][name]
    else:
        number, views = name.removesuffix(".json").split("-", 1)
        first = int(number) // 1024 * 1024
        page = f"{first:06d}-{views}.bin"
        hashes = (store / "hashes" / page).read_bytes()
        assert hashlib.sha256(hashes).hexdigest() == manifest["pages"][page]
        at = 32 * (int(number) - first)
        assert hashlib.sha256(content).digest() == hashes[at : at + 32]
    entry = json.loads(content)
    for key, expected in entry["objects"].items():
        held = (store / "targets.zarr" / key).read_bytes()
        assert len(held) == expected["bytes"]
        assert hashlib.sha256(held).hexdigest() == expected["sha256"]
    return entry


def rans(code: np.ndarray, frequencies: np.ndarray) -> list[int]:
    """The values of one row's code, a table of frequencies each."""
    words = [int(word) for word in code.view("<u2")]
    state, at, values = words[0] * 65536 + words[1], 2, []
    for frequency in frequencies.astype(np.int64):
        ends = frequency.cumsum()
        slot = state % 4096
        index = int(np.searchsorted(ends, slot, side="right"))
        state = int(frequency[index]) * (state // 4096) + slot - int(ends[index] - frequency[index])
        values.append(index - 1023)
        if state < 65536:
            state, at = state * 65536 + words[at], at + 1
    return values


def klt_logits(code: np.ndarray, codec: dict, tables: dict[str, np.ndarray]) -> np.ndarray:
    """`[C]` logits of one row."""
    values = rans(code, np.concatenate([tables["frequency"], tables["refine_frequency"]]))
    k = len(tables["frequency"])
    q, d = np.array(values[:k]), np.array(values[k:])
    whole = tables["mean"].astype(np.int64) + q @ tables["axes"].astype(np.int64)
    rank = np.arange(1, len(d) + 1)
    steps = np.minimum(codec["refine_step"] * rank**0.7, max(0.5, codec["refine_step"]))
    logits = whole * (codec["step"] / 2048)
    logits[np.argsort(-whole, kind="stable")[: len(d)]] += d * steps
    return logits


# ---- compared ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["", "second"])
def test_every_array_of_every_block_is_what_the_package_reads(targets):
    from offline_kd.store.opening import open_store

    identity, manifest = checked_manifest(STORE)
    arrays, store = zarr.open_group(STORE / "targets.zarr", mode="r"), open_store(STORE, targets=targets)
    prefix, ending = (f"teachers/{targets}/", f".{targets}") if targets else ("", "")
    per_block, per_group = identity["rows_per_block"], identity["views_per_group"]
    rows_know = ("key", "key_hash", "image_digest", "label", "view")
    kinds = ("logits", "decisions") if targets else (*rows_know, "logits", "decisions")
    names = [name for name in store.arrays if name.split("/")[0] in kinds]
    assert names
    for block in range(len(identity["dataset"]["tars"])):
        for group in range(manifest["views"][targets] // per_group):
            first, end = group * per_group, (group + 1) * per_group
            entry = checked_entry(STORE, manifest, f"{block:06d}-{first:05d}-{end:05d}{ending}.json")
            rows = slice(block * per_block, block * per_block + entry["rows"])
            expected = store.read(block, group, names)
            for name in names:
                array = arrays[prefix + name]
                found = array[rows, first:end] if "view" in array.metadata.dimension_names else array[rows]
                assert found.dtype == expected[name].dtype
                assert found.tobytes() == expected[name].tobytes(), name


def test_logits_of_klt_are_those_that_the_package_decodes():
    from offline_kd.store.opening import open_store

    identity, manifest = checked_manifest(STORE)
    checked_entry(STORE, manifest, "templates-codec.json")
    arrays = zarr.open_group(STORE / "targets.zarr", mode="r")
    tables = {name: np.asarray(arrays[f"codec/{name}"]) for name in ("axes", "mean", "frequency", "refine_frequency")}
    codes = np.asarray(arrays["logits/code"][:50, 0])
    found = np.stack([klt_logits(code, identity["codec"], tables) for code in codes])
    store = open_store(STORE)
    stored = {"code": store.read(0, 0, ["logits/code"])["logits/code"][:50, 0]}
    expected = store.identity.codec.decode_stored(stored, store.codec_tables, store.identity.num_classes)
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_keys_their_hashes_and_image_sums_are_those_of_the_dataset(data_root):
    import tarfile

    import google_crc32c

    identity, _ = checked_manifest(STORE)
    arrays = zarr.open_group(STORE / "targets.zarr", mode="r")
    with tarfile.open(data_root / "digits" / identity["dataset"]["tars"][0]["file"]) as tar:
        images = {one.name.split(".")[0]: tar.extractfile(one).read() for one in tar if not one.name.endswith(".cls")}
    hashes = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in images]
    assert hashes == arrays["key_hash"][: len(images)].tolist()
    assert [row.tobytes().rstrip(b"\0").decode() for row in arrays["key"][: len(images)]] == list(images)
    digests = [hashlib.sha256(content).digest()[:16] for content in images.values()]
    assert digests == [row.tobytes() for row in arrays["image_digest"][: len(images)]]
    checked_manifest(STORE_3)
    checked_manifest(STORE_2)
    of_version_2 = zarr.open_group(STORE_2 / "targets.zarr", mode="r")
    sums = [google_crc32c.value(content) for content in images.values()]
    assert sums == of_version_2["image_crc"][: len(images)].tolist()


def test_the_digest_of_a_store_of_version_1_is_computed_as_the_page_says():
    identity = json.loads((STORES / "store_v1" / "store.json").read_bytes())
    manifest = json.loads((STORES / "store_v1" / "manifest.json").read_bytes())
    about = canonical_digest({name: value for name, value in identity.items() if name != "versions"})
    blocks = sorted(manifest["entries"], key=lambda one: (one["block"], one["first_view"]))
    tables = sorted(manifest["tables"], key=lambda one: one["decisions"])
    assert canonical_digest([about, blocks + tables]) == manifest["digest"]
