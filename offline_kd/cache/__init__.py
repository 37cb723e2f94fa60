"""STAGE 1: images -> views -> teacher -> codec -> committed blocks. Begin with `pipeline.py`.

In: a recipe, a dataset, a teacher. Out: a finished store, or the blocks of one that other writers finish.
"""

from typing import TYPE_CHECKING

from offline_kd.support.lazy import lazy

if TYPE_CHECKING:
    from offline_kd.cache.fidelity import measure_fidelity
    from offline_kd.cache.pipeline import Worker, cache_teacher
    from offline_kd.cache.teacher import load_teacher
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Worker": "offline_kd.cache.pipeline",
            "cache_teacher": "offline_kd.cache.pipeline",
            "load_teacher": "offline_kd.cache.teacher",
            "measure_fidelity": "offline_kd.cache.fidelity",
        },
    )

__all__ = [
    "Worker",
    "cache_teacher",
    "load_teacher",
    "measure_fidelity",
]
