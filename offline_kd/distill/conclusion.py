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
    best = max(found, key=lambda summary: summary.top1_mean)
    assert best.difference is not None, "it stands beside plain training"
    plain = next(one for one in summaries if best.plain is not None and one.group.key == best.plain.key)
    figures = f"{best.group.label} has {best.top1_mean:.2f} %, {plain.group.label} {plain.top1_mean:.2f} %"
    if best.difference.mean > 0:
        return f"Students are better with the teacher than from labels alone: {figures}, {_chance(best.difference)}."
    text = f"Students are no better with the teacher than from labels alone: {figures}"
    if teacher is not None and teacher <= plain.top1_mean:
        return (
            f"{text}. The teacher itself has {teacher:.2f} %, no more than plain training: take one that knows more, "
            "with pretrained weights, on larger views or after more epochs (docs/teachers.md)."
        )
    return f"{text}, {_chance(best.difference)}. Try another objective, more views or more epochs."


def _chance(apart: Difference) -> str:
    """Whether a difference is more than chance."""
    if apart.half_width is None:
        return "which may be chance: seeds tell (seeds: [0, 1, 2])"
    if abs(apart.mean) <= apart.half_width:
        return "which is not more than chance may do"
    return "which is more than chance"


def _teacher_of(found: Sequence[Summary], summaries: Sequence[Summary]) -> float | None:
    """Top-1 of the teacher in percent, as it was told to students, or of the only one in the report."""
    told = {one.answered.teacher_top1 for one in found if one.answered and one.answered.teacher_top1 is not None}
    own = {one.top1_mean for one in summaries if one.group.runs[0].is_teacher}
    tops = told or own
    return tops.pop() if len(tops) == 1 else None
