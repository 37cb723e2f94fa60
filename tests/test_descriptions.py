"""Recipes, manifests and overrides, whoever wrote them: read as they were meant, or refused with one line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import yaml
from conftest import RECIPE, ROOT, invoke, make_recipe, merged, refused
from hypothesis import strategies as st

from offline_kd.cli.bench_material import parse_codec
from offline_kd.data.manifest import data_roots
from offline_kd.distill.loop import Result
from offline_kd.distill.report import summarise, table
from offline_kd.distill.report_page import write_report
from offline_kd.distill.run_records import group_runs, read_runs
from offline_kd.recipe import Recipe, dump_recipe, load_recipe
from offline_kd.support.errors import RecipeError
from offline_kd.support.strict_yaml import MAX_DEPTH, parse_yaml


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(make_recipe()))
    return file


# ---- YAML ------------------------------------------------------------------------------------------------------------

SPLIT = "{tars: [{file: %s, count: 1}]}"
TWO_SPLITS = f"""datasets:
  photos:
    folder: photos
    classes: [a, b]
    splits:
      train: {SPLIT % "a.tar"}
    splits:
      val: {SPLIT % "b.tar"}
"""


def test_a_key_that_stands_twice_is_named_wherever_yaml_is_read(recipe_file, tmp_path, where):
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(TWO_SPLITS)
    for command in (["data", "list"], ["data", "check", "photos"], ["store", "info", "x"]):
        message = refused(*command, "--manifest", manifest)
        assert "manifest.yaml: not readable as YAML: line 7, column 5: key 'splits' stands twice" in message
    recipe_file.write_text(recipe_file.read_text() + "seeds: [3]\n")
    assert "key 'seeds' stands twice" in refused("run", recipe_file, "--out", tmp_path / "out", *where)
    twice = "views={kind: none, kind: none}"
    with pytest.raises(RecipeError, match=r"--set views.*key 'kind' stands twice"):
        load_recipe(ROOT / "pipelines/digits.yaml", [twice])
    with pytest.raises(RecipeError, match=r"codec .*key 'name' stands twice"):
        parse_codec("{name: f16, 'name': f32}")


def nested(brackets: int) -> str:
    return "[" * brackets + "]" * brackets


def aliases(value: str) -> str:
    """Nine lines that stand for 9**9 values."""
    lines = [f"a0: &a0 {value}"]
    return "\n".join(lines + [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested(5_000), f"nested more than {MAX_DEPTH} deep"),
        (nested(50_000), f"nested more than {MAX_DEPTH} deep"),  # libyaml alone ends the process
        ("{a: " * 60 + "}" * 60, f"nested more than {MAX_DEPTH} deep"),
        (aliases("[x]"), "values, aliases written out"),
        (aliases("{k: 1}").replace("[", "{<<: [").replace("]", "]}"), "values, aliases written out"),
        ("&a [*a]", "alias '*a' means nothing that was whole before it"),
        ("!!int abc", "is not read"),
        ("!!python/object:os.system x", "is not read"),
        ("2020-13-45", "month must be in 1..12"),
        ("9" * 5_000, "a number of more than 64 digits"),
        ("1" + ":59" * 5_000, "a number of more than 64 digits"),
        ("0b_", "not readable as YAML"),
        ("[a]: 1", "not readable as YAML"),
        ("a\0b", "not readable as YAML"),
        ("\udcff", "not readable as YAML"),
        ("a: 1\n---\na: 2", "not readable as YAML"),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_yaml_is_one_short_line(text, message, recipe_file, tmp_path, where):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [f"name={text}"])
    assert str(caught.value).startswith("--set name=")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    recipe_file.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert len(refused("run", recipe_file, "--out", tmp_path / "out", *where)) < 600


def test_merge_keys_and_aliases_are_read_as_yaml_means_them():
    text = "a: &a {k: 1, l: 2}\nb: {<<: *a, k: 3}\nc: &c x\nd: [*c, *c]"
    assert parse_yaml(text, where="here") == yaml.safe_load(text)


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False) | st.text(max_size=90)
NESTED = st.recursive(
    PLAIN, lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text(max_size=9), one), max_leaves=9
)


@hypothesis.given(content=NESTED, flow=st.sampled_from([True, False, None]))
def test_what_is_written_as_yaml_is_read_again(content, flow):
    text = yaml.safe_dump(content, default_flow_style=flow)
    assert parse_yaml(text, where="here") == yaml.safe_load(text)


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objectives.kd.9.temperature=3", "'9' is no position in a list of 2"),
        ("objectives.kd.x.temperature=3", "'x' is no position in a list of 2"),
        ("objectives.kd.²=3", "'²' is no position in a list of 2"),
        (f"objectives.kd.{'9' * 5_000}.temperature=3", "is no position in a list of 2"),
        ("=3", "write path.to.field=value"),
        ("data..root=3", "write path.to.field=value"),
        ("a." * 2_000 + "a=3", "no recipe is deeper"),
        ("name.x=1", "'name' has no fields"),
        (f"name={'n' * 5_000}", "at most 100 characters"),
        (f"{'n' * 5_000}=1", "unknown field 'nnn"),
        (f"extends={'n' * 5_000}", "unknown field 'extends'"),
        (f"student={{model: {'n' * 5_000}, x: 1}}", "unknown field 'student.x'"),
        ("seeds=[-1]", "'seeds.0': Input should be greater than or equal to 0, got -1"),
        (f"seeds=[{2**70}]", "'seeds.0': Input should be less than"),
        (f"views.seed={2**70}", "Input should be less than"),
        (f"training.epochs={2**70}", "'training.epochs': Input should be less than"),
        (f"data.workers={2**40}", "'data.workers': Input should be less than"),
        ("views={kind: %s}" % ("n" * 5_000), "unknown name 'nnn"),
    ],
    ids=lambda text: text[:32],
)
def test_impossible_overrides_are_one_short_line(override, message, recipe_file, tmp_path, where):
    said = refused("run", recipe_file, "--out", tmp_path / "out", *where, "--set", override)
    assert message in said
    assert "n" * 400 not in said  # what is known may be listed, what was typed is cut
    assert not (tmp_path / "out").exists()


def test_an_override_changes_its_field_alone(tmp_path):
    """Parts that YAML aliases share are written once and meant twice."""
    kd = {"kd": [{"term": "kd", "temperature": 4}]}
    text = yaml.safe_dump(merged(RECIPE, {"objectives": kd}), sort_keys=False)
    text = text.replace("- term: kd\n", "- &term\n    term: kd\n") + "  other: [*term]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    changed = load_recipe(tmp_path / "recipe.yaml", ["objectives.kd.0.temperature=2"])
    assert changed.objectives["kd"][0].temperature == 2
    assert changed.objectives["other"][0].temperature == 4


def test_names_longer_than_a_file_may_have_are_one_line(recipe_file, tmp_path, where):
    long = "n" * 5_000
    out = ("--out", tmp_path / "out")
    assert "no such recipe" in refused("run", long, *out, *where)
    assert "no such manifest" in refused("data", "list", "--manifest", long)
    assert "no such folder" in refused("data", "list", "--data-root", long)
    assert "no dataset" in refused("data", "check", long, *where)
    assert "no such folder" in refused("data", "pack", "imagefolder", "--source", long, "--out", tmp_path / "packed")
    assert "not a run directory" in refused("report", long, *out)
    recipe_file.write_text(f"extends: {long}\n")
    assert "no such recipe" in refused("run", recipe_file, *out, *where)


# ---- the report ------------------------------------------------------------------------------------------------------


def finished_run(folder: Path, recipe: Recipe, objective: str, seed: int, **changes: object) -> Path:
    """A run directory as `fit` leaves it, without the training."""
    result = Result(
        recipe=recipe.name,
        objective=objective,
        targets="none" if objective in ("ce", "teacher") else "store",
        seed=seed,
        top1=50.0 + seed,
        best_top1=60.0,
        nll=1.0,
        ece=0.1,
        epochs=2,
        steps=2,
        parameters=1000,
        kd_layer_parameters=0,
        seconds_per_epoch=1.0,
        seconds_per_step=1.0,
        images_per_second=1.0,
        dtkd_fallbacks=0,
        store_digest="" if objective in ("ce", "teacher") else "ab" * 32,
        student_sha256=f"{folder.name}-{seed}",
    )
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "result.json").write_text(json.dumps(replace(result, **changes).__dict__))
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "top1": 40.0}\n{"epoch": 2, "top1": 50.0}\n')
    return folder


def with_gamma(gamma: float) -> Recipe:
    return make_recipe(objectives={"wttm": [{"term": "ce"}, {"term": "wttm", "weight": 2, "gamma": gamma}]})


def shown(folders: list[Path]) -> tuple[list[str], list[list[str]]]:
    columns, rows = table(summarise(group_runs(read_runs(folders))))
    where = columns.index("top-1 %")
    return columns[1 : columns.index("targets")], [[*row[: where - 2], *row[where - 1 : where + 1]] for row in rows]


def test_runs_of_other_hyperparameters_have_rows_of_their_own(tmp_path):
    folders = [finished_run(tmp_path / f"ce-{seed}", with_gamma(0.1), "ce", seed) for seed in (0, 1)]
    for gamma in (0.1, 1.0):
        for seed in (0, 1):
            name = f"wttm-{gamma}-{seed}"
            folders.append(finished_run(tmp_path / name, with_gamma(gamma), "wttm", seed, top1=50 + 10 * gamma + seed))
    columns, rows = shown(folders)
    assert columns == ["wttm.gamma"]
    assert rows == [
        ["ce", "-", "2", "50.50 ± 0.71"],
        ["wttm", "0.1", "2", "51.50 ± 0.71"],
        ["wttm", "1.0", "2", "60.50 ± 0.71"],
    ]
    page = tmp_path / "page.html"
    assert invoke("report", *folders, "--out", page).exit_code == 0
    assert 'data-column="wttm.gamma"' in page.read_text()


def test_what_changes_no_student_makes_no_rows(tmp_path):
    """Where data lies, how many workers read it, what the recipe is called, which seeds it lists."""
    elsewhere = make_recipe(name="other", seeds=[7], data={"root": "/elsewhere", "workers": 3}, store="s3://bucket/kd")
    folders = [finished_run(tmp_path / "a", make_recipe(), "kd", 0), finished_run(tmp_path / "b", elsewhere, "kd", 1)]
    assert shown(folders) == ([], [["kd", "2", "50.50 ± 0.71"]])


def test_other_stores_and_other_recipes_of_students_are_columns(tmp_path):
    longer = make_recipe(training={"epochs": 9})
    teacher = make_recipe(training={"epochs": 77})
    folders = [
        finished_run(tmp_path / "a", make_recipe(), "kd", 0),
        finished_run(tmp_path / "b", make_recipe(), "kd", 1, store_digest="cd" * 32),
        finished_run(tmp_path / "c", longer, "ttm", 0),
        finished_run(tmp_path / "d", teacher, "teacher", 0),
    ]
    columns, rows = shown(folders)
    assert columns == ["training.epochs", "store"]
    assert rows == [
        ["kd", "2", "abababab", "1", "50.00"],
        ["kd", "2", "cdcdcdcd", "1", "51.00"],
        ["ttm", "9", "abababab", "1", "50.00"],
        ["teacher", "77", "-", "1", "50.00"],
    ]
    assert shown([folders[0], folders[3]])[0] == []  # a teacher is trained in its own way


def test_one_student_counts_once_however_often_it_is_named(tmp_path):
    first = finished_run(tmp_path / "a", make_recipe(), "kd", 0)
    again = finished_run(tmp_path / "b", make_recipe(), "kd", 0, student_sha256="a-0", seconds_per_epoch=2.0)
    second = finished_run(tmp_path / "c", make_recipe(), "kd", 1)
    assert shown([first, first / ".", again, second])[1] == [["kd", "2", "50.50 ± 0.71"]]


def test_a_run_without_curve_has_a_row_and_damaged_files_are_one_line(tmp_path):
    run, page = finished_run(tmp_path / "run", make_recipe(), "kd", 0), tmp_path / "page.html"
    (run / "metrics.jsonl").unlink()
    result = invoke("report", run, "--out", page)
    assert result.exit_code == 0
    assert "metrics.jsonl: missing, so the curve of this run is left out" in result.stderr
    assert "│ kd" in result.stdout
    whole = finished_run(tmp_path / "whole", make_recipe(), "ce", 0)
    write_report(page, "two", summarise(group_runs(read_runs([run, whole]))))
    for name, content in (
        ("metrics.jsonl", '{"epoch": 1, "top1": 40.0}\n{"epo'),
        ("metrics.jsonl", '{"top1": 40.0}\n'),
        ("metrics.jsonl", nested(100_000)),
        ("result.json", '{"objective": "kd"'),
        ("result.json", "[]"),
        ("result.json", '{"objective": "kd"}'),
        ("result.json", (run / "result.json").read_text().replace("50.0", "NaN")),
        ("recipe.yaml", "a: ["),
        ("recipe.yaml", "name: x"),
    ):
        before = (run / name).read_text() if (run / name).exists() else None
        (run / name).write_text(content)
        message = refused("report", run, "--out", page)
        assert name in message
        if before is None:
            (run / name).unlink()
        else:
            (run / name).write_text(before)
    (run / "recipe.yaml").unlink()
    assert "no recipe.yaml" in refused("report", run, "--out", page)


# ---- where data lies -------------------------------------------------------------------------------------------------


def test_a_data_root_that_is_no_folder_and_no_url_is_refused_everywhere(recipe_file, tmp_path, where, monkeypatch):
    from test_end_to_end import all_commands

    from offline_kd.cli import main as cli

    takes = [path for path, one in all_commands(cli.main) if any(option.name == "data_root" for option in one.params)]
    assert len(takes) >= 15
    for path in takes:
        for url in ("ftp://example.org/data", "S3://team/data", "file:///data", "s3:/team/data"):
            message = refused(*path, "--data-root", url)
            assert url in message
            assert "s3, gs, az, http, https" in message
    assert "no such folder" in refused("data", "list", "--data-root", tmp_path / "none")
    run = ("run", recipe_file, "--out", tmp_path / "out", *where)
    assert "'ftp://' is not known" in refused(*run, "--set", "data.root=ftp://team/data")
    monkeypatch.setenv("OFFLINE_KD_DATA", f"{tmp_path}{os.pathsep}file:///data")
    assert "data root file:///data: 'file://' is not known" in refused(*run)


def test_urls_stand_beside_folders_in_the_environment(monkeypatch):
    entries = ["/a", "s3://team/data", "https://host:8080/x", "http://host:9000", "b/c", "gs://d", "az://e/f", "8080/x"]
    monkeypatch.setenv("OFFLINE_KD_DATA", os.pathsep.join(entries))
    found = data_roots(["https://first/x/"])
    assert [str(root) for root in found] == ["https://first/x", *entries, "data"]
    kinds = [type(root).__name__.removeprefix("Posix") for root in found]
    assert kinds == ["Web", "Path", "Bucket", "Web", "Web", "Path", "Bucket", "Bucket", "Path", "Path"]
