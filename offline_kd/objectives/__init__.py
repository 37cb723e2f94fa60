"""What a student minimises: plain functions of `[B, C]` logits that return the bare scalar, equal to the authors' code.

| function | file | paper |
|---|---|---|
| kd | kd.py | Hinton et al. 2015 |
| ttm, wttm | ttm.py | Zheng and Yang 2024 |
| dtkd | dtkd.py | Wei and Bai 2024 |
| dkd | dkd.py | Zhao et al. 2022 |
| dist | dist.py | Huang et al. 2022 |
| nkd | nkd.py | Yang et al. 2023 |
| decisions, subclass_decisions | decisions.py | letKD, on the scores of a KD layer |

None contains the cross-entropy on labels: a recipe adds the term `ce`. Weights and warm-up belong to the
recipe (`recipe.py`), and `distill/loss.py` adds up the terms.
"""

from offline_kd.objectives.decisions import decisions, subclass_decisions
from offline_kd.objectives.dist import dist
from offline_kd.objectives.dkd import dkd
from offline_kd.objectives.dtkd import dtkd, dtkd_fallbacks
from offline_kd.objectives.kd import kd
from offline_kd.objectives.nkd import nkd
from offline_kd.objectives.ttm import power_sum, ttm, wttm

__all__ = [
    "decisions",
    "dist",
    "dkd",
    "dtkd",
    "dtkd_fallbacks",
    "kd",
    "nkd",
    "power_sum",
    "subclass_decisions",
    "ttm",
    "wttm",
]
