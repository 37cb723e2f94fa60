"""One stored object <-> one chunk of an array: the core zarr codecs that `schema.create_array` declares, by themselves.

Coding follows the schema, never metadata on disk, and an object that would unpack to anything but the size of its chunk
is refused before it is unpacked.
"""

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

from offline_kd.store.layout import ArraySpec
from offline_kd.support.errors import StoreCorrupt

ZSTD_MAGIC = bytes.fromhex("28b52ffd")


def encode_chunk(spec: ArraySpec, chunk: NDArray[np.generic]) -> bytes:
    """The object for a whole chunk `[*spec.chunks]`; zarr reads it."""
    packed = bytes(_packer(spec).encode(np.ascontiguousarray(chunk, dtype=spec.dtype)))
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


def decode_chunk(spec: ArraySpec, content: bytes, where: str) -> NDArray[np.generic]:
    """The chunk in an object; raises StoreCorrupt when the object is not one."""
    packed, crc = content[:-4], int.from_bytes(content[-4:], "little")
    problem = ""
    if len(content) < 16:
        problem = f"{len(content)} bytes are no object of a store"
    elif (found := google_crc32c.value(packed)) != crc:
        problem = f"its crc32c is {found:08x}, written was {crc:08x}"
    elif (declared := _unpacked_bytes(spec, packed)) != spec.chunk_bytes:
        problem = f"it unpacks to {declared} bytes, its chunk has {spec.chunk_bytes:,}"
    else:
        try:
            chunk = np.empty(spec.chunks, dtype=spec.dtype)
            _packer(spec).decode(packed, chunk)
            return chunk
        except (RuntimeError, ValueError) as error:
            problem = f"it cannot be unpacked ({error})"
    raise StoreCorrupt(f"{where}: {problem}. Copy the store again, or `offline-kd store repair` it.")


def _packer(spec: ArraySpec) -> numcodecs.abc.Codec:
    if np.dtype(spec.dtype).itemsize == 1:
        return numcodecs.Zstd(level=1)
    return numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE)


def _unpacked_bytes(spec: ArraySpec, packed: bytes) -> int | None:
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
