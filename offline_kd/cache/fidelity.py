"""How faithful a store is: the teacher is asked again about rows that are read back from disk as stage 2 reads them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_kd.data.blocks import ImageBlock
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.objectives import kd, power_sum
from offline_kd.store.decisions import SubclassDecisions, pack, unpack_probs
from offline_kd.store.join import Wanted, as_stored, codec_tables_on, join, tables_on
from offline_kd.store.reader import Store
from offline_kd.store.rows import Rows
from offline_kd.store.schema import Fidelity
from offline_kd.support.console import progress
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import StoreCorrupt
from offline_kd.views.render import render_some

FIDELITY_STREAM = 0x66696465  # first counter of the draws made here
MAX_BLOCKS = 8
TEMPERATURES = (1, 2, 4)
GAMMAS = (0.25, 0.5, 0.8)
# Share of places where the likeliest template, or the sub-class, must be the same; near ties may fall either way.
DECISION_AGREEMENT = {"float32": 0.995, "bfloat16": 0.9}


@torch.no_grad()
def measure_fidelity(
    store: Store, images: Callable[[int], ImageBlock], teacher: Teacher, num_rows: int, device: torch.device
) -> Fidelity:
    """Run the teacher on at least `num_rows` stored rows (all, if there are fewer), joined and rendered as in stage 2.

    Args:
        images: gives the images of a block of the store.

    Raises StoreCorrupt when a logit is further from the teacher's than codec and arithmetic explain, or when decisions
    are not the teacher's.
    """
    identity = store.identity
    points: list[TapPoint] = [about.config for about in identity.decisions.values()]
    tables = {name: tables_on(store, name, device) for name in identity.decisions}
    codec_tables = codec_tables_on(store, torch.device("cpu"))
    stored, live, labels = [], [], []
    same: dict[str, list[Tensor]] = {name: [] for name in identity.decisions}
    likeliest: dict[str, list[Tensor]] = {name: [] for name in identity.decisions}
    with progress("fidelity", num_rows, "rows") as meter:
        for block, rows in _sample(store, images, num_rows):
            for start in range(0, len(rows.labels), teacher.batch_size):
                part = rows.take(slice(start, start + teacher.batch_size))
                choice, (signal,) = part.view, part.signal
                assert signal.logits is not None
                pixels = torch.from_numpy(render_some(block, choice, identity.views, identity.seen_size[0])).to(device)
                logits, maps = teacher.logits_and_maps(pixels, points)
                live.append(logits.cpu())
                stored.append(identity.codec.decode(signal.logits, identity.num_classes, codec_tables))
                labels.append(part.labels)
                for (name, about), features in zip(identity.decisions.items(), maps, strict=True):
                    again = pack(about.config, features, part.labels.to(device), tables[name])
                    array = "subclass" if isinstance(about.config, SubclassDecisions) else "id"
                    kept = signal.decisions[name][array].long()
                    equal = kept == again[array].cpu()
                    same[name].append((equal if array == "subclass" else equal[..., 0]).flatten())
                    if "prob" in signal.decisions[name]:
                        probs = unpack_probs(signal.decisions[name]["prob"])
                        likeliest[name].append(torch.stack([probs[..., 0].flatten(), 1 - probs.sum(-1).flatten()]))
                meter.advance(len(part.labels))
    z_t, z, y = torch.cat(live), torch.cat(stored), torch.cat(labels)
    found = identity.codec.compare(z, z_t, store.codec_tables, identity.teacher.dtype)
    if (found.differences > found.allowed).any():
        worst = (found.differences - found.allowed).flatten().argmax()
        raise StoreCorrupt(
            f"{store.place}: the teacher run again on {len(z)} stored views differs from the store by up to "
            f"{found.differences.max():.4g}, codec and arithmetic explain {found.allowed.flatten()[worst]:.4g}. The "
            "targets are not those of this teacher for these images: delete the store, check data and weights, and "
            "capture again."
        )
    decisions: dict[str, dict[str, float]] = {}
    for name in identity.decisions:
        decisions[name] = {"agreement": torch.cat(same[name]).float().mean().item()}
        if decisions[name]["agreement"] < DECISION_AGREEMENT[identity.teacher.dtype]:
            raise StoreCorrupt(
                f"{store.place}: only {decisions[name]['agreement']:.2%} of the decisions '{name}' are those that the "
                "teacher takes again: delete the store, check data and weights, and capture again."
            )
        if likeliest[name]:
            first, dropped = torch.cat(likeliest[name], dim=1)
            decisions[name] |= {"mean_first_probability": first.mean().item(), "mean_dropped": dropped.mean().item()}
            decisions[name] |= {"max_dropped": dropped.max().item()}
    return Fidelity(
        rows=len(z),
        teacher_top1=100 * (z.argmax(1) == y).float().mean().item(),
        mean_top1_probability=z.softmax(1).amax(1).mean().item(),
        mean_error=found.errors.mean().item(),
        max_error=found.errors.max().item(),
        max_error_allowed=float(found.allowed.max()),
        **distortion(z_t, z),
        decisions=decisions,
    )


def distortion(z_t: Tensor, z: Tensor) -> dict[str, Any]:
    """How far decoded logits `[n, C]` are from the teacher's, as the objectives would notice: fields of `Fidelity`."""

    def dtkd_temperature(x: Tensor) -> Tensor:
        """Of the teacher, beside a student that is as sharp as the teacher really is."""
        v = z_t.amax(1)
        return torch.where((x * v) > 0, 2 * x / (x + v), 2.0)

    return {
        "top1_agreement": (z.argmax(1) == z_t.argmax(1)).float().mean().item(),
        "kl": {f"{t}": kd(z, z_t, temperature=t).clamp(min=0).item() / t**2 for t in TEMPERATURES},
        "total_variation": {
            f"{t}": ((z / t).softmax(1) - (z_t / t).softmax(1)).abs().sum(1).mean().item() / 2 for t in TEMPERATURES
        },
        "wttm_weight_error": max(
            (power_sum(z, gamma) / power_sum(z_t, gamma) - 1).abs().mean().item() for gamma in GAMMAS
        ),
        "dtkd_temperature_error": (dtkd_temperature(z.amax(1)) - 1).abs().mean().item(),
    }


def _sample(store: Store, images: Callable[[int], ImageBlock], num_rows: int) -> Iterator[tuple[ImageBlock, Rows]]:
    """Rows of up to MAX_BLOCKS evenly spaced blocks, with other views in every round, until there are enough."""
    identity = store.identity
    count = min(MAX_BLOCKS, len(store.blocks))
    blocks = [store.blocks[index * len(store.blocks) // count] for index in range(count)]
    each = -(-num_rows // count)
    taken = 0
    for turn in range(identity.views.num_views):
        for number in blocks:
            if taken >= num_rows:
                return
            first = counter_hash(FIDELITY_STREAM, number).item() % len(identity.groups)
            group = (first + turn) % len(identity.groups)
            block = as_stored(store, images(number))
            draws = counter_hash(FIDELITY_STREAM, number, block.key_hash)
            position = ((draws + np.uint64(turn // len(identity.groups))) % len(identity.groups[group])).astype(
                np.int64
            )
            rows = join(store, block, group, position, Wanted(decisions=list(identity.decisions)))
            rows = rows.take(draws.argsort()[:each])
            taken += len(rows.labels)
            yield block, rows
