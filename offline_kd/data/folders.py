"""Folders of pictures as people have them: which files are pictures, of which class and split, and which are bad.

`folder/SPLIT/CLASS/**/IMAGE` holds several splits, `folder/CLASS/**/IMAGE` one, and so does a folder beside which a
table says the class of every file. Hidden files and folders, `__MACOSX`
and files that are no pictures (by name and content) are left out and counted; links to folders inside a class are not
followed. Every picture is decoded once, so that all bad ones are known before anything is written.
"""

import hashlib
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from offline_kd.data.blocks import OnBadImage
from offline_kd.data.decoding import MAX_PIXELS, UNDECODABLE, decode_image
from offline_kd.data.label_table import read_label_table
from offline_kd.data.shrinking import shrink
from offline_kd.data.tars import IMAGE_EXTENSIONS, MAX_KEY_BYTES, Sample, hash_key
from offline_kd.support.console import counted, progress, say
from offline_kd.support.errors import DataError, shorten

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation", "eval", "evaluation", "dev")
TEST_NAMES = ("test", "testing")
SPLIT_NAMES = (*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES)
NO_CLASSES = ("__MACOSX",)  # what archives made on a Mac bring along
READ_AS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # formats by content -> member of a tar
OTHER_PICTURES = ("GIF", "BMP", "TIFF", "AVIF", "JPEG2000")  # by content; others have to be named like pictures
LISTED = 100  # bad pictures that are named
AT_ONCE = 1024  # pictures that are waiting to be decoded
READ_AT_ONCE = 32  # files in memory on their way into a tar


@dataclass(frozen=True)
class Picture:
    """A file that was decoded."""

    path: Path
    key: str
    class_name: str
    extension: str  # of the member of a tar
    sha256: bytes
    size: tuple[int, int]  # height and width in pixels, upright, as it is packed
    side: int | None = None  # pixels that its shorter side is made to have then; None: the file is packed as it is

    def encoded(self) -> bytes:
        """As it is packed; raises DataError for a file that was changed since it was decoded."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).digest() != self.sha256:
            raise DataError(f"{self.path}: was changed while the folder was packed. Run the same command again.")
        return content if self.side is None else shrink(content, self.side)


@dataclass(frozen=True)
class BadPicture:
    """A file that should be a picture and is none that can be read."""

    path: Path
    problem: str


@dataclass(frozen=True)
class Photos:
    """What a folder of pictures holds. `splits` are in the order in which they are packed: of the keys' hashes."""

    folder: Path
    classes: list[str]
    splits: dict[str, list[Picture]]
    left_out: Counter[str]  # what kind of file was left out -> how many
    bad: list[BadPicture]

    def samples(self, split: str) -> Iterator[Sample]:
        """The pictures of a split as they are packed; raises what `Picture.encoded` does."""
        labels = {name: label for label, name in enumerate(self.classes)}
        pictures = self.splits[split]
        with _threads() as threads:
            for start in range(0, len(pictures), READ_AT_ONCE):
                some = pictures[start : start + READ_AT_ONCE]
                for picture, encoded in zip(some, threads.map(Picture.encoded, some), strict=True):
                    yield Sample(picture.key, labels[picture.class_name], encoded, picture.extension)

    def counts(self, split: str) -> Counter[str]:
        """Pictures of a split by class; 0 for a class without any."""
        counts = Counter(dict.fromkeys(self.classes, 0))
        counts.update(one.class_name for one in self.splits[split])
        return counts


def look_through(
    folder: Path, split: str | None = None, on_bad: OnBadImage = "fail", table: Path | None = None
) -> Photos:
    """Find and decode the pictures of a folder; says what is left out, and lists all pictures that are bad.

    Args:
        split: what the only split of `folder/CLASS/IMAGE` is called; by default "train".
        on_bad: what happens with bad pictures, after all were listed.
        table: a CSV of `file,class`, where the folder has no folders of classes.

    Raises DataError for bad pictures that are not skipped, for classes that have pictures in another split only, and
    where there are no classes at all.
    """
    left_out: Counter[str] = Counter()
    bad: list[BadPicture] = []
    if table is not None:
        of_file = _classes_by_table(table, folder, left_out)
        names = {split or "train": sorted(set(of_file.values()))}
        found = {split or "train": _with_keys(folder, of_file.items(), left_out, bad)}
    else:
        folders = split_folders(folder, split)
        names = {part: [one.name for one in _class_folders(at)] for part, at in folders.items()}
        found = {part: _pictures_below(at, names[part], left_out, bad) for part, at in folders.items()}
    splits: dict[str, list[Picture]] = {}
    with progress("looking at pictures", sum(map(len, found.values())), "pictures") as meter:
        for part, pictures in found.items():
            decoded = list(_decoded(pictures, meter.advance))
            bad += [one for one in decoded if isinstance(one, BadPicture)]
            good = [one for one in decoded if isinstance(one, Picture)]
            # Of all classes in every tar: training shuffles a few tars at a time, and mixes images within one.
            splits[part] = sorted(good, key=lambda one: hash_key(one.key))
    photos = Photos(folder, sorted({name for part in names.values() for name in part}), splits, left_out, bad)
    _say_what_is_left_out(photos, on_bad)
    _compare_splits(photos, names)
    _say_duplicates(photos)
    return photos


# ---- folders -------------------------------------------------------------------------------------------------------


def split_folders(folder: Path, split: str | None = None) -> dict[str, Path]:
    """The splits of a folder by name: its sub-folders, or the folder itself, called `split` or "train".

    Raises DataError for a parent of splits when one `split` is asked for.
    """
    splits = sub_folders(folder)
    if not _are_splits(splits):
        return {split or "train": folder}
    if split is not None:
        raise DataError(
            f"{folder}: holds splits ({', '.join(one.name for one in splits)}), not classes. Leave --split out to pack "
            f"them all, or give one as --source {splits[0]}."
        )
    return {one.name: one for one in splits}


def sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, by name; raises DataError where there is no folder."""
    if not os.path.isdir(folder):
        raise DataError(
            f"{shorten(str(folder))}: no such folder. Give one with a sub-folder of images for every class."
        )
    return sorted(entry for entry in folder.iterdir() if not _is_hidden(entry.name) and entry.is_dir())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NO_CLASSES


def _are_splits(folders: list[Path]) -> bool:
    """Whether folders are splits and not classes: none has images itself, and they have the same sub-folders, or one of
    them has sub-folders and the name of a split."""
    inside = [{one.name for one in sub_folders(folder)} for folder in folders]
    has_images = [
        any(one.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and not _is_hidden(one.name) for one in folder.iterdir())
        for folder in folders
    ]
    named = any(
        folder.name.lower() in SPLIT_NAMES and names and not images
        for folder, names, images in zip(folders, inside, has_images, strict=True)
    )
    same = len(folders) > 1 and len(inside[0]) > 1 and all(names == inside[0] for names in inside)
    return named or (same and not any(has_images))


def _class_folders(folder: Path) -> list[Path]:
    classes = sub_folders(folder)
    if len(classes) < 2:
        raise DataError(f"{folder}: {len(classes)} class folders, at least 2 are needed (FOLDER/CLASS/IMAGE).")
    for one in classes:
        if not one.name.isprintable():
            raise DataError(f"{folder}: the class folder {one.name!a} has a name that is no text. Rename it.")
    return classes


# ---- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    path: Path
    key: str
    class_name: str
    extension: str


def _pictures_below(folder: Path, classes: Sequence[str], left_out: Counter[str], bad: list[BadPicture]) -> list[_File]:
    """`folder/CLASS/**/IMAGE`."""
    left_out["outside of class folders"] += sum(one.is_file() for one in folder.iterdir() if not _is_hidden(one.name))
    files = ((path, name) for name in classes for path in _files_below(folder / name, left_out))
    return _with_keys(folder, files, left_out, bad)


def _classes_by_table(table: Path, folder: Path, left_out: Counter[str]) -> dict[Path, str]:
    """The class of every file below a folder that a table names; the others are left out."""
    sub_folders(folder)  # which refuses what is no folder
    files = [file for file in _files_below(folder, left_out) if file.resolve() != table.resolve()]
    of_file = read_label_table(table, folder, files)
    if len(files) > len(of_file):
        say(f"{folder}: left out what {table.name} does not name: {counted(len(files) - len(of_file), 'files')}")
    return dict(sorted(of_file.items()))


def _with_keys(
    folder: Path, files: Iterable[tuple[Path, str]], left_out: Counter[str], bad: list[BadPicture]
) -> list[_File]:
    """Those of some files, given with their classes, that are pictures, with keys: the path without its extension.

    Other characters than letters, digits, '_', '-', '/' become '_'; where two paths would share a key, the later one
    gets a hash of its name appended, or of its path.
    """
    found: dict[str, _File] = {}
    for path, name in files:
        extension = _extension(path, left_out, bad)
        if extension is not None:
            key = _key(path.relative_to(folder), found)
            found[key] = _File(path, key, name, extension)
    return list(found.values())


def _files_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    files = []
    for place, folders, names in os.walk(folder):
        left_out["hidden"] += sum(map(_is_hidden, [*folders, *names]))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        left_out["links to folders"] += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        files += [Path(place, name) for name in names if not _is_hidden(name)]
    return sorted(files)


def _extension(path: Path, left_out: Counter[str], bad: list[BadPicture]) -> str | None:
    """What a picture is called in a tar; None for what is no picture, which is counted, or a bad one."""
    extension = path.suffix.lower().lstrip(".")
    if not path.exists():
        bad.append(BadPicture(path, "a link to nothing"))
        return None
    if not path.is_file():  # reading a pipe would wait for ever
        left_out["neither file nor folder"] += 1
        return None
    if extension in IMAGE_EXTENSIONS:
        return extension
    try:
        with Image.open(path) as image:
            kind = str(image.format)
    except UNDECODABLE:
        kind = ""
    if kind in READ_AS:
        return READ_AS[kind]
    if kind in OTHER_PICTURES or (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
        bad.append(BadPicture(path, f"a {kind or extension} is not read: convert it to PNG, JPEG or WebP"))
    else:
        left_out[f".{extension}" if extension else "without extension"] += 1
    return None


def _key(relative: Path, taken: Mapping[str, object]) -> str:
    key = re.sub(r"[^0-9A-Za-z_\-/]", "_", relative.with_suffix("").as_posix())
    for text in (relative.name, relative.as_posix()):
        if key in taken or len(key) > MAX_KEY_BYTES:
            key = f"{key[: MAX_KEY_BYTES - 9]}_{hashlib.sha256(os.fsencode(text)).hexdigest()[:8]}"
    return key


def _decoded(files: Sequence[_File], done: Callable[[], None]) -> Iterator[Picture | BadPicture]:
    with _threads() as threads:
        for start in range(0, len(files), AT_ONCE):
            for one in threads.map(_decode, files[start : start + AT_ONCE]):
                done()
                yield one


def _threads() -> ThreadPoolExecutor:
    """Pillow lets other threads run while it decodes and resamples."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 16))


def _decode(file: _File) -> Picture | BadPicture:
    encoded = b""
    try:
        encoded = file.path.read_bytes()
        image = decode_image(encoded)
    except UNDECODABLE as error:
        problem = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnidentifiedImageError):
            problem = "no picture inside" if encoded else "an empty file"
        elif isinstance(error, Image.DecompressionBombError):
            problem = f"more than {MAX_PIXELS:,} pixels"
        return BadPicture(file.path, problem)
    size = (image.height, image.width)
    return Picture(file.path, file.key, file.class_name, file.extension, hashlib.sha256(encoded).digest(), size)


# ---- what people should know ---------------------------------------------------------------------------------------


def _say_what_is_left_out(photos: Photos, on_bad: OnBadImage) -> None:
    others = ", ".join(f"{kind} ({count:,})" for kind, count in photos.left_out.items() if count)
    if others:
        say(f"{photos.folder}: left out what is no picture: {others}")
    for one in photos.bad[:LISTED]:
        say(f"{one.path}: {shorten(one.problem)}")
    if not photos.bad:
        return
    more = f" (of which {LISTED} are listed)" if len(photos.bad) > LISTED else ""
    if on_bad == "fail":
        first = photos.bad[0]
        raise DataError(
            f"{photos.folder}: {len(photos.bad):,} bad pictures{more}: {first.path}: {shorten(first.problem)}. "
            "Repair or remove them, or leave them out: --bad-images skip."
        )
    say(f"{photos.folder}: left out these bad pictures: {len(photos.bad):,}{more}")


def _compare_splits(photos: Photos, names: Mapping[str, Sequence[str]]) -> None:
    """Raise DataError for a class with pictures, or a folder, that the split to learn from does not know."""
    first = training_split(photos.splits) or next(iter(photos.splits))
    counts = {part: photos.counts(part) for part in photos.splits}
    for part in photos.splits:
        for name in names[part]:
            if not counts[first][name] and (counts[part][name] or name not in names[first]):
                pictures = counted(counts[part][name], "pictures")
                raise DataError(
                    f"{photos.folder}: class '{name}' has {pictures} in {part} and none in {first}, where it "
                    f"would be learned. Put some into {first}/{name}, or remove {part}/{name}."
                )
    for part in photos.splits:
        empty = [name for name in photos.classes if not counts[part][name]]
        if empty:
            say(f"{part}: no picture of {len(empty):,} of {len(photos.classes):,} classes, such as '{empty[0]}'")


def training_split(splits: Mapping[str, object]) -> str | None:
    """The name of the split to learn from, by what people call it."""
    return next((name for name in splits if name.lower() in TRAIN_NAMES), None)


def evaluation_split(splits: Mapping[str, object]) -> str | None:
    """The name of the split to measure on; a test split only where there is no validation split."""
    return next((name for wanted in (VALIDATION_NAMES, TEST_NAMES) for name in splits if name.lower() in wanted), None)


def _say_duplicates(photos: Photos) -> None:
    """The same file in two splits makes results look better than they are; in two classes it teaches nothing."""
    seen: dict[bytes, tuple[str, Picture]] = {}
    leaked: list[tuple[Picture, Picture]] = []
    torn: list[tuple[Picture, Picture]] = []
    for part, pictures in photos.splits.items():
        for picture in pictures:
            earlier, same = seen.setdefault(picture.sha256, (part, picture))
            if earlier != part:
                leaked.append((same, picture))
            if same.class_name != picture.class_name:
                torn.append((same, picture))
    for pairs, where in ((leaked, "another split"), (torn, "another class")):
        if pairs:
            one, other = pairs[0]
            say(
                f"{photos.folder}: warning: in {where} too, byte for byte: {counted(len(pairs), 'pictures')}, such as "
                f"{other.path} and {one.path}"
            )
