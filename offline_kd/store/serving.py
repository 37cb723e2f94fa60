"""Which objectives a store can serve: what its codec has kept against what each needs; and which part of one it is."""

from dataclasses import replace

from offline_kd.objectives import example_terms
from offline_kd.objectives.decisions import KDLayerTerm
from offline_kd.objectives.needs import Needs
from offline_kd.store.codecs.topk import TAIL_TEMPERATURES
from offline_kd.store.reader import Store
from offline_kd.store.schema import Held


def served_terms(store: Store) -> list[str]:
    """The terms of objectives that the store has targets for, at a temperature that suits its codec."""
    held = store.manifest.held if store.manifest else None
    sort = "set" if store.identity.teacher.kind == "multilabel" else "one"
    examples = {name: term for name, term in example_terms().items() if term.needs.label in (sort, "either")}
    terms: list[str] = []
    if store.has_logits:
        terms += [name for name, term in examples.items() if _serves_at_some_temperature(store, term.needs)]
    if held is None or held.has("features/"):
        for features in store.identity.features:
            terms += [f"{name}({features})" for name, term in examples.items() if term.needs.features]
    if held is None or held.has("decisions/"):
        for decisions, about in store.identity.decisions.items():
            terms += [
                f"{name}({decisions})"
                for name, term in examples.items()
                if isinstance(term, KDLayerTerm) and term.kind == about.config.kind
            ]
    return terms


def _serves_at_some_temperature(store: Store, needs: Needs) -> bool:
    if not needs.logits:
        return False
    if needs.tail_temperature is None:
        return not store.identity.codec.serves(needs)
    return any(not store.identity.codec.serves(replace(needs, tail_temperature=t)) for t in TAIL_TEMPERATURES)


def describe(held: Held | None) -> str:
    """What a copy holds, in words."""
    if held is None:
        return "all of it"
    kinds = "" if held.arrays is None else f", {' and '.join(held.arrays) or 'no targets'} only"
    return f"blocks {held.first_block}:{held.end_block}, views 0:{held.views}{kinds}"
