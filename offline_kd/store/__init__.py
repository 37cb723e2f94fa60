"""A teacher store on disk or in a bucket. Begin with `schema.py`: what it looks like; then `reader.py` and `writer.py`.

In: encoded rows of committed blocks. Out: rows joined with images by key, every byte and every sample checked.
"""

from typing import TYPE_CHECKING

from offline_kd.support.lazy import lazy

if TYPE_CHECKING:
    from offline_kd.store.opening import open_store
    from offline_kd.store.reader import Store
    from offline_kd.store.schema import StoreIdentity, StoreManifest
    from offline_kd.store.sync import copy_store
    from offline_kd.store.verification import Verification
    from offline_kd.support.places import Place, place_at
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Place": "offline_kd.support.places",
            "Store": "offline_kd.store.reader",
            "StoreIdentity": "offline_kd.store.schema",
            "StoreManifest": "offline_kd.store.schema",
            "Verification": "offline_kd.store.verification",
            "copy_store": "offline_kd.store.sync",
            "open_store": "offline_kd.store.opening",
            "place_at": "offline_kd.support.places",
        },
    )

__all__ = [
    "Place",
    "Store",
    "StoreIdentity",
    "StoreManifest",
    "Verification",
    "copy_store",
    "open_store",
    "place_at",
]
