"""Files of `torch.save` that hold numbers, read without running anything that stands in them.

Such a file is a zip with one pickle, and a pickle may call whatever it likes. Here it may call three functions, which
are not the ones that it names but those below: they make arrays of numbers, and nothing else. Older files, which are no
zip, are refused.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offline_kd.cache.foreign.answers import MOST_BYTES
from offline_kd.support.errors import DataError

NUMBERS = ("b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


class _Dtype:
    """A type of numbers; pickles give its name first and its byte order afterwards."""

    def __init__(self, name: object, *_: object) -> None:
        if name not in NUMBERS:
            raise pickle.UnpicklingError(f"arrays of {name!r:.40}, which are no numbers")
        self.dtype: np.dtype[np.generic] = np.dtype(str(name))

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """An array, which is empty until its state came."""

    def __init__(self, *_: object) -> None:
        self.numbers: NDArray[np.generic] = np.empty(0)

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _Dtype(dtype=dtype), bool() as by_columns, bytes() as content):
                sides = [side for side in shape if isinstance(side, int) and side >= 0]
                if len(sides) == len(shape) and math.prod(sides) * dtype.itemsize == len(content):
                    flat = np.frombuffer(content, dtype=dtype)
                    self.numbers = flat.reshape(sides, order="F" if by_columns else "C")
                    return
        raise pickle.UnpicklingError("an array whose bytes do not fit its shape")


def _bytes(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes that are not written as numpy writes them")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,  # named as what is to be made
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _bytes,
}


class _Plain(pickle.Unpickler):
    """Reads built-in values and arrays of numbers."""

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which is not run")
        return ALLOWED[module, name]

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("holds tensors, where numbers are expected")


def read_plain(content: bytes, where: str) -> object:
    """What a file of `torch.save` holds: lists, tuples, mappings, numbers and text as they are, arrays as `_Array`.

    Raises DataError for a file that is damaged, packed, or asks for more.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (member,) = [one for one in archive.infolist() if one.filename.endswith("/data.pkl")]
            if member.file_size > MOST_BYTES:
                raise ValueError(f"{member.file_size:,} bytes, more than {MOST_BYTES:,}")
            return _Plain(io.BytesIO(archive.read(member))).load()
    except Exception as error:  # damaged pickles raise whatever they like
        packed = " It is packed with gzip: unpack it first." if content[:2] == b"\x1f\x8b" else ""
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{where}: not readable as a file of torch.save with numbers: {why}.{packed}") from error


def numbers_of(value: object, where: str, what: str) -> NDArray[np.float64]:
    """An array, a number, or lists of numbers, in float64; raises DataError for anything else."""
    found = value.numbers if isinstance(value, _Array) else value
    try:
        numbers = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: {what} are {found!r:.80}, which are no numbers.") from None
    return numbers


def itemsize(value: object) -> int:
    """Bytes of one number of an array; 8 for everything else."""
    return value.numbers.itemsize if isinstance(value, _Array) else 8
