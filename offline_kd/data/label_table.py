"""A table of labels, `file,class` a line, for pictures that lie in no folders of classes."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from offline_kd.support.errors import DataError, shorten


def read_label_table(table: Path, folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """The class of every file that a CSV names, by its path below `folder`, with or without its extension.

    A first line that names no file is a heading; further columns are not looked at.

    Args:
        files: below `folder`.

    Raises DataError for a table that cannot be read, a line without a file or a class, and a file with two classes.
    """
    try:
        rows = list(csv.reader(table.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: is no table that can be read ({error}). Give a CSV of `file,class`.") from error
    names = [file.relative_to(folder) for file in files]
    short = Counter(name.with_suffix("").as_posix() for name in names)
    known = {name.with_suffix("").as_posix(): file for name, file in zip(names, files, strict=True)}
    known = {name: file for name, file in known.items() if short[name] == 1}
    known |= {name.as_posix(): file for name, file in zip(names, files, strict=True)}
    found: dict[Path, str] = {}
    for number, (name, class_name) in enumerate(([*row, "", ""][:2] for row in rows), 1):
        where, file = f"{table}, line {number}", known.get(name.strip())
        if not (name or class_name) or (file is None and number == 1):
            continue
        if file is None:
            raise DataError(f"{where}: '{shorten(name)}' is no file in {folder}. Correct the line, or remove it.")
        wanted = class_name.strip()
        if not wanted or not wanted.isprintable():
            raise DataError(f"{where}: '{shorten(name)}' has no class: a line is `file,class`.")
        if found.setdefault(file, wanted) != wanted:
            raise DataError(
                f"{where}: '{shorten(name)}' is '{wanted}' here and '{found[file]}' before. Remove one line."
            )
    if len(set(found.values())) < 2:
        raise DataError(
            f"{table}: names {len(found):,} files of {len(set(found.values()))} classes, at least 2 are needed."
        )
    return found
