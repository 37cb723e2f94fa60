"""`data index`: webdatasets that exist, as they are. Every tar is read once: counted, hashed, its keys compared.

Tars are independent of each other, so that any machine can read one: `index_tar` is a plain function of plain values.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from offline_kd.data.labels import SETS, Labels, Names
from offline_kd.data.tars import hash_key, parse_samples
from offline_kd.support.errors import DataError
from offline_kd.support.places import Bucket, place_at

MAX_TAR_BYTES = 2**40


@dataclass(frozen=True)
class TarFacts:
    """What reading a tar has found."""

    file: str  # below the location
    bytes: int
    sha256: str
    key_hash: NDArray[np.uint64]  # [samples]
    labels: Counter[int | str]  # samples by class, as the tar says it: index or name; -1: all without labels
    left_out: list[str]  # files that stand together and are no sample
    state: str  # of the tar when it was read: another one after any change; '' where nothing would show that


# ---- one tar -------------------------------------------------------------------------------------------------------


def index_tar(location: str, file: str, rule: str) -> TarFacts:
    """Read a tar whole.

    Args:
        location: folder or URL below which it lies.
        rule: what says the label of a sample, as `Split.labels`.

    Raises DataError for a tar that is not there, is damaged, or has no samples.
    """
    before, content, where = state_of(location, file), read_whole(location, file), f"{location}/{file}"
    names, left_out = Names(), list[str]()
    samples = parse_samples(content, where, Labels(rule, names), left_out)
    if not samples:
        raise DataError(f"{where}: holds no samples: in no place an image stands beside a label. Leave this tar out.")
    said: dict[int, int | str] = {number: name for name, number in names.items()}
    labels = Counter(label for one in samples for label in (one.classes if rule.startswith(SETS) else [one.label]))
    return TarFacts(
        file=file,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        key_hash=np.array([hash_key(sample.key) for sample in samples], dtype=np.uint64),
        labels=Counter({said.get(label, label): count for label, count in labels.items()}),
        left_out=left_out,
        state=before if before == state_of(location, file) else "",
    )


def read_whole(location: str, file: str) -> bytes:
    """The bytes of a tar; raises DataError when it is not there."""
    try:
        if "://" in location:
            return place_at(location).read(file, MAX_TAR_BYTES)
        return (Path(location) / file).read_bytes()
    except OSError as error:
        said = error.strerror or "not found"
        raise DataError(f"{location}/{file}: cannot be read ({said}). Correct the name, or fetch the file.") from error


def state_of(location: str, file: str) -> str:
    """What changes with any change of a file, '' where nothing does: size, times and inode, or a bucket's ETag."""
    if "://" not in location:
        try:
            about = os.stat(Path(location) / file)
        except OSError:
            return ""
        return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino} {about.st_dev}"
    place = place_at(location)
    return (place.version(file) or "") if isinstance(place, Bucket) else ""


# ---- all tars ------------------------------------------------------------------------------------------------------


def in_processes(location: str, files: Sequence[str], rule: str, workers: int) -> Iterator[TarFacts]:
    """What every tar holds, in any order; one worker is this process."""
    if workers == 1:
        yield from (index_tar(location, file, rule) for file in files)
        return
    # Started anew: a copy of this process would lack the threads that its connections have.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(index_tar, location, file, rule) for file in files]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{location}: a process that read tars was ended, perhaps for want of memory: each holds a tar twice. "
                "Give fewer --workers; tars that were read are not read again."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def on_ray(location: str, files: Sequence[str], rule: str, workers: int) -> Iterator[TarFacts]:
    """As `in_processes`, by tasks on the Ray cluster that RAY_ADDRESS names, or one of this machine."""
    from offline_kd.support.ray_cluster import as_expected, joined, ray

    with joined(None):
        task, queue = ray.remote(index_tar), list(reversed(files))
        running: list[ray.ObjectRef[TarFacts]] = []
        while queue or running:
            while queue and len(running) < workers:
                running.append(task.remote(location, queue.pop(), rule))
            done, running = ray.wait(running)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise as_expected(error) from None
            except ray.exceptions.RayError as error:
                raise DataError(
                    f"{location}: Ray lost a task that read a tar ({error}). Run the command again."
                ) from error


ENGINES: dict[str, Callable[[str, Sequence[str], str, int], Iterator[TarFacts]]] = {
    "processes": in_processes,
    "ray": on_ray,
}


def refuse_shared_keys(location: str, tars: Sequence[TarFacts], rule: str) -> None:
    """Raise DataError naming the tars when two samples of a split have one key."""
    hashes = np.concatenate([tar.key_hash for tar in tars])
    hashes.sort()
    twice = np.flatnonzero(hashes[1:] == hashes[:-1])
    if len(twice):
        _refuse_key(location, [tar for tar in tars if hashes[twice[0]] in tar.key_hash], rule, hashes[twice[0]])


def _refuse_key(location: str, tars: Sequence[TarFacts], rule: str, key_hash: np.uint64) -> NoReturn:
    samples = parse_samples(read_whole(location, tars[0].file), tars[0].file, Labels(rule, Names()))
    key = next((one.key for one in samples if hash_key(one.key) == key_hash), f"with hash {key_hash:016x}")
    files = ", ".join(tar.file for tar in tars[:5])
    raise DataError(
        f"{location}: key '{key}' is that of samples in {len(tars)} tars: {files}. Keys of a split must be unique: "
        "name each tar once, or pack the dataset again."
    )
