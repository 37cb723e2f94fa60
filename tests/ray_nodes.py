"""A Ray cluster of several raylets on this machine, in a process of its own.

`with ray_nodes(3) as nodes:` starts it; `nodes.address`; `nodes.remove()` ends one raylet that is not the head, with
all its workers.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEGABYTE = 2**20
ATTEMPTS = 4  # a busy machine may not start a raylet within the 30 s that Ray gives it
PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
}


class Nodes:
    def __init__(self, process: "subprocess.Popen[str]", errors: Path) -> None:
        self.process, self.errors = process, errors
        self.address = self._answer()

    def remove(self) -> None:
        assert self.process.stdin is not None
        print("remove", file=self.process.stdin, flush=True)
        assert self._answer() == "removed"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # Ray may print something of its own
            if line.startswith("answer "):
                return line.split()[1]
        raise AssertionError(f"the cluster did not start, or went away: {self.errors.read_text()[-3000:]}")


@contextmanager
def ray_nodes(count: int, cpus: int = 1) -> Iterator[Nodes]:
    """A head and further raylets, each of which counts that many CPUs; what they wrote is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # names of sockets may have 107 characters
    (folder / "ray").mkdir()  # where Ray notes the newest cluster of a machine, and which it does not always make
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, str(count), str(cpus), folder],
            env=os.environ | PATIENT | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield Nodes(process, folder / "errors")
    finally:
        process.communicate(timeout=120)  # closes its input, at which it ends
        shutil.rmtree(folder, ignore_errors=True)


def serve(count: int, cpus: int, folder: Path) -> None:
    from ray.cluster_utils import Cluster

    about = {"num_cpus": cpus, "object_store_memory": 80 * MEGABYTE}
    for attempt in range(ATTEMPTS):
        cluster = Cluster()
        try:
            cluster.add_node(**about, include_dashboard=False, temp_dir=str(folder / str(attempt)))
            more = [cluster.add_node(**about) for _ in range(count - 1)]
            break
        except Exception:
            cluster.shutdown()
            if attempt == ATTEMPTS - 1:
                raise
    print("answer", cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(more.pop(), allow_graceful=False)
        print("answer", "removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
