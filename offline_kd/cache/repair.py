"""Do the damaged blocks of a store again, and no others."""

from collections.abc import Callable, Sequence

import torch

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest
from offline_kd.recipe import CaptureRecipe
from offline_kd.store.leftovers import sweep
from offline_kd.store.verification import Verification, take_back, verify
from offline_kd.support.console import say
from offline_kd.support.places import Place

ROUNDS = 3  # a damaged manifest hides what else is damaged


def repair(
    place: Place,
    recipe: CaptureRecipe,
    manifest: Manifest,
    roots: Sequence[Root],
    device: torch.device,
    show: Callable[[Verification], None],
    remove_extra: bool = False,
) -> Verification:
    """Find what is wrong with a store and capture exactly those blocks again; returns what is wrong afterwards.

    Args:
        show: is told what was found before each round, and at the end.
        remove_extra: delete files that do not belong to the store, too.
    """
    sweep(place)
    for _ in range(ROUNDS):
        result = verify(place)
        faults = [fault for fault in result.faults if remove_extra or not fault.is_extra]
        if not faults:
            break
        show(result)
        redone = take_back(place, faults, remove_extra)
        say(f"{place}: doing {len(redone)} blocks again")
        is_addition = place.size(f"additions/{recipe.name}.json") is not None
        cache_teacher(recipe, manifest, roots, place, device, add=is_addition)
    else:
        result = verify(place)
    show(result)
    return result
