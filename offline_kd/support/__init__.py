"""What every room may use and that knows nothing of images.

Errors, durable files, folders and buckets, the console, strict descriptions, counter-based random numbers, names that
are imported late.
In: nothing of this package. Out: small functions, and the errors that every room raises.
"""

from typing import TYPE_CHECKING

from offline_kd.support.lazy import lazy

if TYPE_CHECKING:
    from offline_kd.support.console import printable, progress, say, show_table
    from offline_kd.support.counter_rng import counter_hash, counter_uniform, keyed_permutation
    from offline_kd.support.errors import (
        DataError,
        ModelError,
        OfflineKDError,
        RecipeError,
        StoreCorrupt,
        StoreError,
        StoreIncomplete,
        StoreMismatch,
        StoreUnreachable,
        TeacherError,
        TrainingError,
        did_you_mean,
    )
    from offline_kd.support.files import create_exclusively, file_sha256, flush_to_disk, write_atomically
    from offline_kd.support.strict import Strict, fingerprint, parse
    from offline_kd.support.strict_yaml import parse_yaml, read_yaml
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "DataError": "offline_kd.support.errors",
            "ModelError": "offline_kd.support.errors",
            "OfflineKDError": "offline_kd.support.errors",
            "RecipeError": "offline_kd.support.errors",
            "StoreCorrupt": "offline_kd.support.errors",
            "StoreError": "offline_kd.support.errors",
            "StoreIncomplete": "offline_kd.support.errors",
            "StoreMismatch": "offline_kd.support.errors",
            "StoreUnreachable": "offline_kd.support.errors",
            "Strict": "offline_kd.support.strict",
            "TeacherError": "offline_kd.support.errors",
            "TrainingError": "offline_kd.support.errors",
            "counter_hash": "offline_kd.support.counter_rng",
            "counter_uniform": "offline_kd.support.counter_rng",
            "create_exclusively": "offline_kd.support.files",
            "did_you_mean": "offline_kd.support.errors",
            "file_sha256": "offline_kd.support.files",
            "fingerprint": "offline_kd.support.strict",
            "flush_to_disk": "offline_kd.support.files",
            "keyed_permutation": "offline_kd.support.counter_rng",
            "parse": "offline_kd.support.strict",
            "parse_yaml": "offline_kd.support.strict_yaml",
            "printable": "offline_kd.support.console",
            "progress": "offline_kd.support.console",
            "read_yaml": "offline_kd.support.strict_yaml",
            "say": "offline_kd.support.console",
            "show_table": "offline_kd.support.console",
            "write_atomically": "offline_kd.support.files",
        },
    )

__all__ = [
    "DataError",
    "ModelError",
    "OfflineKDError",
    "RecipeError",
    "StoreCorrupt",
    "StoreError",
    "StoreIncomplete",
    "StoreMismatch",
    "StoreUnreachable",
    "Strict",
    "TeacherError",
    "TrainingError",
    "counter_hash",
    "counter_uniform",
    "create_exclusively",
    "did_you_mean",
    "file_sha256",
    "fingerprint",
    "flush_to_disk",
    "keyed_permutation",
    "parse",
    "parse_yaml",
    "printable",
    "progress",
    "read_yaml",
    "say",
    "show_table",
    "write_atomically",
]
