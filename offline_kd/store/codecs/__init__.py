"""How logits lie in a store: one file per codec, and CODECS, by which recipes and stores know them.

| codec | bytes of a row of C classes, before entropy coding | largest error of a logit |
|---|---|---|
| f32 | 4 C | 0 |
| f16 | 2 C | 2**-11 of its size (below 2**-14: 2**-25) |
| int, b bits, the m largest apart | C codes of b bits in bytes, 8, and 4 m | half a step: (max - min) of the others
  / (2**(b + 1) - 2), - 4 for 8 bits; the m largest have the error of f16, and for m = 0 the largest is exact |
| klt | a tenth of 2 C, or less: see `klt.py`; needs tables | not bounded, measured |
| klt_means | half of klt, or less, where a view group has several views: see `klt_means.py`; needs tables | measured |
| topk | 4 k + 12 | the k largest: that of f16; the others share what is left evenly, so not bounded |
| last_layer | those of features, of D numbers: see `last_layer.py`; needs tables | not bounded, measured |
| none | 0: of teachers without classes, whose features are kept | there are no logits |

A codec of your own is a file here and a line below: `docs/extending/codec.md`.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from offline_kd.store.codecs.codec import CODEC_TABLES, Codec
from offline_kd.support.lazy import load_class

# Name in recipes and stores, and where the class is: file of this folder, and name in it. `bench codecs` and `auto` try
# them in this order.
CLASSES = {
    "f32": "f32.Float32",
    "f16": "f16.Float16",
    "int": "int_.Int",
    "klt": "klt.Klt",
    "klt_means": "klt_means.KltMeans",
    "topk": "topk.TopK",
    "last_layer": "last_layer.LastLayer",
    "none": "none.NoLogits",
}


CODECS: dict[str, type[Codec]] = {name: load_class(__name__, where) for name, where in CLASSES.items()}

if TYPE_CHECKING:
    AnyCodec = Codec
else:
    # The type of a field that holds any of them: which, its `name` says.
    AnyCodec = Annotated[reduce(or_, CODECS.values()), Field(discriminator="name")]

__all__ = ["CODECS", "CODEC_TABLES", "AnyCodec", "Codec"]
