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


class Nodes:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
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
        raise AssertionError("the cluster did not start")


@contextmanager
def ray_nodes(count: int, cpus: int = 1) -> Iterator[Nodes]:
    """A head and further raylets, each of which counts that many CPUs; what they wrote is removed at the end."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # names of sockets may have 107 characters
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(count), str(cpus), folder],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield Nodes(process)
    finally:
        process.communicate(timeout=60)  # closes its input, at which it ends
        shutil.rmtree(folder, ignore_errors=True)


def serve(count: int, cpus: int, folder: Path) -> None:
    from ray.cluster_utils import Cluster

    about = {"num_cpus": cpus, "object_store_memory": 80 * MEGABYTE}
    cluster = Cluster(True, head_node_args={**about, "include_dashboard": False, "temp_dir": str(folder)})
    more = [cluster.add_node(**about) for _ in range(count - 1)]
    print("answer", cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(more.pop(), allow_graceful=False)
        print("answer", "removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
