"""One stored object <-> one chunk of an array: the core zarr codecs that `schema.create_array` declares, by themselves.

Coding follows the schema, never metadata on disk, and an object that would unpack to anything but the size of its chunk
is refused before it is unpacked.
"""

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

from offline_kd.store.codecs.rans import LENGTH_BYTES
from offline_kd.store.layout import ArraySpec
from offline_kd.support.errors import StoreCorrupt

MAX_BLOSC_BLOCK = 2**22  # bytes that are unpacked together, which cost three times as much in each thread
PIECE_BYTES = 2**20
ZSTD_MAGIC = bytes.fromhex("28b52ffd")


def encode_chunk(spec: ArraySpec, chunk: NDArray[np.generic]) -> bytes:
    """The object for a whole chunk `[*spec.chunks]`; zarr reads it."""
    chunk = np.ascontiguousarray(chunk, dtype=spec.dtype)
    packed = bytes(_packer(spec).encode(_closed_up(chunk) if spec.ragged else chunk))
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


def decode_chunk(spec: ArraySpec, content: bytes, where: str) -> NDArray[np.generic]:
    """The chunk in an object; raises StoreCorrupt when the object is not one."""
    packed, crc = memoryview(content)[:-4], int.from_bytes(content[-4:], "little")
    problem = ""
    if len(content) < 16:
        problem = f"{len(content)} bytes are no object of a store"
    elif (found := _crc(content)) != crc:
        problem = f"its crc32c is {found:08x}, written was {crc:08x}"
    elif (declared := _unpacked_bytes(spec, packed)) != spec.chunk_bytes:
        problem = f"it unpacks to {declared} bytes, its chunk has {spec.chunk_bytes:,}"
    elif np.dtype(spec.dtype).itemsize > 1 and int.from_bytes(packed[8:12], "little") > MAX_BLOSC_BLOCK:
        problem = f"its parts unpack to more than {MAX_BLOSC_BLOCK:,} bytes each"
    else:
        try:
            chunk = np.empty(spec.chunks, dtype=spec.dtype)
            _packer(spec).decode(packed, chunk)
            return _spread(chunk) if spec.ragged else chunk
        except (RuntimeError, ValueError) as error:
            problem = f"it cannot be unpacked ({error})"
    raise StoreCorrupt(f"{where}: {problem}. Copy the store again, or `offline-kd store repair` it.")


def _closed_up(chunk: NDArray[np.generic]) -> NDArray[np.generic]:
    """A chunk of the same shape, in which rows `[..., b]` of a length, as many bytes, and zeros lie close together.

    First are the lower bytes of all lengths, then the higher ones, then what the rows have, one after the other.
    """
    rows, closed_up = chunk.reshape(-1, chunk.shape[-1]), np.zeros(chunk.size, dtype=np.uint8)
    lengths, content = np.split(closed_up, [LENGTH_BYTES * len(rows)])
    lengths[...] = rows[:, :LENGTH_BYTES].T.ravel()
    used = _used(rows)
    content[: np.count_nonzero(used)] = rows[:, LENGTH_BYTES : LENGTH_BYTES + used.shape[1]][used]
    return closed_up.reshape(chunk.shape)


def _spread(chunk: NDArray[np.generic]) -> NDArray[np.generic]:
    """What `_closed_up` was given; raises ValueError for what it never makes."""
    rows = np.zeros((chunk.size // chunk.shape[-1], chunk.shape[-1]), dtype=np.uint8)
    lengths, content = np.split(chunk.ravel(), [LENGTH_BYTES * len(rows)])
    rows[:, :LENGTH_BYTES] = lengths.reshape(LENGTH_BYTES, -1).T
    used = _used(rows)
    rows[:, LENGTH_BYTES : LENGTH_BYTES + used.shape[1]][used] = content[: np.count_nonzero(used)]
    return rows.reshape(chunk.shape)


def _used(rows: NDArray[np.generic]) -> NDArray[np.bool_]:
    """`[n, longest]`: which bytes behind its length a row of `[n, b]` has; raises ValueError where it has no room."""
    lengths = np.ascontiguousarray(rows[:, :LENGTH_BYTES]).view("<u2")
    longest = int(lengths.max(initial=0))
    if longest > rows.shape[1] - LENGTH_BYTES:
        raise ValueError(f"{longest} bytes and their number do not fit into a row of {rows.shape[1]}")
    return np.arange(longest, dtype=np.uint16) < lengths


def _crc(content: bytes) -> int:
    """Of all but the last four bytes, by pieces: a second copy of the whole would be one too many."""
    crc, end = 0, len(content) - 4
    for start in range(0, end, PIECE_BYTES):
        crc = google_crc32c.extend(crc, content[start : min(start + PIECE_BYTES, end)])
    return crc


def most_object_bytes(spec: ArraySpec) -> int:
    """What an object of this array can have at most: a little more than its chunk, when nothing can be packed."""
    return spec.chunk_bytes + spec.chunk_bytes // 128 + 1024


def _packer(spec: ArraySpec) -> numcodecs.abc.Codec:
    if np.dtype(spec.dtype).itemsize == 1:
        return numcodecs.Zstd(level=1)
    return numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE)


def _unpacked_bytes(spec: ArraySpec, packed: memoryview) -> int | None:
    """What the header of a blosc buffer or a zstd frame says of the size of its content."""
    if np.dtype(spec.dtype).itemsize > 1:
        return int.from_bytes(packed[4:8], "little")
    if packed[:4] != ZSTD_MAGIC:
        return None
    descriptor = packed[4]
    single_segment = bool(descriptor & 0x20)
    size_bytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3]
    if not size_bytes:
        return None
    return int.from_bytes(packed[start : start + size_bytes], "little") + (256 if size_bytes == 2 else 0)
