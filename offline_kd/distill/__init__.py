"""STAGE 2: the same views + the store -> student. Begin with `training.py`.

In: a recipe, a dataset, one or several stores. Out: a run directory, and the report over many.
"""

from typing import TYPE_CHECKING

from offline_kd.support.lazy import lazy

if TYPE_CHECKING:
    from offline_kd.distill.report import summarise
    from offline_kd.distill.report_page import write_report
    from offline_kd.distill.run_records import group_runs, read_runs
    from offline_kd.distill.teacher_training import train_teacher
    from offline_kd.distill.training import distill
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "distill": "offline_kd.distill.training",
            "group_runs": "offline_kd.distill.run_records",
            "read_runs": "offline_kd.distill.run_records",
            "summarise": "offline_kd.distill.report",
            "train_teacher": "offline_kd.distill.teacher_training",
            "write_report": "offline_kd.distill.report_page",
        },
    )

__all__ = [
    "distill",
    "group_runs",
    "read_runs",
    "summarise",
    "train_teacher",
    "write_report",
]
