"""What a report comes to, in sentences: which student is better than plain training, and whether its teacher is."""

from collections.abc import Sequence

from offline_kd.distill.differences import Difference
from offline_kd.distill.report import Summary
from offline_kd.distill.run_records import GroupKey

MOST = 5  # sentences


def conclusion(summaries: Sequence[Summary]) -> list[str]:
    """One sentence for every plain training that students with a teacher stand beside; none without plain training."""
    beside: dict[GroupKey, list[Summary]] = {}
    for summary in summaries:
        if summary.plain is not None:
            beside.setdefault(summary.plain.key, []).append(summary)
    return [_sentence(found, _teacher_of(found, summaries), summaries) for found in beside.values()][:MOST]


def _sentence(found: Sequence[Summary], teacher: float | None, summaries: Sequence[Summary]) -> str:
    best = max(found, key=lambda summary: summary.mean or 0.0)
    assert best.difference is not None, "it stands beside plain training"
    plain = next(one for one in summaries if best.plain is not None and one.group.key == best.plain.key)
    assert best.mean is not None, "it was compared"
    assert plain.mean is not None, "plain training is from labels"
    figures = f"{best.group.label} has {best.mean:.2f} %, {plain.group.label} {plain.mean:.2f} %"
    apart, known = best.difference.mean, _is_known(best.difference)
    if apart > 0 and known:
        return f"Students are better with the teacher than from labels alone: {figures}."
    if apart > 0:
        return (
            f"Students seem better with the teacher than from labels alone, but it may be chance: {figures}. "
            "More seeds tell (--seeds 0,1,2,3,4)."
        )
    text = f"Students are {'worse' if known else 'no better'} with the teacher than from labels alone: {figures}"
    if teacher is not None and teacher <= plain.mean:
        return (
            f"{text}. The teacher itself has {teacher:.2f} %, no more than plain training: take one that knows more, "
            "with pretrained weights, on larger views or after more epochs (docs/teachers.md)."
        )
    return f"{text}. Try another objective, more views or more epochs."


def _is_known(apart: Difference) -> bool:
    """Whether a difference is more than chance: its interval of 95 % does not hold 0."""
    return apart.half_width is not None and abs(apart.mean) > apart.half_width


def _teacher_of(found: Sequence[Summary], summaries: Sequence[Summary]) -> float | None:
    """Top-1 of the teacher in percent, as it was told to students, or of the only one in the report."""
    told = {one.answered.teacher_top1 for one in found if one.answered and one.answered.teacher_top1 is not None}
    own = {one.mean for one in summaries if one.group.runs[0].is_teacher and one.mean is not None}
    tops = told or own
    return tops.pop() if len(tops) == 1 else None
