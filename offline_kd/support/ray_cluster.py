"""A Ray cluster: joined and left again, and what went wrong there said in one line."""

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from offline_kd.support.errors import OfflineKDError, RecipeError

try:
    import ray as ray  # for whoever imports it from here
except ImportError as error:
    raise RecipeError("--engine ray: Ray is not installed. Install it: pip install 'offline-kd[ray]'") from error

CONNECT_SECONDS = 5


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[None]:
    """This process as a driver of the cluster, unless it is one already; left at the end, which ends its actors.

    Args:
        address: HOST:PORT, or "auto" for the cluster that this machine is part of. None: what RAY_ADDRESS names, or the
            cluster that this machine is part of, or else this machine alone.

    Raises RecipeError where no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here: nothing is sent home
    named = address or os.environ.get("RAY_ADDRESS") or None
    if named:
        _refuse_silent(named)
    try:
        # What workers print stays in Ray's own log files: they would all write over one bar.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of many classes, and of none where a machine is too busy to start Ray in 30 s
        raise _no_cluster(named or "this machine", " ".join(str(error).split())) from error
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Raises RecipeError where nobody listens: Ray itself would go on trying for minutes."""
    host_and_port = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if host_and_port is None:
        return
    try:
        socket.create_connection((host_and_port[1], int(host_and_port[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, problem: str) -> RecipeError:
    return RecipeError(
        f"--engine ray: no Ray cluster at {address} ({problem:.300}). Start one (ray start --head), correct "
        "--ray-address, or try again."
    )


def in_folder(folder: str) -> None:
    """In a worker: relative paths mean what they mean in the driver, where both see the same folders."""
    if Path(folder).is_dir():
        os.chdir(folder)


def as_expected(failed: ray.exceptions.RayTaskError) -> Exception:
    """What to raise for what a task raised: expected failures as themselves; a bug keeps its traceback of there."""
    cause = failed.cause
    if isinstance(cause, OfflineKDError):
        return cause
    if isinstance(cause, OSError) and cause.filename is not None:
        return OfflineKDError(
            f"{cause.filename}: {cause.strerror}, on a node of the Ray cluster. Images, weights and --out must lie "
            "where every node sees them at the same path, or at a URL."
        )
    if isinstance(cause, ImportError) or "ModuleNotFoundError" in str(failed):
        lines = [line.strip() for line in str(failed).splitlines() if "Error" in line]
        return OfflineKDError(
            f"a node of the Ray cluster cannot start its share ({lines[-1] if lines else cause}). Every node needs "
            "offline-kd and the modules that the recipe names, in the same versions: see docs/cluster.md."
        )
    return failed
