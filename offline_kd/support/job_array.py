"""Which of several processes this one is, as torchrun, SLURM and Kubernetes tell it in the environment.

Tasks of a job array may run on different days: each does its own share. Processes that were started together share
everything, by leases; inside one task of an array, that task's share.

                    which one                           of how many
SLURM job array     SLURM_ARRAY_TASK_ID, _MIN, _STEP    SLURM_ARRAY_TASK_COUNT      own share
torchrun            RANK                                WORLD_SIZE above 1          together
srun                SLURM_PROCID                        SLURM_NTASKS above 1        together
Indexed Job         JOB_COMPLETION_INDEX                JOB_COMPLETIONS             own share

Kubernetes tells a pod its index and not their number, which the Job's `env` has to give: without it, pods share by
leases, as processes do that are told nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from offline_kd.support.errors import RecipeError

HOW_TO_GO_ON = "Correct or unset it, or give --worker I/N."


@dataclass(frozen=True)
class Told:
    """This process is number `index`, from 0, of `count`, by the variable `source`."""

    index: int
    count: int
    source: str
    own_share: bool  # whether the others may run tomorrow


def told_by(environment: Mapping[str, str]) -> Told | None:
    """What the environment says, None if nothing; raises RecipeError for numbers that cannot be."""
    return (
        _array_task(environment)
        or _number(environment, "RANK", "WORLD_SIZE", own_share=False)
        or _number(environment, "SLURM_PROCID", "SLURM_NTASKS", own_share=False)
        or _number(environment, "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", own_share=True)
    )


def _array_task(environment: Mapping[str, str]) -> Told | None:
    """Ids of an array begin anywhere and may lie apart evenly: `--array=10-40:10` are tasks 0 to 3 of 4."""
    name = "SLURM_ARRAY_TASK_ID"
    if not (environment.get(name) and environment.get("SLURM_ARRAY_TASK_COUNT")):
        return None
    task, count = _whole(environment, name), _whole(environment, "SLURM_ARRAY_TASK_COUNT")
    first = _whole(environment, "SLURM_ARRAY_TASK_MIN") if environment.get("SLURM_ARRAY_TASK_MIN") else 0
    step = _whole(environment, "SLURM_ARRAY_TASK_STEP") if environment.get("SLURM_ARRAY_TASK_STEP") else 1
    index, rest = divmod(task - first, max(step, 1))
    if rest or not 0 <= index < count:
        raise RecipeError(
            f"{name} is {task}, which is none of {count} tasks from {first} on in steps of {step}: an array with gaps "
            "does not say which task is which. Use --array=0-N, or give --worker I/N."
        )
    return Told(index, count, name, own_share=True)


def _number(environment: Mapping[str, str], which: str, of_how_many: str, own_share: bool) -> Told | None:
    if not (environment.get(which) and environment.get(of_how_many)):
        return None
    index, count = _whole(environment, which), _whole(environment, of_how_many)
    if index >= count:
        raise RecipeError(f"{which} is {index} and {of_how_many} {count}: it must be less. {HOW_TO_GO_ON}")
    return Told(index, count, which, own_share) if count > 1 else None


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment[name].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise RecipeError(f"{name} is '{text:.40}', which is no whole number from 0 on. {HOW_TO_GO_ON}")
    return int(text)
