"""What a student minimises: one file per objective, with its formula, its fields in a recipe and what it needs.

The formulas are plain functions of `[B, C]` logits, or of `[B, D]` features, that return the bare scalar, equal to the
authors' code. None but `ce` and `bce` contains the cross-entropy on labels. Each class beside a formula is a term of
recipes (`term.py`).
"""

from offline_kd.objectives.bce import bce
from offline_kd.objectives.binary_kd import binary_kd
from offline_kd.objectives.crd import ContrastiveMemory, crd, crd_normaliser, crd_scores
from offline_kd.objectives.decisions import decisions, subclass_decisions
from offline_kd.objectives.dist import dist
from offline_kd.objectives.dkd import dkd
from offline_kd.objectives.dtkd import dtkd, dtkd_fallbacks
from offline_kd.objectives.embedding import embedding
from offline_kd.objectives.itrd import itrd, itrd_correlation, itrd_dropped, itrd_information
from offline_kd.objectives.kd import kd
from offline_kd.objectives.nkd import nkd
from offline_kd.objectives.relational import rkd_angle, rkd_distance
from offline_kd.objectives.term import DatasetRows, Term
from offline_kd.objectives.ttm import power_sum, ttm, wttm
from offline_kd.support.lazy import load_class

__all__ = [
    "OBJECTIVES",
    "ContrastiveMemory",
    "DatasetRows",
    "bce",
    "binary_kd",
    "crd",
    "crd_normaliser",
    "crd_scores",
    "decisions",
    "dist",
    "dkd",
    "dtkd",
    "dtkd_fallbacks",
    "embedding",
    "example_terms",
    "itrd",
    "itrd_correlation",
    "itrd_dropped",
    "itrd_information",
    "kd",
    "nkd",
    "power_sum",
    "rkd_angle",
    "rkd_distance",
    "subclass_decisions",
    "ttm",
    "wttm",
]

# Name of a term in recipes, and where its class is: file of this folder, and name in it.
CLASSES = {
    "ce": "ce.CE",
    "kd": "kd.KD",
    "ttm": "ttm.TTM",
    "wttm": "ttm.WTTM",
    "dtkd": "dtkd.DTKD",
    "dkd": "dkd.DKD",
    "dist": "dist.DIST",
    "nkd": "nkd.NKD",
    "decisions": "decisions.Decisions",
    "subclass_decisions": "decisions.SubclassTerm",
    "crd": "crd.CRD",
    "itrd": "itrd.ITRD",
    "embedding": "embedding.Embedding",
    "relational": "relational.Relational",
    "bce": "bce.BCE",
    "binary_kd": "binary_kd.BinaryKD",
}


OBJECTIVES: dict[str, type[Term]] = {term: load_class(__name__, where) for term, where in CLASSES.items()}


def example_terms() -> dict[str, Term]:
    """Every objective at its usual setting."""
    return {name: one.model_validate({"term": name, **one.example}) for name, one in OBJECTIVES.items()}
