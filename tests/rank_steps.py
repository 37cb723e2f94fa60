"""Steps of training, by one process or by the ranks that torchrun starts:

    torchrun --nproc-per-node 2 rank_steps.py WORK.json OUT.json

WORK.json: `cases` that `steps_of` takes, then `commands`: arguments of the command line in which `{rank}` stands for
the rank. OUT.json: for every case the losses and the ids of every step, of all ranks.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from offline_kd.cli.main import main
from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.loader import Loader
from offline_kd.distill.loop import train_step
from offline_kd.distill.loss import term_weights
from offline_kd.distill.optimisation import learning_rate, make_optimizer, set_learning_rate
from offline_kd.distill.student import among_ranks
from offline_kd.distill.training import prepare
from offline_kd.recipe import load_recipe
from offline_kd.store.rows import Rows
from offline_kd.support.places import Folder
from offline_kd.support.ranks import joined, of_all, rank, total, world

CPU = torch.device("cpu")


def steps_of(
    recipe: str,
    manifest: str,
    root: str,
    store: str,
    objective: str,
    steps: int,
    uneven: bool,
    sets: list[str],
    double: bool = False,
) -> list[dict[str, Any]]:
    """The losses of the terms and the ids of the rows, for each of the first steps of a run.

    Args:
        uneven: share out the batches of one process: one row against all others, half of them, or none.
        double: train in float64, where the roundings of a deep network with BatchNorm take longer to be seen.
    """
    read = load_recipe(Path(recipe), ["training.sync_batchnorm=true", *sets])
    options = {"objective": objective, "stores": [store] if store else [], "online": not store and objective != "ce"}
    run, student, loader, _, ask = prepare(
        read, load_manifest(Path(manifest)), data_roots([Path(root)]), Folder(Path("unused")), CPU, options
    )
    if uneven:
        loader = Loader(loader.source, replace(loader.options, rank=0, world=1), CPU)
    if double:
        student.network.double().register_forward_pre_hook(lambda network, inputs: (inputs[0].double(),))
    student = among_ranks(student, read.training, CPU)
    optimizer, found = make_optimizer(read.training, student.network, list(student.heads.values())), []
    student.network.train()
    for epoch, batch in batches(loader, steps):
        mine = share(batch) if uneven else batch
        set_learning_rate(optimizer, learning_rate(read.training, epoch + batch.step / loader.steps_per_pass))
        weights = term_weights(run.terms, epoch, read.training.epochs, CPU)
        with patch.object(torch.Tensor, "float", torch.Tensor.double if double else torch.Tensor.float):
            _, parts = train_step(run, student, optimizer, mine, ask(mine), weights)
        ids = sorted(one for of_rank in of_all(mine.key_hash.tolist()) for one in of_rank)
        found.append({"losses": total(parts).tolist(), "ids": ids})
    return found


def batches(loader: Loader, steps: int) -> Iterator[tuple[int, Rows]]:
    done, epoch = 0, 0
    while True:
        for batch in loader.epoch(epoch):
            if done == steps:
                return
            done += 1
            yield epoch, batch
        epoch += loader.views_per_decode


def share(batch: Rows) -> Rows:
    """The rows of this rank of two."""
    if world() == 1:
        return batch
    first = (1, len(batch) // 2, len(batch))[batch.step % 3]
    return batch.take(slice(0, first) if rank() == 0 else slice(first, len(batch)))


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    with joined(CPU):
        found = [steps_of(**case) for case in work["cases"]]
        if rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(found))
    for command in work["commands"]:
        main([argument.replace("{rank}", os.environ["RANK"]) for argument in command], standalone_mode=False)
