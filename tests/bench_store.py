"""How fast a store is proven and opened. Prints one table; every ratio is of one run.

    taskset -c 0 .venv/bin/python tests/bench_store.py

verify: a store of 8 blocks of 4,096 rows x 4 views x 1,000 classes in f16 and in int, made-up logits (normal, 3 wide),
read from the page cache by one core, against sha256 alone over the same bytes. open: a store of 10,000 blocks.
"""

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from made_stores import declare, made_up_identity

from offline_kd.cli.main import keep_freed_memory
from offline_kd.data.blocks import DIGEST_BYTES
from offline_kd.data.manifest import Tar
from offline_kd.data.tars import pack_keys
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.layout import entry_names, parts_of
from offline_kd.store.opening import open_store
from offline_kd.store.reader import stored_object
from offline_kd.store.schema import LedgerEntry, StoreIdentity
from offline_kd.store.verification import verify
from offline_kd.store.writer import commit, create_or_resume
from offline_kd.support.console import say, show_table
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.places import Folder
from offline_kd.views.pad_crop_flip import PadCropFlip

ROWS, VIEWS, CLASSES, BLOCKS, MANY_BLOCKS, ROUNDS = 4096, 4, 1000, 8, 10_000, 5


def identity_of(codec: AnyCodec, blocks: int) -> StoreIdentity:
    tars = [Tar(file=f"train-{block:06d}.tar", count=ROWS, sha256="0" * 64) for block in range(blocks)]
    return made_up_identity(tars, PadCropFlip(kind="pad_crop_flip", count=VIEWS), codec, CLASSES, 32, VIEWS)


def make_full(folder: Path, codec: AnyCodec) -> Folder:
    place, identity = Folder(folder), identity_of(codec, BLOCKS)
    create_or_resume(place, identity)
    rng, entries, total = np.random.default_rng(0), {}, 0
    for block in range(BLOCKS):
        logits = rng.normal(0, 3, (ROWS, VIEWS, CLASSES)).astype(np.float32)
        arrays = {
            "key_hash": counter_hash(block, np.arange(ROWS, dtype=np.uint64)),
            "key": pack_keys([f"{block:06d}-{row:06d}" for row in range(ROWS)]),
            "image_digest": rng.integers(0, 256, (ROWS, DIGEST_BYTES)).astype(np.uint8),
            "label": rng.integers(0, CLASSES, ROWS).astype(np.int32),
            "view/box": rng.integers(-4, 5, (ROWS, VIEWS, 4)).astype(np.int16),
            "view/flip": rng.integers(0, 2, (ROWS, VIEWS)).astype(np.uint8),
            "probe/row": np.arange(4, dtype=np.int32),
            "probe/view": np.zeros(4, dtype=np.int32),
            "probe/pixels": rng.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8),
        } | {f"logits/{name}": array for name, array in codec.encode(logits, {}).items()}
        part, tar = parts_of(identity)[""], identity.dataset.tars[block].file
        about = LedgerEntry(
            block=block, first_view=0, end_view=VIEWS, rows=ROWS, tar=tar, tar_sha256="0" * 64, objects={}
        )
        entry = commit(place, part, 0, about, arrays)
        entries[entry.file_name] = hashlib.sha256(place.read(f"ledger/{entry.file_name}")).digest()
        total += sum(one.bytes for one in entry.objects.values())
    declare(place, identity, entries, total)
    return place


def make_many(folder: Path) -> Folder:
    """10,000 blocks' ledger; their objects are not read by opening, and are not there."""
    place, identity = Folder(folder), identity_of(Float16(name="f16"), MANY_BLOCKS)
    create_or_resume(place, identity)
    (folder / "ledger").mkdir()
    specs, entries = parts_of(identity)[""].specs, {}
    for block, name in enumerate(entry_names(identity, {"": VIEWS})):
        objects = {spec.object_key(block, 0): stored_object(b"") for spec in specs}
        content = LedgerEntry(
            block=block, first_view=0, end_view=VIEWS, rows=ROWS, tar="x", tar_sha256="0" * 64, objects=objects
        ).model_dump_json(indent=1)
        (folder / "ledger" / name).write_text(content + "\n")
        entries[name] = hashlib.sha256(f"{content}\n".encode()).digest()
    declare(place, identity, entries)
    return place


def median_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def hash_all(place: Folder) -> None:
    for name in place.sizes():
        hashlib.sha256(place.read(name)).digest()


def main() -> None:
    keep_freed_memory()  # as the command line does
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, codec in (("f16", Float16(name="f16")), ("int 8", Int(name="int"))):
            say(f"making a store of {name}")
            place = make_full(Path(folder) / name, codec)
            stored = sum(place.sizes().values())
            decoded = BLOCKS * sum(spec.chunk_bytes for spec in parts_of(identity_of(codec, BLOCKS))[""].specs)
            assert verify(place).faults == []
            seconds, hashing = median_seconds(lambda: verify(place)), median_seconds(lambda: hash_all(place))  # noqa: B023
            rows.append([f"verify, {name}: GB stored / s", f"{stored / seconds / 1e9:.2f}"])
            rows.append([f"verify, {name}: GB unpacked / s", f"{decoded / seconds / 1e9:.2f}"])
            rows.append([f"verify / sha256 alone, {name}", f"{seconds / hashing:.2f}"])
        say(f"making a store of {MANY_BLOCKS:,} blocks")
        many = make_many(Path(folder) / "many")
        rows.append([f"open {MANY_BLOCKS:,} blocks, seconds", f"{median_seconds(lambda: open_store(many)):.3f}"])
    show_table("store", ["", "value"], rows)


if __name__ == "__main__":
    main()
