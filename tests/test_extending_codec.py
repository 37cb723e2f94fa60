"""`docs/extending/codec.md`: one file and one line, and both stages know another codec."""

import json
import shutil

import pytest
from conftest import ROOT
from extending import extended, run_extended


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = extended("codec", tmp_path_factory.mktemp("codec"))
    shutil.copy(ROOT / "tests" / "networks.py", folder)  # the networks that the recipe names
    return folder


@pytest.mark.slow
def test_a_codec_of_ones_own_is_captured_proven_shown_compared_and_refused(folder, recipe_file, where):
    def run(*arguments: object) -> str:
        done = run_extended(folder, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    store, one_tar = folder / "store", ("--set", "data.tars=[2]")
    run("cache-teacher", recipe_file, "--store", store, *one_tar, "--set", "capture.codec={name: bf16}", *where)
    assert json.loads((store / "store.json").read_text())["codec"] == {"name": "bf16"}
    run("store", "verify", store)
    facts = json.loads(run("store", "info", store, "--json"))
    assert facts["codecs"] == {"logits": {"name": "bf16"}}
    assert {"kd", "wttm"} <= set(facts["serves"])
    assert "dtkd" not in facts["serves"]
    assert "| codec | bf16 |" in (store / "README.md").read_text()

    command = ("distill", recipe_file, "--store", store, *one_tar, *where)
    run(*command, "--objective", "kd", "--out", folder / "kd")
    refused = run_extended(folder, *command, "--objective", "dtkd", "--out", folder / "dtkd")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    message = refused.stderr.strip().splitlines()[-1]
    assert "codec {'name': 'bf16'} does not serve term 'dtkd', whose temperatures want more than 8 bits" in message
    typo = ("--objective", "kd", "--out", folder / "typo", "--set", "capture.codec={name: bf61}")
    misspelt = run_extended(folder, *command, *typo)
    assert "unknown name 'bf61'. Did you mean 'bf16'?" in misspelt.stderr


def test_bench_codecs_lists_a_codec_of_ones_own(folder, store_path):
    done = run_extended(folder, "bench", "codecs", store_path, "--rows", 2000, "--json")
    assert done.returncode == 0, done.stderr
    by_name = {one["codec"]: one for one in json.loads(done.stdout)}
    assert by_name["bf16"]["distortion"]["total_variation"]["1"] < 0.02
    assert by_name["f16"]["distortion"]["kl"]["1"] < by_name["bf16"]["distortion"]["kl"]["1"]
