"""What costs grow with: stores of 64,000 and 1,000,000 ledger entries, made without a teacher. Prints one table.

    .venv/bin/python tests/bench_scale.py [--folder FOLDER] [--entries 1280x50 50000x20]

Every store has the ledger, the pages of hashes and the manifest of a real one (TARS x GROUPS entries, 4 images in a
tar, one view in a group, f16 of 10 classes). The blocks of the first pool of an epoch have real objects and real tars.
Those of the others are links to the same few files, where TARS x GROUPS is below LINKED; in a larger store they are not
there, and `verify --quick` is given a list of them: millions of folders are what a disk is slow with, not what is
measured.

Each figure is of a process of its own that has imported what it needs: seconds, requests, and the most memory it held.
From S3: the same folder behind a server that lists and hands out files, on this machine, with so much latency.
"""

import argparse
import bisect
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import escape

import numpy as np
import torch
from made_stores import declare, made_up_identity
from PIL import Image

from offline_kd.cache.job import Capture
from offline_kd.cache.work import open_work
from offline_kd.data.blocks import load_block
from offline_kd.data.manifest import Tar
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample
from offline_kd.distill.reader import READ_AHEAD
from offline_kd.distill.sampler import Order
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import Recipe
from offline_kd.store.chunks import encode_chunk
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.join import Wanted, join, joined_arrays, row_arrays
from offline_kd.store.layout import ArraySpec, parts_of
from offline_kd.store.opening import open_store, read_identity
from offline_kd.store.reader import stored_object
from offline_kd.store.schema import LedgerEntry, StoreIdentity, ledger_name
from offline_kd.store.verification import verify
from offline_kd.store.writer import commit, create_or_resume, write_zarr_metadata
from offline_kd.support.console import say, show_table
from offline_kd.support.places import Bucket, Folder, Place
from offline_kd.views.choice import choose
from offline_kd.views.epochs import view_of_epoch
from offline_kd.views.kind import draw
from offline_kd.views.pad_crop_flip import PadCropFlip
from offline_kd.views.render import render_some

ROWS, CLASSES, SIDE, POOL, LINKS = 4, 10, 8, 16, 30_000
LINKED = 100_000  # entries of a store whose objects are all there
LATENCY = 0.005
CPU = torch.device("cpu")
CHECK = "verify --quick"
WORKS = ("open", "first batch", "plan of a resume", CHECK)


# ---- making --------------------------------------------------------------------------------------------------------


def first_pool(tars: int) -> list[int]:
    """The tars whose rows the first batches of an epoch are mixed from."""
    return Order(0, 0, 1, [ROWS] * tars, POOL, ROWS).tars[:POOL].tolist()


def make(folder: Path, tars: int, groups: int) -> None:
    rng, pool = np.random.default_rng(0), first_pool(tars)
    described = [Tar(file=f"train-{n:06d}.tar", count=ROWS, sha256=f"{n:064x}") for n in range(tars)]
    for block in pool:
        pixels = rng.integers(0, 256, (ROWS, SIDE, SIDE, 3)).astype(np.uint8)
        samples = [Sample(f"{block:06d}-{row}", row, png(pixels[row]), "png") for row in range(ROWS)]
        packed = pack(samples, folder / "images", f"{block:06d}", ROWS)[0]
        (folder / "images" / packed.file).rename(folder / "images" / described[block].file)
        described[block] = packed.model_copy(update={"file": described[block].file})
    views = PadCropFlip(kind="pad_crop_flip", count=groups)
    identity = made_up_identity(described, views, Float16(name="f16"), CLASSES, SIDE, 1)
    place = Folder(folder / "store")
    create_or_resume(place, identity)
    started = time.perf_counter()
    hashes = write_ledger(place, identity, objects=link_objects(folder, identity))
    for block in pool:
        hashes |= commit_block(place, identity, folder / "images", block)
    declare(place, identity, hashes)
    say(f"made {len(hashes):,} entries in {time.perf_counter() - started:.0f} s")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def link_objects(folder: Path, identity: StoreIdentity) -> dict[str, bytes]:
    """The content that the objects of an array have; in a store that is small enough, the objects."""
    specs = parts_of(identity)[""].specs
    contents = {spec.name: object_of(spec) for spec in specs}
    if identity.num_blocks * len(identity.groups) > LINKED:
        return contents
    for spec in specs:
        count = 0
        for block in range(identity.num_blocks):
            for group in range(len(identity.groups) if spec.extent == "group" else 1):
                file = folder / "store" / "targets.zarr" / spec.object_key(block, group)
                file.parent.mkdir(parents=True, exist_ok=True)
                if count % LINKS == 0:  # a file may not have more names than that
                    one = folder / f"{spec.name.replace('/', '-')}-{count}"
                    one.write_bytes(contents[spec.name])
                os.link(one, file)
                count += 1
    return contents


def object_of(spec: ArraySpec) -> bytes:
    return encode_chunk(spec, np.zeros(spec.chunks, dtype=spec.dtype))


def write_ledger(place: Folder, identity: StoreIdentity, objects: dict[str, bytes]) -> dict[str, bytes]:
    """Every entry; returns their sha256 by name."""
    specs = parts_of(identity)[""].specs
    (place.path / "ledger").mkdir()
    marked = {spec.object_key(777_777, 888_888): stored_object(objects[spec.name]) for spec in specs}
    about = LedgerEntry(
        block=777_777, first_view=888_888, end_view=999_999, rows=ROWS, tar="T", tar_sha256="0" * 64, objects=marked
    )
    text = about.model_dump_json(indent=1, exclude={"left_out"}) + "\n"
    hashes = {}
    for block, tar in enumerate(identity.dataset.tars):
        assert tar.sha256 is not None
        of_block = text.replace("777777", str(block)).replace('"T"', f'"{tar.file}"').replace("0" * 64, tar.sha256)
        for view in range(len(identity.groups)):
            content = of_block.replace("888888", str(view)).replace("999999", str(view + 1)).encode()
            name = ledger_name(block, range(view, view + 1))
            descriptor = os.open(f"{place.path}/ledger/{name}", os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, content)
            os.close(descriptor)
            hashes[name] = hashlib.sha256(content).digest()
    return hashes


def commit_block(place: Folder, identity: StoreIdentity, images: Path, block: int) -> dict[str, bytes]:
    """What stage 1 commits of the view group that the first epoch shows, with made-up logits."""
    tar = identity.dataset.tars[block]
    loaded = load_block(images / tar.file, tar, CLASSES)
    group, _ = view_of_epoch(0, loaded.key_hash, 0, identity.groups)
    parameters = {
        name: array[:, group : group + 1]
        for name, array in draw(identity.views, loaded.key_hash, loaded.sizes()).items()
    }
    arrays = {**row_arrays(identity, loaded), **{f"view/{name}": array for name, array in parameters.items()}}
    rows, views = np.arange(4), np.zeros(4, dtype=np.int64)
    probes = render_some(loaded, choose(parameters, rows, views), identity.views, SIDE)
    arrays |= {"probe/row": rows, "probe/view": views, "probe/pixels": probes}
    arrays["logits/values"] = np.ones((ROWS, 1, CLASSES), dtype=np.float16)
    entry = LedgerEntry(
        block=block, first_view=group, end_view=group + 1, rows=ROWS, tar=tar.file, tar_sha256=tar.sha256, objects={}
    )
    specs, ledger = parts_of(identity)[""].specs, place.path / "ledger"
    (ledger / entry.file_name).unlink()
    for spec in specs:
        place.delete(f"targets.zarr/{spec.object_key(block, group)}")
    entry = commit(place, parts_of(identity)[""], group, entry, arrays)
    hashes = {entry.file_name: hashlib.sha256((ledger / entry.file_name).read_bytes()).digest()}
    # What is the same for all view groups, all their entries vouch for.
    keys = [spec.object_key(block, group) for spec in specs if spec.extent == "block"]
    shared = {key: entry.objects[key] for key in keys}
    for name in (ledger_name(block, views) for views in identity.groups if views.start != group):
        other = LedgerEntry.model_validate_json((ledger / name).read_bytes())
        content = other.model_copy(update={"objects": {**other.objects, **shared}}).model_dump_json().encode()
        (ledger / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).digest()
    return hashes


# ---- measuring: in a process of its own ----------------------------------------------------------------------------

asked: list[str] = []  # every request to a folder


@dataclass(frozen=True)
class Counted(Folder):
    """A folder that counts what it is asked for."""

    def read(self, name: str, limit: int = 2**30) -> bytes:
        asked.append(name)
        return super().read(name, limit)

    def size(self, name: str) -> int | None:
        asked.append(name)
        return super().size(name)

    def names(self, prefix: str = "") -> Iterator[str]:
        asked.append(prefix)
        return super().names(prefix)

    def files(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        asked.append(prefix)
        yield from super().files(prefix)
        if prefix or (self.path / "targets.zarr/view/flip/c/0/0").exists():
            return
        identity = read_identity(self)[1]
        pool = set(first_pool(identity.num_blocks))
        group, _ = view_of_epoch(0, np.zeros(1, dtype=np.uint64), 0, identity.groups)
        for spec in parts_of(identity)[""].specs:
            size = len(object_of(spec))
            for block in range(identity.num_blocks):
                for number in range(len(identity.groups) if spec.extent == "group" else 1):
                    if not (block in pool and (spec.extent == "block" or number == group)):
                        yield f"targets.zarr/{spec.object_key(block, number)}", size


def measure(work: str, location: str, images: Path) -> dict[str, float]:
    place: Place = Bucket(location) if "://" in location else Counted(Path(location))
    before, started, computing = memory(), time.perf_counter(), time.process_time()
    if work == "open":
        open_store(place)
    elif work == "first batch":
        first_batch(place, images)
    elif work == "plan of a resume":
        plan(place)
    else:
        faults = verify(place, quick=True).faults
        assert faults == [], faults[:3]
    return {
        "seconds": time.perf_counter() - started,
        "computing": time.process_time() - computing,
        "before": before,
        "peak": memory(),
        "asked": len(asked),
    }


def memory() -> int:
    """The most that this process held so far, in bytes."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def first_batch(place: Place, images: Path) -> None:
    """From opening to all rows of the first pool of tars, with all images, keys, labels and probes compared."""
    store = open_store(place)
    pool = first_pool(store.created.num_blocks)
    for index, number in enumerate(pool):
        tar = store.created.dataset.tars[number]
        block = load_block(images / tar.file, tar, CLASSES)
        group, position = view_of_epoch(0, block.key_hash, 0, store.identity.groups)
        for later in pool[index + 1 : index + 1 + READ_AHEAD] if place.is_remote else ():
            store.fetch_ahead(later, group, joined_arrays(store, Wanted()))
        assert len(join(store, block, group, position)) == ROWS


def plan(place: Place) -> None:
    """What `cache-teacher` finds out before its first block, with a teacher that is never asked."""
    _, identity = read_identity(place)
    write_zarr_metadata(place, parts_of(identity))
    about = {"normalisation": identity.teacher.normalisation, "crop": None, "expected": None, "licence": ""}
    teacher = Teacher(
        "made-up", "made-up", {}, "0" * 64, dtype="float32", network=torch.nn.Identity(), batch_size=1, **about
    )
    recipe = Recipe.model_construct(views=identity.views)
    loader = SimpleNamespace(split=SimpleNamespace(tars=identity.dataset.tars))
    capture = Capture(recipe, loader, teacher, CPU, place, identity, [], [""], identity.views.num_views)
    work = open_work(capture, "", range(identity.num_blocks))
    assert work.open_views == 0


# ---- S3 ------------------------------------------------------------------------------------------------------------


class Listing(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading takes: GET, HEAD, and lists of a thousand names, of the files in a folder."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    latency = 0.0
    count = 0
    names: dict[str, list[str]] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/count":
            self.answer(200, str(Listing.count).encode())
            return
        Listing.count += 1
        time.sleep(self.latency)
        query = dict(urllib.parse.parse_qsl(url.query))
        if "list-type" in query:
            self.answer(200, self.page(query).encode())
            return
        file = self.folder / urllib.parse.unquote(url.path).removeprefix("/bucket/")
        if file.is_file():
            self.answer(200, file.read_bytes())
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_HEAD = do_GET

    def page(self, query: dict[str, str]) -> str:
        prefix = query.get("prefix", "")
        if prefix not in self.names:
            place = Folder(self.folder)
            self.names[prefix] = sorted(place.names(prefix))
        names, after = self.names[prefix], query.get("continuation-token") or query.get("start-after", "")
        first = bisect.bisect_right(names, after)
        some = names[first : first + 1000]
        about = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-21T00:00:00.000Z</LastModified>"
            f'<ETag>"0"</ETag><Size>{(self.folder / name).lstat().st_size}</Size></Contents>'
            for name in some
        )
        more = first + 1000 < len(names)
        token = f"<NextContinuationToken>{escape(some[-1])}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><Name>bucket</Name><KeyCount>{len(some)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{about}</ListBucketResult>"
        )

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        self.send_header("ETag", '"0"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def serve(folder: Path, port_file: Path) -> None:
    Listing.folder, Listing.latency = folder, LATENCY
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    server.daemon_threads = True
    port_file.write_text(str(server.server_port))
    server.serve_forever()


# ---- the table -----------------------------------------------------------------------------------------------------


def in_a_process(work: str, location: str, images: Path, environment: dict[str, str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", work, location, str(images)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment, "OFFLINE_KD_CACHE": cache},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def row(where: str, entries: int, work: str, found: dict[str, float]) -> list[str]:
    say(f"{where} {entries:,} {work}: {found}")
    more = (found["peak"] - found["before"]) / 1e6
    times = [f"{found['seconds']:.2f}", f"{found['computing']:.2f}"]
    values = [*times, f"{int(found['asked']):,}", f"{found['peak'] / 1e6:.0f}", f"{more:.0f}"]
    return [where, f"{entries:,}", work, *values]


def measure_all(folder: Path, tars: int, groups: int, check: list[str]) -> list[list[str]]:
    store, images, entries, rows = folder / "store", folder / "images", tars * groups, []
    *works, _ = WORKS
    for work in works:
        rows.append(row("folder", entries, work, in_a_process(work, str(store), images, {})))
    port_file = folder / "port"
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(store), str(port_file)])
    try:
        while not port_file.exists():
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port_file.read_text()}"
        keys = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        environment = {**keys, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}

        def from_s3(work: str) -> list[str]:
            before = counted(address)
            found = in_a_process(work, "s3://bucket", images, environment)
            return row("S3", entries, work, {**found, "asked": counted(address) - before})

        rows += [from_s3(work) for work in works]
        if "folder" in check:
            rows.append(row("folder", entries, CHECK, in_a_process(CHECK, str(store), images, {})))
        if "S3" in check and entries <= LINKED:
            rows.append(from_s3(CHECK))
    finally:
        server.terminate()
        server.wait()
    return rows


def counted(address: str) -> int:
    with urllib.request.urlopen(f"{address}/count") as answer:
        return int(answer.read())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--entries", nargs="+", default=["1280x50", "50000x20"])
    parser.add_argument("--check", nargs="*", default=["folder", "S3"], help="where `verify --quick` is measured")
    parser.add_argument("--measure", nargs=3)
    parser.add_argument("--serve", nargs=2)
    options = parser.parse_args()
    if options.measure:
        work, location, images = options.measure
        print(json.dumps(measure(work, location, Path(images))))
        return
    if options.serve:
        serve(*map(Path, options.serve))
        return
    rows = []
    for size in options.entries:
        tars, groups = map(int, size.split("x"))
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir=options.folder))
        try:
            make(folder, tars, groups)
            rows += measure_all(folder, tars, groups, options.check)
        finally:
            shutil.rmtree(folder)
    rows.sort(key=lambda one: (one[0], WORKS.index(one[2])))
    show_table(
        "scale",
        ["from", "entries", "", "seconds", "of them computing", "requests", "MB at most", "MB more than before"],
        rows,
    )


if __name__ == "__main__":
    main()
