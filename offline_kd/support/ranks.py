"""The processes that train one student together, as torchrun starts them: ranks.

A process alone is rank 0 of 1, and everything here costs it nothing. All ranks must make the same calls in the same
order: each waits for the others.
"""

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F

from offline_kd.support.console import console
from offline_kd.support.errors import OfflineKDError, TrainingError

T = TypeVar("T")
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells its processes, beside WORLD_SIZE
LOST = ("gloo", "nccl", "connection closed", "connection reset")  # in what torch says when another rank has ended
ANOTHER_ENDED = "another rank has ended; it or torchrun says why"
_meetings = itertools.count()


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is."""
    return dist.get_rank() if world() > 1 else 0


# ---- beginning and end ---------------------------------------------------------------------------------------------


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Meet the other processes that torchrun has started, if there are any; rank 0 alone says what is going on.

    Where the caller has made a process group, that is used. After a failure the group is left as it is, because taking
    it down would wait for the others: the process should end, and does at once after a bug, with its traceback.

    Raises TrainingError when WORLD_SIZE is above 1 and torchrun did not set it, or when another rank has ended.
    """
    if os.environ.get("WORLD_SIZE", "").strip() in ("", "1") or dist.is_initialized():
        yield
        return
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} not set: start several processes with "
            "torchrun, or unset WORLD_SIZE."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # Tensors of the CPU travel over gloo in either case: what is counted there need not wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, own, others = next(rendezvous("env://"))
        # Under a name of its own: addresses of earlier meetings, and of processes that were killed, are left there.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        named = PrefixStore(f"offline-kd {restart} {next(_meetings)}", store)
        dist.init_process_group(backend, store=named, rank=own, world_size=others)
        console.quiet = rank() > 0
        yield
        dist.barrier()
        dist.destroy_process_group()
    except OfflineKDError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST):
            raise TrainingError(f"{ANOTHER_ENDED}. The same command goes on.") from error
        traceback.print_exc()
        end_at_once_among_others()
        raise
    finally:
        console.quiet = False


def end_at_once_among_others() -> None:
    """End a failed rank with exit status 1, so that torchrun ends the others. Alone, do nothing.

    Python's own way out would wait for threads that wait for the other ranks.
    """
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# ---- small things, as Python objects -------------------------------------------------------------------------------


def from_first(find: Callable[[], T]) -> T:
    """What `find` gives on rank 0, on every rank: the others do not call it."""
    if world() == 1:
        return find()
    found = [find() if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return cast(T, found[0])


def of_all(value: T) -> list[T]:
    """The value of every rank, on every rank."""
    values: list[Any] = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


# ---- tensors -------------------------------------------------------------------------------------------------------


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of rank 0."""
    for tensor in tensors if world() > 1 else ():
        dist.broadcast(tensor, src=0)


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks, with gradient: a rank's tensor counts in the values of all of them."""
    return cast(Tensor, _Total.apply(tensor)) if world() > 1 else tensor


def whole_batch(tensor: Tensor) -> Tensor:
    """`[b, C]` rows of every rank -> `[B, C]`, those of all ranks in their order, with gradient as `total`."""
    if world() == 1:
        return tensor
    rows = of_all(len(tensor))
    return total(F.pad(tensor, (0, 0, sum(rows[: rank()]), sum(rows[rank() + 1 :]))))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Total.apply(gradient)
