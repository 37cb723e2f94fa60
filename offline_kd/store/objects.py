"""Files of a store, read whole and never believed: no longer than they may be, and hashed.

What a network may have changed on its way is asked for again before anything is said about the store, and what is said
then tells which of both it was.
"""

import hashlib

from offline_kd.store.downloads import Downloads
from offline_kd.store.places import Place
from offline_kd.support.errors import StoreCorrupt, StoreUnreachable

REPAIR = "run `offline-kd store repair`, or copy the store again."
IDENTITY_BYTES = 2**23  # store.json: 40,000 tars and more
MANIFEST_BYTES = 3 * 2**23  # manifest.json: 240,000 ledger entries; what it lists beside the ledger is smaller
CARD_BYTES = 2**26  # README.md and index.html with the pictures of many teachers
ENTRY_BYTES = 2**22  # a ledger entry: thousands of bad images that are named in it
ADDITION_BYTES = 2**17
READS = 2  # of what has a sha256, where a network lies between
READS_TO_AGREE = 4


def metadata_limit(name: str) -> int:
    """How many bytes a file that no other vouches for may have."""
    if name.startswith("ledger/"):
        return ENTRY_BYTES
    if name.startswith("additions/"):
        return ADDITION_BYTES
    if name.endswith((".md", ".html")):
        return CARD_BYTES
    return IDENTITY_BYTES if name == "store.json" else MANIFEST_BYTES


def read_metadata(place: Place, name: str) -> bytes:
    """A file whose sha256 is not known. From afar it is read until two answers agree.

    Raises FileNotFoundError, StoreCorrupt for one that is too long, StoreUnreachable when no two answers agree.
    """
    limit = metadata_limit(name)
    if not place.is_remote:
        return place.read(name, limit)
    seen: set[str] = set()
    for _ in range(READS_TO_AGREE):
        content = place.read(name, limit)
        found = hashlib.sha256(content).hexdigest()
        if found in seen:
            return content
        seen.add(found)
    raise StoreUnreachable(f"{place}/{name}: {_differs(READS_TO_AGREE)}")


def read_proven(
    place: Place,
    name: str,
    sha256: str,
    *,
    size: int | None = None,
    limit: int = MANIFEST_BYTES,
    downloads: Downloads | None = None,
) -> bytes:
    """A file that another one vouches for, or the download of it.

    Args:
        size: in bytes, where it is known; nothing longer is read, whatever lies there.
        limit: where it is not, and at most.

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
        problems.append(StoreCorrupt(f"{place}/{name}: {problem}: {REPAIR}"))
    if len({str(one) for one in problems}) > 1:
        raise StoreUnreachable(f"{place}/{name}: {_differs(READS)}")
    raise problems[0]


def difference(size: int | None, sha256: str, content: bytes) -> str:
    """How a content is not what was committed; '' if it is."""
    if size is not None and len(content) != size:
        return f"{len(content):,} bytes, committed were {size:,}"
    found = hashlib.sha256(content).hexdigest()
    return "" if found == sha256 else f"sha256 {found}, committed was {sha256}"


def _differs(times: int) -> str:
    return (
        f"read {times} times, other bytes each time: a proxy or the network changes them on their way. The store may "
        "be whole: run the same command again, or use another connection."
    )
