"""Files that another one vouches for: read whole, no longer than they may be, hashed, and asked for twice.

What a network may have changed on its way is asked for again before anything is said about the file, and what is said
then tells which of both it was.
"""

import hashlib

from offline_kd.support.downloads import Downloads
from offline_kd.support.errors import StoreCorrupt, StoreUnreachable
from offline_kd.support.places import Place
from offline_kd.support.web import READ_BYTES

REPAIR = "run `offline-kd store repair`, or copy the store again."
READS = 2  # of what has a sha256, where a network lies between


def read_proven(
    place: Place,
    name: str,
    sha256: str,
    *,
    size: int | None = None,
    limit: int = READ_BYTES,
    downloads: Downloads | None = None,
    remedy: str = REPAIR,
) -> bytes:
    """A file that another one vouches for, or the download of it.

    Args:
        size: in bytes, where it is known; nothing longer is read, whatever lies there.
        limit: where it is not, and at most.
        remedy: what to do about a file that is not what was committed.

    Raises FileNotFoundError, StoreCorrupt for a file that is not what was committed, and StoreUnreachable when it
    arrives differently each time.
    """
    most = limit if size is None else min(size, limit)
    if downloads is not None:
        kept = downloads.get(sha256, most)
        if kept is not None and hashlib.sha256(kept).hexdigest() == sha256:
            return kept
    problems: list[StoreCorrupt] = []
    for _ in range(READS if place.is_remote else 1):
        try:
            content = place.read(name, most)
        except StoreCorrupt as error:  # longer than it may be
            problems.append(error)
            continue
        problem = difference(size, sha256, content)
        if not problem:
            if downloads is not None:
                downloads.put(sha256, content)
            return content
        problems.append(StoreCorrupt(f"{place}/{name}: {problem}: {remedy}"))
    if len({str(one) for one in problems}) > 1:
        raise StoreUnreachable(f"{place}/{name}: {differs(READS)}")
    raise problems[0]


def difference(size: int | None, sha256: str, content: bytes) -> str:
    """How a content is not what was committed; '' if it is."""
    if size is not None and len(content) != size:
        return f"{len(content):,} bytes, committed were {size:,}"
    found = hashlib.sha256(content).hexdigest()
    return "" if found == sha256 else f"sha256 {found}, committed was {sha256}"


def differs(times: int) -> str:
    """Says that so many reads of a file gave as many contents."""
    return (
        f"read {times} times, other bytes each time: a proxy or the network changes them on their way. What lies "
        "there may be whole: run the same command again, or use another connection."
    )
