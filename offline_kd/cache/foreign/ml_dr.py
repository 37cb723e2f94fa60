"""ml-dr (Faghri et al. 2023, arXiv:2303.08983): a reinforced dataset of `reinforce.py`, a file for every image.

`FOLDER/N.pth.tar` is no tar: torch has saved `(N, views)` in it, N being the place of the image in the dataset. A view
has `prob`, which are probabilities and their classes, and `params` of the transforms that `FOLDER/config.pth.tar`
names: a mapping of name to the image's own and a partner's, or, compressed, a list of its own in the order of
TRANSFORMS.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offline_kd.cache.foreign.answers import Answers, Sample, checked, crops, erased_boxes, read_file, views_taken
from offline_kd.cache.foreign.plain import numbers_of, read_plain
from offline_kd.support.errors import DataError, shorten
from offline_kd.views.augment import codes_of
from offline_kd.views.imported import ImportedCrops

CONFIG = "config.pth.tar"
# As compressed parameters are ordered; True where a transform has some.
TRANSFORMS = {
    "uint8": False,
    "random_resized_crop": True,
    "random_horizontal_flip": True,
    "rand_augment": True,
    "to_tensor": False,
    "random_erase": True,
    "normalize": False,
}
MIXES = ("mixup", "cutmix")
# Their operations in the order of their numbers, by the name of ours. Theirs take the nearest pixel, black outside.
OPERATIONS = {
    "Identity": "identity",
    "ShearX": "shear_x_nearest",
    "ShearY": "shear_y_nearest",
    "TranslateX": "translate_x_nearest",
    "TranslateY": "translate_y_nearest",
    "Rotate": "rotate_nearest",
    "Brightness": "brightness",
    "Color": "color",
    "Contrast": "contrast",
    "Sharpness": "sharpness",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
}
AROUND_ONE = ("Brightness", "Color", "Contrast", "Sharpness")  # whose magnitude is what the factor differs from 1
OF_SIDE = ("TranslateX", "TranslateY")  # in pixels of the view
LOST = [
    "logits: only the probabilities of the likeliest classes are kept, and what is left for all others together",
    "the teacher's weights: the configuration names its networks",
]


@dataclass
class MLDR:
    """A folder of reinforcements."""

    where: str
    folder: Path
    views: ImportedCrops
    k: int
    transforms: list[str]  # that have parameters, in their order
    files: int
    in_listed_order: bool  # numbers are places in a list of keys, which may have fewer
    num_classes: int | None
    teacher: str
    temperature: int = 1
    is_numbered: bool = True
    name: str = "ml-dr"
    lost: list[str] = field(default_factory=lambda: list(LOST))

    def content(self, sample: Sample) -> bytes:
        """The file of the sample's number."""
        file = self.folder / f"{sample.number}.pth.tar"
        if not file.is_file():
            raise DataError(
                f"{file}: missing, which should be about sample '{sample.key}'. Give the dataset that the labels were "
                "made of, or --keys with its keys in their order."
            )
        return read_file(file)

    def answers(self, content: bytes, sample: Sample, num_classes: int) -> Answers:
        """Raises DataError for the file of another number, and for what the configuration does not explain."""
        where = f"{self.folder / str(sample.number)}.pth.tar"
        if self.num_classes not in (None, num_classes):
            raise DataError(
                f"{self.where}: was made for {self.num_classes} classes, the dataset has {num_classes}. Give the "
                "dataset that it was made of."
            )
        number, views = _views(content, where)
        if number != sample.number or len(views) < self.views.count:
            raise DataError(
                f"{where}: speaks of image {number} with {len(views)} views, expected is image {sample.number} with at "
                f"least {self.views.count}. Copy it again."
            )
        some = [_of_view(one, where) for one in views[: self.views.count]]
        probabilities, ids = (
            numbers_of([one[place] for _, one in some], where, "probabilities and classes") for place in (0, 1)
        )
        if ids.shape != (len(some), self.k) or probabilities.shape != ids.shape:
            raise DataError(f"{where}: does not have {self.k} classes in every view. It is damaged: copy it again.")
        parameters = [_named(one, self.transforms, where) for one, _ in some]
        box = numbers_of([one["random_resized_crop"] for one in parameters], where, "crops").astype(np.int64)
        flip = numbers_of([one.get("random_horizontal_flip", False) for one in parameters], where, "flips") != 0
        if box.shape != (len(some), 4) or flip.shape != (len(some),):
            raise DataError(f"{where}: crops of shape {list(box.shape)}. It is damaged: copy it again.")
        told = Answers(crops(box, flip, self._more(parameters, where)), ids.astype(np.int64), probabilities)
        return checked(where, sample, told, num_classes)

    def _more(self, parameters: Sequence[Mapping[str, object]], where: str) -> dict[str, NDArray[np.generic]]:
        """Operations and erased boxes, `[v, ...]` by array."""
        more: dict[str, NDArray[np.generic]] = {}
        if self.views.num_ops:
            ops = [_operations(one.get("rand_augment"), self.views, where) for one in parameters]
            more["op"] = np.array([[code for code, _ in one] for one in ops], dtype=np.uint8)
            more["magnitude"] = np.array([[magnitude for _, magnitude in one] for one in ops], dtype=np.float32)
        if self.views.erase:
            boxes = [one.get("random_erase") or (0, 0, 0, 0) for one in parameters]
            box, size = numbers_of(boxes, where, "erased boxes").astype(np.int64), self.views.size
            box[box[:, 0] == -1] = 0
            if box.shape != (len(boxes), 4) or (box < 0).any() or (box[:, :2] + box[:, 2:] > size).any():
                raise DataError(f"{where}: erases a box outside of {size}x{size} pixels. It is damaged: copy it again.")
            more["erase"] = erased_boxes(box, size)
        return more

    def problem_of_count(self, samples: int) -> str:
        """Numbers mean nothing where the dataset has another count."""
        if samples == self.files or self.in_listed_order:
            return ""
        return (
            f"holds {self.files:,} files, the dataset {samples:,} images: numbers of files are places in a dataset, so "
            "both must be the same. Give the dataset that it was made of, or --keys with its keys in their order."
        )


def open_ml_dr(source: Path, num_views: int | None, in_listed_order: bool) -> MLDR:
    """The reinforcements in a folder, as its configuration says.

    Args:
        num_views: how many of the views of every image are taken, the first ones; None: all.
        in_listed_order: whether somebody says which image every number is.

    Raises DataError where there are none, and for transforms that our views do not have.
    """
    folder = source / "reinforced_data" if os.path.isfile(source / "reinforced_data" / CONFIG) else source
    if not os.path.isfile(folder / CONFIG):
        raise DataError(
            f"{shorten(str(source))}: has no {CONFIG}. Give the folder with it and N.pth.tar of every image."
        )
    where = str(folder / CONFIG)
    config = read_plain(read_file(folder / CONFIG), where)
    reinforce = _mapping(_mapping(config, where).get("reinforce"), where)
    augmentation = _mapping(reinforce.get("image_augmentation"), where)
    enabled = {name: one for name, one in augmentation.items() if _mapping(one, where).get("enable", True)}
    size, num_ops = _refuse_other_transforms(enabled, where)
    first = next((file for file in folder.glob("[0-9]*.pth.tar")), None)
    if first is None:
        raise DataError(f"{folder}: has no N.pth.tar. Give the unpacked folder with a file for every image.")
    _, views = _views(read_file(first), str(first))
    _, prob = _of_view(views[0], str(first))
    about: dict[str, object] = {"num_ops": num_ops, "operations": list(OPERATIONS.values())} if num_ops else {}
    spec = {"size": size, "erase": "random_erase" in enabled, "count": views_taken(num_views, len(views), str(first))}
    known, teacher = _mapping(config, where).get("num_classes"), _mapping(config, where).get("teacher")
    return MLDR(
        where=str(source),
        folder=folder,
        views=ImportedCrops.model_validate({"kind": "imported", **spec, **about}),
        k=numbers_of(prob[1], str(first), "classes").size,
        transforms=[name for name, has_some in TRANSFORMS.items() if has_some and name in enabled],
        files=sum(1 for _ in folder.glob("[0-9]*.pth.tar")),
        in_listed_order=in_listed_order,
        num_classes=known if isinstance(known, int) else None,
        teacher=str(teacher.get("name", "") if isinstance(teacher, dict) else "")[:200],
    )


def _refuse_other_transforms(enabled: Mapping[str, object], where: str) -> tuple[int, int]:
    """Side of a view and operations of it; raises DataError for transforms that our views do not have."""
    if mixes := [name for name in MIXES if name in enabled]:
        raise DataError(
            f"{where}: {' and '.join(mixes)} with any view of any image, which cannot be imported: our views are mixed "
            "with the same view of an image of the same tar. Import reinforcements without mixing."
        )
    strange = sorted(set(enabled) - set(TRANSFORMS))
    if strange or "random_resized_crop" not in enabled:
        raise DataError(
            f"{where}: views are made by {', '.join(sorted(enabled))}. What can be imported is random_resized_crop "
            f"with any of {', '.join(name for name in TRANSFORMS if name != 'random_resized_crop')}."
        )
    crop, augment = (_mapping(enabled.get(name, {}), where) for name in ("random_resized_crop", "rand_augment"))
    if other := sorted({"interpolation", "fill"} & {*crop, *augment}):
        raise DataError(f"{where}: sets {' and '.join(other)} of transforms, which is not replayed here.")
    size, num_ops = crop.get("size"), augment.get("num_ops", 2)
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len({*sides}) != 1 or not isinstance(sides[0], int) or not isinstance(num_ops, int):
        raise DataError(f"{where}: crops of size {size!r:.40}; views here are squares of one size.")
    return sides[0], num_ops if "rand_augment" in enabled else 0


def _mapping(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{where}: holds {value!r:.60} instead of a mapping. Is it the {CONFIG} of reinforce.py?")
    return value


def _views(content: bytes, where: str) -> tuple[int, Sequence[object]]:
    """The number of the image, and its views."""
    match read_plain(content, where):
        case (int() as number, [_, *_] as views):
            return number, views
    raise DataError(f"{where}: does not hold the number of an image and its views, as ml-dr's files do.")


def _of_view(view: object, where: str) -> tuple[object, Sequence[object]]:
    """Parameters; probabilities and classes."""
    match view:
        case {"params": params, "prob": [_, _] as prob}:
            return params, prob
    raise DataError(f"{where}: a view does not have params and the likeliest classes (prob), as ml-dr's files do.")


def _named(params: object, transforms: Sequence[str], where: str) -> dict[str, object]:
    """The image's own parameters by transform; the partner's, which nothing mixes in, are left."""
    own: dict[str, object] = {}
    if isinstance(params, list) and len(params) == len(transforms):
        own = dict(zip(transforms, params, strict=True))
    elif isinstance(params, dict):
        own = {name: one[0] for name in transforms if isinstance(one := params.get(name), list | tuple) and one}
    if len(own) != len(transforms):
        raise DataError(f"{where}: params of a view are {params!r:.100}, {CONFIG} names {', '.join(transforms)}.")
    return own


def _operations(applied: object, views: ImportedCrops, where: str) -> list[tuple[int, float]]:
    """Code and magnitude, in the unit of ours, for each place; the identity where none was applied."""
    if applied is None:
        return [(0, 0.0)] * views.num_ops
    found = []
    for one in applied if isinstance(applied, list) else [None]:
        match one:
            case (str() | int() as which, int() | float() as magnitude):
                names = list(OPERATIONS)
                name = names[which] if isinstance(which, int) and 0 <= which < len(names) else str(which)
                if name in OPERATIONS:
                    found.append((codes_of([OPERATIONS[name]])[0], _in_our_unit(name, float(magnitude), views.size)))
    if len(found) != views.num_ops or not np.isfinite([magnitude for _, magnitude in found]).all():
        raise DataError(
            f"{where}: operations {applied!r:.100}, expected are {views.num_ops} of {', '.join(OPERATIONS)}."
        )
    return found


def _in_our_unit(name: str, magnitude: float, size: int) -> float:
    if name in AROUND_ONE:
        return 1 + magnitude
    return int(magnitude) / size if name in OF_SIDE else magnitude
