"""From tars that somebody names to a split in the manifest: where they lie, which classes they have, their index."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from glob import glob, has_magic
from pathlib import Path
from typing import TypedDict, Unpack

from braceexpand import braceexpand

from offline_kd.data.index_journal import append_to_journal, read_journal
from offline_kd.data.indexing import ENGINES, TarFacts, refuse_shared_keys
from offline_kd.data.labels import LABEL_RULES, UNLABELLED
from offline_kd.data.manifest import Dataset, IndexedTar, TarIndex
from offline_kd.data.manifest_merging import Entry, check_same_place, known_dataset, merged
from offline_kd.support.console import progress, say
from offline_kd.support.errors import DataError, RecipeError, did_you_mean, shorten
from offline_kd.support.files import write_atomically
from offline_kd.support.places import can_list, place_at

SERVER = re.compile(r"[a-z0-9]+://[^/]+")
MOST_CLASSES = 2**20  # that labels without names may lead to


# ---- which tars ----------------------------------------------------------------------------------------------------


def find_tars(patterns: Sequence[str]) -> tuple[str, list[str]]:
    """The folder or URL below which all named tars lie, and their names there, in the order in which they were named.

    Args:
        patterns: files, URLs, lists and ranges in braces, and `*` and `?` where files can be listed.

    Raises RecipeError for a pattern that names nothing, a tar that is named twice, and tars that lie apart.
    """
    tars = [tar for pattern in patterns for one in _expanded(pattern) for tar in _matching(one)]
    twice = next((tar for tar, count in Counter(tars).items() if count > 1), None)
    if twice:
        raise RecipeError(f"{shorten(twice)}: is named twice. Name each tar once.")
    starts = {found[0] if (found := SERVER.match(tar)) else "" for tar in tars}
    if len(starts) > 1:
        raise RecipeError(f"the tars lie in {' and '.join(sorted(starts))}: those of a dataset must lie in one place.")
    parts = [tar.split("/") for tar in tars]
    folders = [one[:-1] for one in parts]
    apart = (index for index, pair in enumerate(zip(min(folders), max(folders), strict=False)) if pair[0] != pair[1])
    common = next(apart, min(map(len, folders)))  # of names in order, the first and the last differ earliest
    return "/".join(parts[0][:common]) or "/", ["/".join(one[common:]) for one in parts]


def _expanded(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:  # braces that do not fit
        raise RecipeError(f"{shorten(pattern)}: {error}. Write ranges as {{000..123}}, lists as {{a,b}}.") from error


def _matching(pattern: str) -> list[str]:
    server = SERVER.match(pattern)
    if "://" in pattern and (server is None or not pattern[server.end() + 1 :]):
        raise RecipeError(f"{shorten(pattern)}: names no tar. Write s3://BUCKET/FOLDER/NAME.tar, or the like.")
    if server is None:
        files = sorted(glob(pattern)) if has_magic(pattern) and not os.path.exists(pattern) else [pattern]
        files = [os.path.abspath(file) for file in files]
    elif has_magic(pattern) and can_list(place := place_at(server[0])):
        name = pattern[server.end() + 1 :]
        folder = re.split(r"[*?\[]", name, maxsplit=1)[0].rpartition("/")[0]
        files = [f"{server[0]}/{file}" for file in sorted(place.sizes(folder)) if fnmatchcase(file, name)]
    else:
        files = [pattern]
    if not files:
        raise RecipeError(f"{shorten(pattern)}: there is no such file. Correct the pattern.")
    return files


# ---- which classes -------------------------------------------------------------------------------------------------


def classes_of(tars: Sequence[TarFacts], names: list[str] | None) -> list[str]:
    """The class names, in the order of their indices: those that are known; else labels that are names, sorted; else
    the numbers up to the largest label.

    Without labels and known classes there are none. Raises DataError for a label that is none of the known classes,
    naming its tar.
    """
    labels = _all_labels(tars)
    if names is not None:
        index = {name: number for number, name in enumerate(names)}
        for tar in tars:
            for label in tar.labels:
                if label not in index if isinstance(label, str) else label >= len(names):
                    near = did_you_mean(label, names[:1000])[:200] if isinstance(label, str) else ""
                    raise DataError(
                        f"{tar.file}: has label {label!r:.80}, the dataset has {len(names):,} classes.{near} Give all "
                        "of them: --classes FILE, one name a line."
                    )
        return names
    if set(labels) == {UNLABELLED}:
        return []
    said = [label for label in labels if isinstance(label, str)]
    if said and len(said) < len(labels):
        number = next(label for label in labels if not isinstance(label, str))
        raise DataError(f"some labels are names, as {said[0]!r:.80}, others numbers, as {number}: pack the tars again.")
    most = max((label for label in labels if isinstance(label, int)), default=0)
    if most >= MOST_CLASSES:
        raise DataError(f"the largest label is {most}, more than {MOST_CLASSES:,} classes. Choose another --label.")
    found = sorted(said) or [str(index) for index in range(most + 1)]
    if len(found) < 2:
        raise DataError(f"all labels are {found[0]!r:.80}: one class only. Give the others, too: --classes FILE.")
    return found


def _all_labels(tars: Sequence[TarFacts]) -> Counter[int | str]:
    labels: Counter[int | str] = Counter()
    for tar in tars:
        labels.update(tar.labels)
    return labels


def said_of_classes(tars: Sequence[TarFacts], classes: Sequence[str]) -> str:
    """How many samples the classes have, in words."""
    labels = _all_labels(tars)
    if set(labels) == {UNLABELLED}:
        return f"no labels; {len(classes):,} classes"
    counts = {name: labels[name] or labels[index] for index, name in enumerate(classes)}
    if len(counts) <= 20:
        return "samples by class: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    ordered = sorted(counts, key=lambda name: counts[name])
    without = [name for name in ordered if not counts[name]]
    least, most = ordered[0], ordered[-1]
    none = f"; none of {len(without):,}, such as '{without[0]}'" if without else ""
    return f"{len(classes):,} classes of {counts[least]:,} ('{least}') to {counts[most]:,} ('{most}') samples{none}"


# ---- the manifest --------------------------------------------------------------------------------------------------


def entry_of(name: str, location: str, manifest: Path) -> Entry:
    """A dataset without classes and splits, as YAML has it; a location beside the manifest is relative to it."""
    beside = os.path.abspath(manifest.parent)
    if "://" not in location and os.path.commonpath([beside, location]) == beside:
        location = os.path.relpath(location, beside)
    return {"folder": name, "location": location, "classes": [], "splits": {}}


def known_classes(dataset: Dataset | None, file: Path | None, count: int | None) -> list[str] | None:
    """The class names of a file, one a line; so many numbers; or those of a dataset that exists.

    Raises RecipeError for a file without names, and for a file and a number.
    """
    if file is not None and count is not None:
        raise RecipeError("--classes and --num-classes: give one of the two.")
    if file is None:
        return [str(index) for index in range(count)] if count else (dataset.classes or None) if dataset else None
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--classes {file}: cannot be read ({error}). Give a text file, one name a line.") from error
    twice = next((name for name, count in Counter(names).items() if count > 1 or not name.strip()), None)
    if len(names) < 2 or twice is not None:
        raise RecipeError(
            f"--classes {file}: needs two names at least, each once; has {len(names)} (twice: {twice!r})."
        )
    return names


class IndexOptions(TypedDict):
    """What `index_split` is told besides the tars."""

    name: str  # of the dataset
    split: str
    rule: str  # what says the label of a sample, as `Split.labels`
    classes_file: Path | None
    num_classes: int | None
    workers: int
    engine: str  # of ENGINES
    manifest_path: Path


def index_split(patterns: Sequence[str], **options: Unpack[IndexOptions]) -> None:
    """Read all tars that the patterns name, prove that their keys are unique, and put them into the manifest.

    Raises RecipeError and DataError as the parts do; the manifest is unchanged then, and what was read is in a journal.
    """
    name, split, rule, manifest = options["name"], options["split"], options["rule"], options["manifest_path"]
    if re.fullmatch(LABEL_RULES, rule) is None:
        raise RecipeError(f"--label {shorten(rule)}: write cls, json:FIELD, json-set:FIELD or none.")
    location, files = find_tars(patterns)
    entry = entry_of(name, location, manifest)
    check_same_place(manifest, name, location)
    known = known_classes(known_dataset(manifest, name), options["classes_file"], options["num_classes"])
    journal = manifest.parent / f"{name}-{split}.index.partial"
    found = {tar.file: tar for tar in read_journal(journal, location, files, rule)}
    if found:
        say(f"{journal}: {len(found):,} of {len(files):,} tars were read before and are unchanged")
    open_files = [file for file in files if file not in found]
    workers = min(options["workers"], len(open_files))
    with progress(f"indexing {name}/{split}", len(files), "tars") as meter:
        meter.advance(len(found))
        for tar in ENGINES[options["engine"]](location, open_files, rule, workers) if open_files else ():
            append_to_journal(journal, location, rule, tar)
            found[tar.file] = tar
            meter.advance()
    tars = [found[file] for file in files]
    refuse_shared_keys(location, tars, rule)
    entry["classes"] = classes_of(tars, known)
    index = write_split(manifest, name, split, rule, entry, tars)
    journal.unlink(missing_ok=True)
    samples, size = sum(len(tar.key_hash) for tar in tars), sum(tar.bytes for tar in tars)
    left_out = [f"{tar.file}: {one}" for tar in tars for one in tar.left_out]
    if left_out:
        say(f"{len(left_out):,} groups of files are no samples and were left out, such as {left_out[0]}")
    say(said_of_classes(tars, entry["classes"]))
    say(f"{index}: {len(tars):,} tars, {samples:,} samples, {size:,} bytes; every key is used once")
    say(f"{manifest}: dataset '{name}' has {split} now")


def write_split(manifest: Path, name: str, split: str, rule: str, entry: Entry, tars: Sequence[TarFacts]) -> Path:
    """Write the index of a split and name it in the manifest, whose other splits and lines stay; returns its path.

    Raises DataError, and writes nothing, when the manifest has another dataset of that name.
    """
    index = TarIndex(
        index_version=1,
        tars=[IndexedTar(file=tar.file, count=len(tar.key_hash), sha256=tar.sha256, bytes=tar.bytes) for tar in tars],
    )
    lines = ",\n".join(tar.model_dump_json() for tar in index.tars)
    content = f'{{"index_version": {index.index_version}, "tars": [\n{lines}\n]}}\n'.encode()
    file = manifest.parent / f"{name}-{split}.index.json"
    about: dict[str, object] = {"index": file.name, "sha256": hashlib.sha256(content).hexdigest()}
    if rule != "cls":
        about["labels"] = rule
    text = merged(manifest, name, {**entry, "splits": {split: about}})
    write_atomically(file, content)
    write_atomically(manifest.resolve(), text)
    return file
