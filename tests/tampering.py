"""Change a finished store so that every hash in it fits, up to manifest.json: as a faulty writer would have."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from offline_kd.store.chunks import decode_chunk, encode_chunk
from offline_kd.store.opening import open_store
from offline_kd.store.reader import stored_object
from offline_kd.store.schema import PAGE_BLOCKS, StoreManifest, ledger_name, store_digest
from offline_kd.store.writer import parse_entry, write_manifest
from offline_kd.support.places import Folder

Change = Callable[[np.ndarray], np.ndarray]


def stored(path: Path, name: str, block: int, group: int) -> np.ndarray:
    """The rows of one object."""
    return np.array(open_store(path).read(block, group, [name])[name])


def rewrite(path: Path, name: str, block: int, group: int, change: Change) -> None:
    """Put other rows into one object, and let ledger and manifest vouch for it."""
    store = open_store(path)
    part, spec = store.arrays[name]
    key = spec.object_key(block, group)
    file = path / "targets.zarr" / key
    chunk = np.array(decode_chunk(spec, file.read_bytes(), key))
    inside = chunk[0, 0] if name.startswith("probe/") else chunk[: store.entry(part.name, block, group).rows]
    inside[...] = change(inside.copy())
    file.write_bytes(encode_chunk(spec, chunk))
    for views in store.identity.groups:  # an array without views is vouched for by every view group
        entry_file = path / "ledger" / ledger_name(block, views, part.name)
        entry = parse_entry(entry_file.name, entry_file.read_bytes(), entry_file.name)
        if key in entry.objects:
            objects = {**entry.objects, key: stored_object(file.read_bytes())}
            entry_file.write_text(entry.model_copy(update={"objects": objects}).model_dump_json())
    vouch_for_ledger(path)
    open_store(path)  # by size, sha256 and digest the store is whole


def vouch_for_ledger(path: Path) -> None:
    """Make pages and manifest vouch for identity, small files and ledger as they are now."""
    manifest = StoreManifest.model_validate_json((path / "manifest.json").read_bytes())
    raw = json.loads((path / "store.json").read_bytes())
    for name in manifest.pages:
        first, views, *addition = name.removesuffix(".bin").replace("-", ".", 1).split(".")
        ending = ".".join([views, *addition, "json"])
        blocks = range(int(first), min(int(first) + PAGE_BLOCKS, len(raw["dataset"]["tars"])))
        content = b"".join(
            hashlib.sha256((path / "ledger" / f"{block:06d}-{ending}").read_bytes()).digest() for block in blocks
        )
        (path / "hashes" / name).write_bytes(content)
    pages = {name: hashlib.sha256((path / "hashes" / name).read_bytes()).hexdigest() for name in manifest.pages}
    hashes = {name: hashlib.sha256((path / "ledger" / name).read_bytes()).hexdigest() for name in manifest.entries}
    files = {name: stored_object((path / name).read_bytes()) for name in manifest.files}
    added = [json.loads((path / f"additions/{name}.json").read_bytes()) for name in manifest.views if name]
    digest = store_digest(raw, added, {**pages, **hashes})
    update = {"pages": pages, "entries": hashes, "files": files, "digest": digest}
    write_manifest(Folder(path), manifest.model_copy(update=update))


def change_identity(path: Path, change: Callable[[dict], None]) -> None:
    """Change `store.json`, and let the manifest vouch for it."""
    about = json.loads((path / "store.json").read_bytes())
    change(about)
    (path / "store.json").write_text(json.dumps(about, indent=2) + "\n")
    vouch_for_ledger(path)
    open_store(path)


def swap(path: Path, names: list[str], one: tuple[int, int], other: tuple[int, int]) -> None:
    """Exchange arrays of two blocks and view groups."""
    for name in names:
        first, second = stored(path, name, *one), stored(path, name, *other)
        rewrite(path, name, *one, lambda _, second=second: second)
        rewrite(path, name, *other, lambda _, first=first: first)
