"""Work in other threads while this one does its own: an iterator that is run ahead, one that is consumed behind.

A pipeline is written as if it were one loop: generators over generators. `ahead` gives one of them a thread of its own,
`behind` gives one to the function that comes last. Between two threads at most `depth` items are on their way. What a
thread raises comes out where its work is wanted, and whoever stops early waits until the threads have ended.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Abandoned(Exception):
    """Raised in what is consumed behind, when no more will come because the one who puts has failed."""


class _Line(Generic[T]):
    """Items on their way from one thread to another, the oldest first."""

    def __init__(self, depth: int) -> None:
        self.room, self.stopped = threading.Semaphore(depth), threading.Event()
        self.items: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()  # None: no more

    def wait_for_room(self) -> bool:
        """Whether one more item is wanted, when there is room for it."""
        self.room.acquire()
        if self.stopped.is_set():
            self.room.release()  # for whoever asks again
            return False
        return True

    def stop(self) -> None:
        """Nothing more is wanted: whoever waits for room goes on."""
        self.stopped.set()
        self.room.release()

    def taken(self) -> Iterator[T]:
        while (item := self.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            self.room.release()
            yield item[0]


@contextmanager
def ahead(items: Iterator[T], depth: int) -> Iterator[Iterator[T]]:
    """The same items, of which a thread takes up to `depth` before they are asked for.

    What `items` raises is raised where the item is asked for. When the `with` ends, the thread makes no more.
    """
    line = _Line[T](depth)

    def work() -> None:
        try:
            while line.wait_for_room():
                line.items.put((next(items),))
        except StopIteration:
            line.items.put(None)
        except BaseException as error:
            line.items.put(error)
        finally:
            if isinstance(items, Generator):
                items.close()  # here, in the thread that ran it

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        yield line.taken()
    finally:
        line.stop()
        thread.join()


@contextmanager
def behind(consume: Callable[[Iterator[T]], None], depth: int) -> Iterator[Callable[[T], None]]:
    """A function that hands an item over to `consume`, which runs in a thread, up to `depth` items behind.

    It raises what `consume` has raised. When the `with` ends, everything that was handed over has been consumed; where
    it ends with an error, `consume` gets what was handed over before, and then Abandoned.
    """
    line, failed = _Line[T](depth), list[BaseException]()

    def work() -> None:
        try:
            consume(line.taken())
        except Abandoned:
            pass
        except BaseException as error:
            failed.append(error)
            line.stop()

    def put(item: T) -> None:
        if not line.wait_for_room():
            raise failed[0]
        line.items.put((item,))

    thread = threading.Thread(target=work, name="behind", daemon=True)
    thread.start()
    try:
        yield put
        line.items.put(None)
    except BaseException:
        line.items.put(Abandoned())
        raise
    finally:
        thread.join()
    if failed:
        raise failed[0]
