"""Which objectives a store can serve: what its codec has kept against what each needs."""

from dataclasses import replace

from offline_kd.objectives import example_terms
from offline_kd.objectives.decisions import KDLayerTerm
from offline_kd.objectives.needs import Needs
from offline_kd.store.codec import TAIL_TEMPERATURES, AnyCodec, TopK
from offline_kd.store.reader import Store


def serves(codec: AnyCodec, needs: Needs) -> str:
    """What an objective needs of the logits that a codec has not kept; '' if there is nothing.

    `topk` keeps of the classes outside the largest only their mass, near its `tail_temperature`.
    """
    if not needs.logits or not isinstance(codec, TopK):
        return ""
    if needs.tail_temperature is None:
        return "which it cannot have of the largest logits alone"
    if not codec.tail_temperature / 2 <= needs.tail_temperature <= 2 * codec.tail_temperature:
        return f"at T = {needs.tail_temperature:g}; its tail is right at T = {codec.tail_temperature}"
    return ""


def served_terms(store: Store) -> list[str]:
    """The terms of objectives that the store has targets for, at a temperature that suits its codec."""
    held = store.manifest.held if store.manifest else None
    examples = example_terms()
    terms: list[str] = []
    if held is None or held.has("logits/"):
        terms += [name for name, term in examples.items() if _serves_at_some_temperature(store, term.needs)]
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
        return not serves(store.identity.codec, needs)
    return any(not serves(store.identity.codec, replace(needs, tail_temperature=t)) for t in TAIL_TEMPERATURES)
