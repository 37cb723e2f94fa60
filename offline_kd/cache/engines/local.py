"""Blocks in this process, one after the other, the next being read; shared with any other writers by leases."""

import time
from collections.abc import Iterator, Sequence

from offline_kd.cache.job import Capture
from offline_kd.cache.work import Work, capture_blocks, open_work, read_blocks
from offline_kd.store.leases import POLL_SECONDS, Leases, leases_at
from offline_kd.support.console import progress, say
from offline_kd.support.overlap import ahead

BLOCKS_AHEAD = 1  # read, and leased, while others are rendered; worker processes may have read more


def run(capture: Capture, addition: str, blocks: Sequence[int]) -> None:
    """Do the blocks that no other writer works on, and wait for the others: they are taken over if a writer dies."""
    work = open_work(capture, addition, blocks)
    workers, waiting = capture.recipe.data.workers, False
    with leases_at(capture.place) as leases, progress("teacher", work.open_views, "views") as meter:

        def still_mine(number: int) -> bool:
            return leases.is_mine(_lease(work, number))

        def done(number: int) -> None:
            leases.release(_lease(work, number))

        while True:
            with ahead(read_blocks(capture.loader, _claimed(work, leases), workers), BLOCKS_AHEAD) as read:
                capture_blocks(work, read, still_mine, meter.advance, done)
            if not any(work.open_groups(block) for block in blocks):
                return
            if not waiting:
                say(f"{capture.place}: the blocks that are left are being done by other writers: waiting for them")
            workers, waiting = 0, True
            time.sleep(POLL_SECONDS)


def _claimed(work: Work, leases: Leases) -> Iterator[int]:
    """The blocks of which something is open and nobody has the lease: now it is ours."""
    for block in work.blocks:
        if work.known_done(block):
            continue
        lease = _lease(work, block)
        if work.open_groups(block) and leases.claim(lease):
            if work.open_groups(block):
                yield block
            else:
                leases.release(lease)


def _lease(work: Work, block: int) -> str:
    return f"{work.part.name or 'block'}-{block:06d}"
