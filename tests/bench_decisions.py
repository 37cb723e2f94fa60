"""What decisions on K templates cost: as they are made, as they were made before, and beside the teacher's own time.

    python tests/bench_decisions.py [--rounds 9] [--threads 2]

64 maps of 8x8 locations; features and templates are made up, at the distances that CIFAR-10 has in ResNet-56 (40 to the
nearest of 4,096 templates, 170 to the 512th, 2,000 to the furthest): exponentials that underflow are the slow ones.
Parts are timed in turn, round after round; times are the processor's, their minimum over the rounds, and ratios the
median of those within a round. What else the machine does still changes them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from offline_kd.cache.kmeans import _highest
from offline_kd.cli.main import keep_freed_memory
from offline_kd.models.networks import build
from offline_kd.store.decisions import CHUNK_ELEMENTS, TemplateDecisions, decide, pack

TOP, CANDIDATES = 4, 8


def made_up(num: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Features `[64, D, 8, 8]`, templates `[num, D]`."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(num, 4, generator=generator) * (torch.rand(num, 1, generator=generator) + 0.5)
    templates = (few @ torch.randn(4, dimensions, generator=generator)).relu()
    templates *= (200 / templates.square().sum(dim=1).mean()).sqrt()
    away = 11 / dimensions**0.5 * torch.rand(4096, 1, generator=generator)
    x = templates[torch.randint(num, (4096,), generator=generator)]
    x = x + away * torch.randn(4096, dimensions, generator=generator)
    return x.view(64, 8, 8, dimensions).permute(0, 3, 1, 2).contiguous(), templates


def as_before(features: Tensor, centroids: Tensor) -> list[Tensor]:
    """Ids, probabilities and dropped mass: a softmax over all, topk of the 512 of the 8 best groups."""
    x = features.permute(0, 2, 3, 1).flatten(0, 2)
    half_squares = centroids.square().sum(dim=1) / 2
    size = max(CHUNK_ELEMENTS["cpu"] // len(centroids), 64)
    workspace = x.new_empty(2, min(size, len(x)), len(centroids))
    parts = []
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        closeness, shares = workspace[:, : len(rows)]
        torch.addmm(half_squares, rows, centroids.T, beta=-2, alpha=2, out=closeness)
        candidates = _largest_before(closeness)
        exact = -(rows[:, None] - centroids[candidates]).square().sum(dim=2)
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        torch.softmax(closeness, dim=1, out=shares)
        others = (1 - shares.gather(1, candidates).sum(dim=1)).clamp(min=0)
        log_total = torch.logsumexp(exact, dim=1) - torch.log1p(-others)
        probs = (exact - log_total[:, None]).exp()
        parts.append((candidates.gather(1, order[:, :TOP]), probs[:, :TOP], probs[:, TOP:].sum(dim=1) + others))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _largest_before(values: Tensor) -> Tensor:
    rows, columns = values.shape
    if columns < 128 * CANDIDATES:
        return values.topk(CANDIDATES, dim=1).indices
    grouped = values.view(rows, columns // 64, 64)
    groups = grouped.amax(dim=2).topk(CANDIDATES, dim=1).indices
    of_groups = grouped.gather(1, groups[:, :, None].expand(-1, -1, 64)).flatten(1)
    place = of_groups.topk(CANDIDATES, dim=1).indices
    return groups.gather(1, place // 64) * 64 + place % 64


def in_turn(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every part in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, part in parts.items():
            start = time.process_time()
            part()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def decisions_beside_the_teacher(ask: Callable[[], object], num: int, dimensions: int, rounds: int) -> None:
    features, centroids = made_up(num, dimensions)
    config = TemplateDecisions(kind="templates", module="any", templates=num, top=TOP)
    labels, tables = torch.zeros(64, dtype=torch.int64), {"centroids": centroids}
    found, before = decide(features, centroids, top=TOP, temperature=1.0), as_before(features, centroids)
    pairs = zip((found.ids, found.probs, found.dropped), before, strict=True)
    same = all(torch.equal(one.flatten(), other.flatten()) for one, other in pairs)
    took = in_turn(
        {
            "teacher": ask,
            "before": lambda: as_before(features, centroids),
            "now": lambda: pack(config, features, labels, tables),
        },
        rounds,
    )
    print(
        f"K = {num:5}, D = {dimensions:3}: "
        + ", ".join(f"{name} {min(seconds) * 1000:6.1f} ms" for name, seconds in took.items())
        + f"; before / now {ratio(took['before'], took['now']):.2f}"
        + f"; of the teacher's time {ratio(took['before'], took['teacher']):.0%}"
        + f" -> {ratio(took['now'], took['teacher']):.0%}; {'the same bits' if same else 'other bits'}",
        flush=True,
    )


def assignment_of_kmeans(rounds: int) -> None:
    features, centroids = made_up(4096, 64)
    x = features.permute(0, 2, 3, 1).flatten(0, 2)[:256]
    half_squares = centroids.square().sum(dim=1) / 2
    took = in_turn(
        {
            "before": lambda: [torch.addmm(-half_squares, x, centroids.T).max(dim=1) for _ in range(16)],
            "now": lambda: [_highest(torch.addmm(-half_squares, x, centroids.T)) for _ in range(16)],
        },
        rounds,
    )
    print(f"nearest of 4,096 templates, as K-means asks for it: before / now {ratio(took['before'], took['now']):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command line does
    with torch.no_grad():
        network, images = build("cifar:resnet56", 10).eval(), torch.randn(64, 3, 32, 32)
        for dimensions in (64, 256):
            for num in (256, 1024, 4096):
                decisions_beside_the_teacher(lambda: network(images), num, dimensions, arguments.rounds)
        assignment_of_kmeans(arguments.rounds)
