"""Splits and classes of a folder of pictures, made where it has none or too many."""

from dataclasses import replace

from offline_kd.data.folders import Photos
from offline_kd.data.tars import hash_key

HELD_OUT = 5  # one of so many pictures, where a folder has no splits


def without_empty_classes(photos: Photos) -> Photos:
    """The same pictures without the classes that have none in any split."""
    known = {picture.class_name for pictures in photos.splits.values() for picture in pictures}
    return replace(photos, classes=[name for name in photos.classes if name in known])


def split_by_key(photos: Photos) -> Photos:
    """One split made two, `train` and `val`: a picture's key says where it is, so that it stays there.

    About one of HELD_OUT pictures is in val, at least one of every class of two or more. The same file under two names
    lies in one split.
    """
    (pictures,) = photos.splits.values()
    keys: dict[bytes, str] = {}
    for picture in sorted(pictures, key=lambda one: one.key):
        keys.setdefault(picture.sha256, picture.key)
    held_out = {content for content, key in keys.items() if hash_key(key) % HELD_OUT == 0}
    for name in photos.classes:
        own = sorted(
            {one.sha256 for one in pictures if one.class_name == name}, key=lambda content: hash_key(keys[content])
        )
        if len(own) > 1 and not held_out.intersection(own):
            held_out.add(own[0])
        if own and held_out.issuperset(own):
            held_out.discard(own[-1])
    train = [one for one in pictures if one.sha256 not in held_out]
    val = [one for one in pictures if one.sha256 in held_out]
    return replace(photos, splits={"train": train, "val": val})
