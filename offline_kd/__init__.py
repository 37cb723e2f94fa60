"""offline-kd: run a teacher over an image dataset once, store its targets, train any number of students from the store.

    images ─┬─► cache/      STAGE 1: views -> teacher -> codec -> committed blocks ─► teacher store
            └─► distill/    STAGE 2: the same views + the store -> student ─► report

    import offline_kd as okd
    okd.cache_teacher(teacher, "data/digits", views={"kind": "pad_crop_flip", "count": 4}, ..., out="stores/digits")
    for batch in okd.open_store("stores/digits", data="data/digits").loader(batch_size=64).epoch(0): ...

Shape letters, package-wide: N samples, B batch, V views, C classes, D channels, H W height and width.
`store/schema.py` says what a store looks like; `views/` is what both stages must agree on; docs/api.md shows every name
of this module at work. Importing it imports neither torch nor zarr: that waits until a name is used.
"""

from typing import TYPE_CHECKING

from offline_kd.support.errors import OfflineKDError
from offline_kd.support.lazy import lazy

if TYPE_CHECKING:
    from offline_kd import objectives
    from offline_kd.api import TeacherStore, cache_teacher, evaluation_loader, open_store
    from offline_kd.models.student_file import TrainedStudent, load_student
    from offline_kd.support.version import __version__
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "TeacherStore": "offline_kd.api",
            "TrainedStudent": "offline_kd.models.student_file",
            "__version__": "offline_kd.support.version",
            "cache_teacher": "offline_kd.api",
            "evaluation_loader": "offline_kd.api",
            "load_student": "offline_kd.models.student_file",
            "objectives": "offline_kd.objectives",
            "open_store": "offline_kd.api",
        },
    )

__all__ = [
    "OfflineKDError",
    "TeacherStore",
    "TrainedStudent",
    "__version__",
    "cache_teacher",
    "evaluation_loader",
    "load_student",
    "objectives",
    "open_store",
]
