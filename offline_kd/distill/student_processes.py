"""Students of one recipe, trained at once: in processes of this machine, each of which trains one after the other.

That pays where one student leaves cores, or a GPU, idle. Every process reads images and store for itself, and has its
share of the cores.
"""

import contextlib
import io
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest
from offline_kd.distill.results import Result
from offline_kd.distill.training import DistillOptions, Shared, distill
from offline_kd.recipe import Recipe
from offline_kd.support.console import progress
from offline_kd.support.errors import TrainingError

_shared = Shared()  # of the students that a process trains one after the other


def distill_in_processes(
    manifest: Manifest,
    roots: Sequence[Root],
    students: Mapping[Path, tuple[Recipe, DistillOptions]],
    device: torch.device,
    jobs: int,
) -> Iterator[tuple[Path, Result]]:
    """Train all students, by their run directories, `jobs` of them at a time; yields each when it is finished.

    Raises what the first student to fail raised; the others are ended, and go on when the same command is run again.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads, or with a GPU, may hang
    end, alive = context.Pipe(duplex=False)  # whose other end is closed when this process ends, however it does
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(min(jobs, len(students) or 1), context, _begin, (end, threads))
    try:
        futures = {
            pool.submit(_train, recipe, manifest, list(roots), folder, device, about): folder
            for folder, (recipe, about) in students.items()
        }
        with progress("students", len(futures), "students") as meter:
            for future in as_completed(futures):
                yield futures[future], future.result()
                meter.advance()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise TrainingError(
            "a process that trained students was ended, as happens when memory is short. The same command goes on; "
            "give a smaller --jobs."
        ) from error
    finally:
        alive.close()
        pool.shutdown(cancel_futures=True)
        end.close()


def _begin(end: Connection, threads: int) -> None:
    """In a process of its own, which ends as soon as nobody waits for it any more."""
    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        wait([end])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _train(
    recipe: Recipe, manifest: Manifest, roots: list[Root], folder: Path, device: torch.device, about: DistillOptions
) -> Result:
    what: DistillOptions = {**about, "shared": _shared}
    with contextlib.redirect_stderr(io.StringIO()):  # metrics.jsonl has it; of many students at once nobody reads it
        return distill(recipe, manifest, roots, folder, device, **what)
