"""What a teacher answered when it was measured: a file beside its store, for reports on students that learn from it.

It is no part of the store, whose digest does not depend on it. Where it is missing, only a report lacks something.
"""

from collections.abc import Sequence

from offline_kd.models.evaluation import Evaluation
from offline_kd.models.evaluation_file import MOST_FILE_BYTES, put_predictions, read_predictions
from offline_kd.store.identity import TeacherIdentity
from offline_kd.store.reader import Store
from offline_kd.support.console import say
from offline_kd.support.errors import OfflineKDError
from offline_kd.support.places import Folder, Place, place_at
from offline_kd.support.web import Web

TOLERANCE = 1e-6  # percentage points, between the top-1 of a file and that of the store's teacher


def evaluation_beside(place: Place, weights_sha256: str) -> tuple[Place, str] | None:
    """Where what a teacher with these weights answered lies, `STORE.teacher-SHA256.safetensors`; None for a store that
    is a whole bucket, beside which is nothing."""
    ending = f".teacher-{weights_sha256[:12]}.safetensors"
    if isinstance(place, Folder):
        path = place.path.absolute()
        return Folder(path.parent), path.name + ending
    parent, _, name = str(place).rpartition("/")
    return None if parent.endswith("/") else (place_at(parent), name + ending)


def keep_evaluation(place: Place, weights_sha256: str, found: Evaluation, classes: Sequence[str]) -> None:
    """Write what a teacher answered beside the store that is made of it; where that cannot be, it is said."""
    beside = evaluation_beside(place, weights_sha256)
    if beside is None or isinstance(beside[0], Web):
        return
    try:
        put_predictions(beside[0], found.answers, classes, found.samples, beside[1])
    except (OfflineKDError, OSError) as error:
        say(f"{beside[0]}/{beside[1]}: not written, so reports will lack how far students agree with it: {error}")


def copy_evaluations(store: Store, target: Place) -> None:
    """Write beside a copy what lies beside the store of its teachers; where that cannot be, it is said."""
    for teacher in (store.created.teacher, *(one.teacher for one in store.additions if one.extends is None)):
        content, beside = _read(store.place, teacher), evaluation_beside(target, teacher.weights_sha256)
        if content is None or beside is None:
            continue
        try:
            beside[0].put(beside[1], content)
        except (OfflineKDError, OSError) as error:
            say(f"{beside[0]}/{beside[1]}: not written, so reports will lack how far students agree with it: {error}")


def read_evaluation(store: Store) -> bytes | None:
    """The file of a store's teacher; None where there is none that can be read, or it is not of this teacher."""
    return _read(store.place, store.identity.teacher)


def _read(place: Place, teacher: TeacherIdentity) -> bytes | None:
    beside = evaluation_beside(place, teacher.weights_sha256)
    if beside is None or teacher.measured_top1 is None:
        return None
    try:
        content = beside[0].read(beside[1], MOST_FILE_BYTES)
        top1 = read_predictions(content, f"{beside[0]}/{beside[1]}").top1
    except (OfflineKDError, OSError):
        return None
    return content if abs(top1 - teacher.measured_top1) <= TOLERANCE else None
