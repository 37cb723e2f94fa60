"""Blocks as tasks of a Ray cluster: actors that hold the teacher do one after the other.

The ledger alone says what is done, so that nothing here has to be exactly once: a block whose actor or node was lost is
given to another actor, and no lease is taken. The driver, which is this process, may die at any moment: Ray ends its
actors, and the same command goes on.
"""

import contextlib
import copy
import io
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from offline_kd.cache.job import Capture
from offline_kd.cache.unique_keys import KnownKeys
from offline_kd.cache.work import Work, capture_block, open_work
from offline_kd.support.console import Meter, progress, say
from offline_kd.support.errors import RecipeError, TeacherError
from offline_kd.support.ray_cluster import as_expected, in_folder, joined, ray

LOST_WITH = 3  # so many actors may be lost over one block before it is the block that is blamed
PATIENCE_SECONDS = 30.0  # without any actor before that is said


class Actor:
    """In a process of the cluster: the teacher, on a GPU or a CPU of that node."""

    def start(self, work: Work, folder: str, device: str) -> None:
        """Take the teacher; `folder` is where the driver works."""
        in_folder(folder)
        here = torch.device(device)
        work.capture.asked.network.to(here)
        self.work = _on(work, here)

    def do(self, number: int) -> tuple[int, float, list[str]]:
        """Commit what is open of a block: so many views of images, in so many seconds, and what was said."""
        started, views = time.monotonic(), [0]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            capture_block(self.work, number, self.work.capture.loader[number], lambda: True, views.append)
        return sum(views), time.monotonic() - started, said.getvalue().splitlines()


@dataclass
class _Hired:
    """An actor as its driver knows it."""

    handle: Any
    block: int | None = None  # that it does; None: it is starting
    views: int = 0  # that it has committed
    seconds: float = 0.0  # that it took


def run(
    capture: Capture,
    addition: str,
    blocks: Sequence[int],
    *,
    ray_address: str | None = None,
    min_actors: int = 1,
    max_actors: int | None = None,
    gpus_per_actor: float | None = None,
) -> None:
    """Give the open blocks to actors of a Ray cluster until all are committed.

    Args:
        ray_address: see `ray_cluster.joined`.
        min_actors: how many are asked for at first. Whenever all of them work, twice as many are asked for, up to
            `max_actors` (None: one for every block); Ray starts them when resources are free.
        gpus_per_actor: with a fraction actors share a GPU, with 0 they use a CPU. None: 1 if this process uses a GPU.

    Raises what a block raised, and TeacherError for a block over which three actors were lost.
    """
    if max_actors is not None and max_actors < min_actors:
        raise RecipeError(f"--max-actors {max_actors}: fewer than --min-actors, which is {min_actors}.")
    gpus = float(capture.device.type == "cuda") if gpus_per_actor is None else gpus_per_actor
    work = open_work(capture, addition, blocks)
    numbers = [block for block in blocks if not work.known_done(block)]
    if not numbers:
        return
    with joined(ray_address), progress("teacher", work.open_views, "views") as meter:
        actor_class = ray.remote(num_cpus=1, num_gpus=gpus)(Actor)
        sent, folder, device = ray.put(_portable(work)), os.getcwd(), "cuda" if gpus else "cpu"

        def hire() -> tuple[Any, _Hired]:
            handle = actor_class.remote()
            return handle.start.remote(sent, folder, device), _Hired(handle)

        crew: dict[Any, _Hired] = {}  # by what is waited for
        try:
            say(_do_all(crew, numbers, hire, (min_actors, max_actors or len(numbers)), meter))
        finally:
            _dismiss(crew.values())


def _do_all(
    crew: dict[Any, _Hired],
    numbers: Sequence[int],
    hire: Callable[[], tuple[Any, _Hired]],
    bounds: tuple[int, int],
    meter: Meter,
) -> str:
    """Returns what to say of it: blocks, retries, speeds."""
    waiting, lost_over, proven = deque(numbers), Counter[int | None](), list[_Hired]()
    wanted, most = bounds
    patient_until = time.monotonic() + PATIENCE_SECONDS
    while waiting or any(one.block is not None for one in crew.values()):
        if crew and all(one.block is not None for one in crew.values()):
            wanted = max(wanted, min(2 * len(crew), most))
        while len(crew) < wanted and sum(one.block is None for one in crew.values()) < len(waiting):
            ref, one = hire()
            crew[ref] = one
        answered, _ = ray.wait(list(crew), timeout=PATIENCE_SECONDS)
        if not (proven or answered) and time.monotonic() > patient_until:
            patient_until = float("inf")
            say(f"ray: no actor could start yet; {_resources()}. Waiting for the cluster")
        for ref in answered:
            one = crew.pop(ref)
            try:
                answer = ray.get(ref)
            except ray.exceptions.RayTaskError as failed:
                raise as_expected(failed) from None
            except ray.exceptions.RayError as error:  # the actor is lost, or cannot be reached
                _lose(one, lost_over, error)
                if one.block is not None:
                    waiting.appendleft(one.block)
                _dismiss([one])
                continue
            if one.block is None:
                lost_over[None] = 0
                proven.append(one)
            else:
                _count(one, answer, meter)
            if waiting:
                one.block = waiting.popleft()
                crew[one.handle.do.remote(one.block)] = one
            else:
                _dismiss([one])
    return f"ray: {len(numbers)} blocks, {lost_over.total() - lost_over[None]} retries; {_speeds(proven)}"


def _lose(one: _Hired, lost_over: Counter[int | None], error: Exception) -> None:
    """Raises TeacherError where it is not the actor that is to blame."""
    lost_over[one.block] += 1
    reason = " ".join(str(error).split())
    doing = "starting" if one.block is None else f"block {one.block}"
    if lost_over[one.block] == LOST_WITH:
        raise TeacherError(
            f"{doing}: {LOST_WITH} actors were lost over it, the last one with: {reason:.400} Do it alone to see why: "
            "--engine local. The memory of the nodes may be too small for capture.batch_size."
        )
    say(f"ray: an actor was lost ({doing}), another one does it: {reason:.200}")


def _count(one: _Hired, answer: tuple[int, float, list[str]], meter: Meter) -> None:
    views, seconds, said = answer
    one.views += views
    one.seconds += seconds
    meter.advance(views)
    for line in said:
        say(line)


def _speeds(actors: Sequence[_Hired]) -> str:
    speeds = sorted(one.views / one.seconds for one in actors if one.seconds)
    if not speeds:
        return "no actor committed anything"
    middle = statistics.median(speeds)
    return f"{len(speeds)} actors: {middle:,.0f} img/s each ({speeds[0]:,.0f} to {speeds[-1]:,.0f})"


def _resources() -> str:
    whole, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{free.get(name, 0):g} of {whole.get(name, 0):g} {name}s are free" for name in ("CPU", "GPU"))


def _dismiss(actors: Iterable[_Hired]) -> None:
    for one in actors:
        ray.kill(one.handle)


def _portable(work: Work) -> Work:
    """The work as it travels: on the CPU, since no other process has this one's GPU.

    It has no keys, of which there may be many: that they are unique is proven when the store is finished.
    """
    teacher = work.capture.asked
    teacher = replace(teacher, network=copy.deepcopy(teacher.network).cpu())
    work = replace(work, capture=replace(work.capture, teacher=teacher), known_keys=KnownKeys())
    return _on(work, torch.device("cpu"))


def _on(work: Work, device: torch.device) -> Work:
    """The same with the tables on a device, and the teacher of its capture, which is there.

    What Ray hands out lies in memory that others read: what is written to is copied.
    """
    tables = {name: {key: one.to(device) for key, one in of.items()} for name, of in work.inquiry.tables.items()}
    inquiry = replace(work.inquiry, teacher=work.capture.asked, tables=tables, device=device)
    return replace(work, capture=replace(work.capture, device=device), inquiry=inquiry, done=work.done.copy())
