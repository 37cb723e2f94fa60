"""What an interrupted `data index` has found: a line a tar, in a file beside the manifest until the index is written.

A tar is not read again while it is in the state in which it was read: of a file size, times and inode, which change
with whatever replaces it or is written into it; of an object in a bucket size and ETag. Of a web address nothing is
known.
"""

import base64
import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from offline_kd.data.indexing import TarFacts, state_of

AT_ONCE = 32  # tars whose state is asked for


def read_journal(journal: Path, location: str, files: Sequence[str], rule: str) -> list[TarFacts]:
    """What the journal says of these tars, as far as they are in the state in which they were read."""
    try:
        lines = journal.read_bytes().splitlines()
    except OSError:
        return []
    read: dict[str, TarFacts] = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be cut
            said = json.loads(line)
            if said["about"] == [location, rule]:
                keys = np.frombuffer(base64.b64decode(said["keys"]), dtype="<u8").astype(np.uint64)
                labels: Counter[int | str] = Counter(dict(said["labels"]))
                file, left_out, state = said["file"], said["left_out"], said["state"]
                read[file] = TarFacts(file, said["bytes"], said["sha256"], keys, labels, left_out, state)
    noted = [read[file] for file in files if file in read]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        states = threads.map(lambda tar: state_of(location, tar.file), noted)
        return [tar for tar, state in zip(noted, states, strict=True) if tar.state == state]


def append_to_journal(journal: Path, location: str, rule: str, tar: TarFacts) -> None:
    """Note what a tar holds, unless nothing would show that it was changed."""
    if not tar.state:
        return
    said = {
        "about": [location, rule],
        "file": tar.file,
        "state": tar.state,
        "bytes": tar.bytes,
        "sha256": tar.sha256,
        "keys": base64.b64encode(tar.key_hash.astype("<u8").tobytes()).decode(),
        "labels": list(tar.labels.items()),
        "left_out": tar.left_out,
    }
    with journal.open("ab", buffering=0) as file:
        file.write(json.dumps(said).encode() + b"\n")
        os.fsync(file.fileno())
