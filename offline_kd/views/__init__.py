"""The contract of both stages: which augmentation a sample gets, as explicit numbers, and the pixels that follow.

In: a view spec of a recipe, key hashes, image sizes. Out: view parameters (stored), and their uint8 pixels.
"""

from functools import reduce
from operator import or_
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from offline_kd.views.kind import ViewSpec

# The kinds of views, by the name that recipes and stores use. A row here is all that makes a new file known.
VIEWS: dict[str, type[ViewSpec]] = {
    "none": resolve_name("offline_kd.views.none:NoAugmentation"),
    "pad_crop_flip": resolve_name("offline_kd.views.pad_crop_flip:PadCropFlip"),
    "center_crop": resolve_name("offline_kd.views.center_crop:CenterCrop"),
    "random_resized_crop": resolve_name("offline_kd.views.random_resized_crop:RandomCrop"),
    "imported": resolve_name("offline_kd.views.imported:ImportedCrops"),
}

if TYPE_CHECKING:  # a type checker cannot follow a table
    Views = ViewSpec
else:
    Views = Annotated[reduce(or_, VIEWS.values()), Field(discriminator="kind")]
