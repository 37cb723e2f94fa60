"""Images in: `data_manifest.yaml` -> proven tars -> blocks of decoded samples. `packing` makes tars.

In: a manifest and the places where its files may lie, or a folder of tars. Out: `ImageBlock`, the samples of one tar,
each with key, label and pixels. Begin with `blocks.py`.
"""

from typing import TYPE_CHECKING

from offline_kd.support.lazy import lazy

if TYPE_CHECKING:
    from offline_kd.data.blocks import BlockLoader, ImageBlock, load_block
    from offline_kd.data.manifest import Manifest, Normalisation, data_roots, load_manifest
    from offline_kd.data.packing import pack
    from offline_kd.data.tars import hash_key, read_tar
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "BlockLoader": "offline_kd.data.blocks",
            "ImageBlock": "offline_kd.data.blocks",
            "Manifest": "offline_kd.data.manifest",
            "Normalisation": "offline_kd.data.manifest",
            "data_roots": "offline_kd.data.manifest",
            "hash_key": "offline_kd.data.tars",
            "load_block": "offline_kd.data.blocks",
            "load_manifest": "offline_kd.data.manifest",
            "pack": "offline_kd.data.packing",
            "read_tar": "offline_kd.data.tars",
        },
    )

__all__ = [
    "BlockLoader",
    "ImageBlock",
    "Manifest",
    "Normalisation",
    "data_roots",
    "hash_key",
    "load_block",
    "load_manifest",
    "pack",
    "read_tar",
]
