"""The operation that `docs/extending/operation.md` adds, through the command line."""

import pytest
from extending import extended, run_extended
from pictures import command_line, make_samples, photographs, views_of

from offline_kd.views.augment import RandAugment


@pytest.mark.slow
def test_a_new_operation_is_drawn_stored_and_rendered_again_where_a_recipe_names_it(tmp_path):
    package, store = extended("operation", tmp_path), tmp_path / "store"
    augment = RandAugment(kind="randaugment", num_ops=1)
    recipe, manifest = photographs(tmp_path, make_samples(), views=views_of(augment=augment, jitter=None, mixing=None))
    file, where = command_line(tmp_path, recipe, manifest)
    chosen = ["--set", "views.augment.operations=[rotate, channel_swap]"]

    done = run_extended(package, "cache-teacher", file, "--store", store, *chosen, *where)
    assert done.returncode == 0, done.stderr
    assert "channel_swap" in (store / "README.md").read_text()
    assert "23: channel_swap" in (store / "targets.zarr" / "view" / "op" / "zarr.json").read_text()

    # Stage 2 renders the probes of the store again, and compares them with what the teacher saw.
    run = ["--out", tmp_path / "run", "--objective", "kd", "--set", "training.epochs=1"]
    done = run_extended(package, "distill", file, "--store", store, *run, *chosen, *where)
    assert done.returncode == 0, done.stderr

    typo = ["--set", "views.augment.operations=[chanel_swap]"]
    wrong = run_extended(package, "cache-teacher", file, "--store", store, *typo, *where)
    assert wrong.returncode == 1
    assert "unknown operation 'chanel_swap'. Did you mean 'channel_swap'?" in wrong.stderr
