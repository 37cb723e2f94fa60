"""Files of a store, read whole and never believed: no longer than they may be, and hashed.

What a network may have changed on its way is asked for again before anything is said about the store, and what is said
then tells which of both it was.
"""

import hashlib

from offline_kd.support.errors import StoreUnreachable
from offline_kd.support.places import Place
from offline_kd.support.proven import differs

IDENTITY_BYTES = 2**25  # store.json: as many tars as there may be
MANIFEST_BYTES = 3 * 2**23  # manifest.json: before schema 4, of 240,000 ledger entries
CARD_BYTES = 2**26  # README.md and index.html with the pictures of many teachers
ENTRY_BYTES = 2**22  # a ledger entry: thousands of bad images that are named in it
ADDITION_BYTES = 2**17
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
    raise StoreUnreachable(f"{place}/{name}: {differs(READS_TO_AGREE)}")
