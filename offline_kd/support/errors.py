"""What can go wrong in an expected way.

    OfflineKDError            one line for the user, exit status 1
    ├── RecipeError           a recipe, a manifest or an option that cannot be understood
    ├── DataError             tars, images or labels that are not what was promised
    ├── ModelError            an unknown network, or weights that do not fit it
    ├── TeacherError          the teacher failed its gate, or said something unusable
    ├── TrainingError         a run that diverged, or a run directory of another run
    └── StoreError            a teacher store that cannot be used
        ├── StoreIncomplete   blocks or files are missing
        ├── StoreUnreachable  a server or the way to it failed, which says nothing of what is stored there
        ├── StoreMismatch     it belongs to other data, another teacher or another recipe
        └── StoreCorrupt      its content is not what was committed

Library code raises these with three things in the message: where, what happened (both values) and what to do.
`cli/main.py` alone prints them. Anything else that escapes is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class OfflineKDError(Exception):
    """Base of every expected failure."""


class RecipeError(OfflineKDError):
    pass


class DataError(OfflineKDError):
    pass


class ModelError(OfflineKDError):
    pass


class TeacherError(OfflineKDError):
    pass


class TrainingError(OfflineKDError):
    pass


class StoreError(OfflineKDError):
    pass


class StoreIncomplete(StoreError):
    pass


class StoreUnreachable(StoreError):
    pass


class StoreForbidden(StoreUnreachable):
    """The server answers, and does not hand this out. Some say so of what is not there."""


class StoreMismatch(StoreError):
    pass


class StoreCorrupt(StoreError):
    pass


class LeaseLost(StoreError):
    """Another writer took over what this one was doing, because it showed no sign of life."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which of the known names is nearest to `name`, or list them: ` Did you mean 'x'?`"""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""


def shorten(text: str, longest: int = 300) -> str:
    """`text` as a message can hold it: what stands in a file, or was typed, may have any length."""
    return text if len(text) <= longest else text[: longest - 3] + "..."
