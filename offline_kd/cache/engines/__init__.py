"""Ways of running stage 1: how the open blocks of a capture reach the processes that do them.

An engine is a module with one function, `run`, made known by its line in `ENGINES`; `cache-teacher --engine NAME`
chooses it. A module is named and not imported here, so that the command line lists engines without loading PyTorch.

`run(capture, addition, blocks)` gets

- `capture`, a `cache.job.Capture`: recipe, images, teacher, device and the address of the store. It can be pickled and
  sent to other processes, network and all;
- `addition`, the name of what is captured: "" for what the store was created with. Its tables are committed;
- `blocks`, the numbers of the blocks to do, in this writer's order. Some view groups of some of them may be committed
  already, and other writers of the same store may commit more meanwhile.

When it returns, every view group of these blocks is committed, by whomever: a capture of which something is missing is
not finished. Blocks may come in any order, in any process, and more than once, since a ledger entry is created
exclusively: at least once is enough. `cache.work` has what an engine needs: `open_work`, and `capture_block` for one
block. What an engine cannot do is raised as an OfflineKDError; a block that fails fails the capture.

Keyword-only parameters of `run` are the engine's options: `max_actors` is `--max-actors`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from offline_kd.support.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from offline_kd.cache.job import Capture

Engine: TypeAlias = "Callable[[Capture, str, Sequence[int]], None]"
EngineOption: TypeAlias = str | int | float

DEFAULT_ENGINE = "local"
ENGINES = {
    "local": "offline_kd.cache.engines.local",
    "ray": "offline_kd.cache.engines.ray",
}


def find_engine(name: str, options: Mapping[str, EngineOption] | None = None) -> Engine:
    """The engine of that name, with its options. Raises RecipeError where there is none, or it has no such option."""
    if name not in ENGINES:
        raise RecipeError(f"--engine {name}: no such engine.{did_you_mean(name, ENGINES)}")
    run = import_module(ENGINES[name]).run
    known = {key for key, about in inspect.signature(run).parameters.items() if about.kind is about.KEYWORD_ONLY}
    for option in options or {}:
        if option not in known:
            flags = " Its options: " + ", ".join(f"--{key.replace('_', '-')}" for key in sorted(known)) + "."
            raise RecipeError(
                f"--{option.replace('_', '-')}: engine '{name}' has no such option.{flags if known else ''}"
            )
    return partial(run, **options or {})
