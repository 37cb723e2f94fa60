"""Subsets of the training rows, and validation rows: which rows an epoch shows, and which it never does."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, RECIPE, invoke, make_recipe, merged, refused
from pictures import photographs, views_of
from safetensors.torch import load_file
from students import ended_after
from test_images import with_bad_ones
from test_ranks import torchrun

import offline_kd as okd
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data import blocks
from offline_kd.data.tars import hash_key
from offline_kd.distill.chosen_rows import choose_rows, is_validation
from offline_kd.distill.tracking import figures
from offline_kd.distill.training import prepare, training_images
from offline_kd.models.networks import normalise
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.store.opening import open_store
from offline_kd.support.places import Folder

ROWS = 414  # of the smallest tar of the digits
LOWEST = "{score: teacher_entropy, order: lowest, keep: 0.5}"


@pytest.fixture
def command(recipe_file, where, store_path) -> list[object]:
    """Two epochs on the smallest tar."""
    return ["distill", recipe_file, "--objective", "kd", "--store", store_path, "--set", "data.tars=[2]", *where]


@pytest.fixture(scope="module")
def keys(recipe, manifest, roots) -> list[str]:
    """Of that tar."""
    return training_images(recipe, manifest, roots).keys(2)


def written(file: Path, keys: list[str]) -> Path:
    file.write_text("".join(f"{key}\n" for key in keys))
    return file


def metrics(out: Path) -> list[dict[str, float]]:
    """What was measured of every pass, but for time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def result_of(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def same_student(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(out / "student.safetensors") for out in (one, other))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def prepared(recipe: Recipe, manifest, roots, store: Path | None, **data: object) -> tuple:
    """What a run of these data would do: its run, loader and what it is judged by."""
    training = recipe.training.model_copy(update={"resident": data.pop("resident", "never")})
    content = recipe.model_dump(mode="json")
    content["data"] |= data
    chosen = Recipe.model_validate(content).model_copy(update={"training": training})
    options = {"objective": "kd" if store else "ce", "stores": [str(store)] if store else []}
    run, _, loader, judged, _ = prepare(chosen, manifest, roots, Folder(Path("unused")), CPU, options)
    return run, loader, judged


def shown(loader, epoch: int = 0) -> list[int]:
    return [one for batch in loader.epoch(epoch) for one in batch.key_hash.tolist()]


# ---- subsets ---------------------------------------------------------------------------------------------------------


def test_a_subset_of_all_rows_trains_the_student_of_a_run_without_it(command, keys, tmp_path):
    file = written(tmp_path / "keys.txt", keys[::-1])
    subsets = {"all": [], "named": [f"data.subset={file}"], "scored": [f"data.subset={LOWEST.replace('0.5', '1')}"]}
    for name, sets in subsets.items():
        done = invoke(*command, *(word for one in sets for word in ("--set", one)), "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        assert metrics(tmp_path / name) == metrics(tmp_path / "all")
        assert same_student(tmp_path / name, tmp_path / "all")
    assert "rows" not in result_of(tmp_path / "all")
    assert {result_of(tmp_path / name)["rows"] for name in ("named", "scored")} == {ROWS}


def test_the_rows_of_a_score_are_those_of_the_csv_that_explore_writes(recipe, manifest, roots, store_path, tmp_path):
    """Streamed, resident and without a store an epoch shows each of them once, and nothing else."""
    assert invoke("store", "explore", store_path, "--out", tmp_path / "gallery").exit_code == 0
    with (tmp_path / "gallery" / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: float(row["entropy"]))
    expected = sorted(hash_key(row["key"]) for row in rows[: len(rows) // 2])
    text = tmp_path / "half.csv"
    with text.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[: len(rows) // 2])
    lowest = yaml.safe_load(LOWEST)
    runs = [
        prepared(recipe, manifest, roots, store_path, subset=lowest),
        prepared(recipe, manifest, roots, store_path, subset=lowest, resident="always"),
        prepared(recipe, manifest, roots, None, subset=str(text)),
    ]
    for run, loader, judged in runs:
        assert run.rows_sha256 == runs[0][0].rows_sha256
        assert judged.validation is None
        assert sorted(shown(loader, 1)) == expected
    order = shown(runs[0][1], 3)
    assert all(shown(loader, 3) == order for _, loader, _ in runs)
    highest, *_ = prepared(recipe, manifest, roots, store_path, subset=lowest | {"order": "highest"})
    assert highest.rows_sha256 != runs[0][0].rows_sha256


def test_images_that_are_not_chosen_are_not_decoded(recipe, manifest, roots, keys, monkeypatch):
    decoded = []
    decode = blocks.decode
    monkeypatch.setattr(blocks, "decode", lambda *given: decoded.append(given) or decode(*given))
    images = training_images(recipe, manifest, roots)
    hashes = np.array([hash_key(key) for key in keys[5:12]], dtype=np.uint64)
    some = images.only([hashes[:0], hashes[:0], hashes])
    assert (len(some), some.split.count, some[0].keys) == (1, 7, keys[5:12])
    assert len(decoded) == 7
    whole = images[2]
    assert torch.equal(some[0].images, whole.images[5:12])
    assert some[0].image_digest.tolist() == whole.image_digest[5:12].tolist()


def test_a_subset_of_photographs_is_the_same_from_store_and_tars_whether_or_not_it_has_bad_images(tmp_path):
    """Cut from views that are resampled; the third tar has none of the rows."""
    without_mixing = {"views": views_of(mixing=None)}
    recipe, manifest = photographs(tmp_path, with_bad_ones(), data={"bad_images": "skip"}, **without_mixing)
    cache_teacher(recipe, manifest, [tmp_path], tmp_path / "store", CPU)
    keys = [f"{number:04d}" for number in range(60)]
    file, good = tmp_path / "keys.txt", [key for key in keys if key not in ("0003", "0050", "0051")]
    for named, on_bad, images in ((keys, "skip", 57), (good, "fail", 57)):
        data = {"subset": str(written(file, named)), "bad_images": on_bad}
        streams = [prepared(recipe, manifest, [tmp_path], store, **data)[1] for store in (tmp_path / "store", None)]
        ours, others = ([*stream.epoch(0)] for stream in streams)
        assert sorted(one for batch in ours for one in batch.key_hash.tolist()) == sorted(map(hash_key, good))
        assert sum(len(batch.images) for batch in ours) == images
        for one, other in zip(ours, others, strict=True):
            assert np.array_equal(one.key_hash, other.key_hash)
            assert torch.equal(one.images, other.images)
        of_first = sum(key < "0040" for key in named)
        assert [tar.count for tar in streams[0].source.images.split.tars] == [of_first, len(named) - of_first]


def test_a_stopped_run_goes_on_with_the_rows_it_began_with_and_with_no_others(command, keys, tmp_path):
    file = written(tmp_path / "keys.txt", keys[::3])
    ours = [*command, "--set", f"data.subset={file}", "--set", "data.validation=0.1"]
    assert invoke(*ours, "--out", tmp_path / "whole").exit_code == 0
    with ended_after(2):
        assert invoke(*ours, "--out", tmp_path / "stopped").exit_code != 0
    written(file, keys[1::3])
    assert "holds a run of another recipe" in refused(*ours, "--out", tmp_path / "stopped")
    written(file, keys[::3][::-1])  # the same rows in another order, from another place
    moved = file.rename(tmp_path / "moved.txt")
    ours[ours.index(f"data.subset={file}")] = f"data.subset={moved}"
    went_on = invoke(*ours, "--out", tmp_path / "stopped")
    assert "resuming after epoch 1" in went_on.stderr, went_on.output
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert same_student(tmp_path / "stopped", tmp_path / "whole")
    left = [key for key in keys[::3] if not is_validation(np.array([hash_key(key)], dtype=np.uint64), 0.1)[0]]
    assert [line["images"] for line in metrics(tmp_path / "whole")] == [len(left)] * 2
    assert len(left) < len(keys[::3])


def test_subsets_that_cannot_be_are_refused_in_one_line(command, keys, tmp_path):
    def said(subset: object, *more: object) -> str:
        return refused(*command, "--set", f"data.subset={subset}", *more, "--out", tmp_path / "out")

    typo = keys[3] + "x"
    file = written(tmp_path / "keys.txt", [keys[0], typo, "nothing like it"])
    assert f"'{typo}' (and 1 more) is no key of the 414 training rows. Did you mean '{keys[3]}'?" in said(file)
    assert "keys.csv: no such file" in said(tmp_path / "keys.csv")
    (tmp_path / "keys.csv").write_text("name,entropy\na,1\n")
    assert "has no column 'key'" in said(tmp_path / "keys.csv")
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in said(file)
    assert "0 of the 414 rows of digits/train are left" in said(written(file, []))
    assert "unknown field 'data.subset" in said(LOWEST.replace("order", "ordre"))
    assert "'teacher_entropy', 'teacher_confidence'" in said(LOWEST.replace("teacher_entropy", "entropy"))
    assert "greater than 0" in said(LOWEST.replace("0.5", "0"))
    assert "left to train on" in said(LOWEST.replace("0.5", "0.001"))
    mixing = "views={kind: random_resized_crop, size: 8, scale: [0.5, 1], seed: 0, count: 2, mixing: {cutmix: 1}}"
    assert "these views mix images" in said(LOWEST, "--set", mixing)
    assert "labels which are to be hidden" in said("null", "--set", "data.labelled_fraction=0.5", "--set", mixing)
    assert "less than 1" in refused(*command, "--set", "data.validation=1", "--out", tmp_path / "out")
    tiny = refused(*command, "--set", "data.validation=0.000001", "--out", tmp_path / "out")
    assert "data.validation: 1e-06 of the 414 rows of digits/train is not one" in tiny
    plain = [word for word in command if word not in ("--store", command[5])]
    message = refused(*plain, "--objective", "ce", "--set", f"data.subset={LOWEST}", "--out", tmp_path / "out")
    assert "Give --store, to plain training too" in message
    assert not (tmp_path / "out").exists()


def test_a_file_of_keys_is_named_relative_to_the_recipe(tmp_path):
    (tmp_path / "recipes").mkdir()
    file = written(tmp_path / "recipes" / "keys.txt", ["a"])
    base = merged(RECIPE, {"data": {"subset": "keys.txt"}})
    (tmp_path / "recipes" / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "mine.yaml").write_text("extends: recipes/base.yaml\nname: mine\n")
    assert load_recipe(tmp_path / "mine.yaml").data.subset == str(file)
    assert make_recipe().model_dump(mode="json")["data"].keys().isdisjoint({"subset", "validation"})


# ---- validation ------------------------------------------------------------------------------------------------------


def test_validation_rows_are_never_trained_on_and_judge_every_epoch(command, manifest, roots, keys, tmp_path):
    sets = ["data.validation=0.2", "training.keep=[best]", "training.ema={decay: 0.5}", "training.epochs=3"]
    done = invoke(*command, *(word for one in sets for word in ("--set", one)), "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    lines, result = metrics(tmp_path / "run"), result_of(tmp_path / "run")
    assert ["top1" in line for line in lines] == [False, False, True]
    assert {"top1_ema", "nll", "ece"} <= lines[-1].keys()
    assert result["top1"] == result["best_top1"] == lines[-1]["top1"]
    assert result["val_top1"] == lines[-1]["val_top1"]
    found = [line["val_top1"] for line in lines]
    assert result["best_epoch"] == 1 + found.index(max(found))
    assert result["best_val_top1"] == max(found)
    told = figures(lines[-1])
    assert (told["val/top1"], told["test/top1"]) == (result["val_top1"], result["top1"])
    assert "test/top1" not in figures(lines[0])
    assert f"validation top-1 {found[0]:.2f} %" in done.stderr
    assert "val top-1 %" in done.stdout

    hashes = np.array([hash_key(key) for key in keys], dtype=np.uint64)
    cut = set(hashes[is_validation(hashes, 0.2)].tolist())
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    _, loader, judged = prepared(recipe, manifest, roots, command[5])
    for epoch in range(4):
        assert sorted(shown(loader, epoch)) == sorted(set(hashes.tolist()) - cut)
    block = judged.validation[0]
    assert set(block.key_hash.tolist()) == cut
    assert 60 < len(cut) < 110
    student = okd.load_student(tmp_path / "run", network="networks:small").network
    with torch.inference_mode():
        answers = student(normalise(block.images, recipe.data.normalisation)).argmax(1)
    assert result["val_top1"] == pytest.approx(100 * (answers == torch.from_numpy(block.labels)).float().mean().item())


def test_the_same_rows_are_cut_from_every_copy_of_the_images(recipe, manifest, roots, store_path):
    data = recipe.data.model_copy(update={"validation": 0.1})
    whole = training_images(recipe, manifest, roots)
    part = training_images(make_recipe(data={"tars": [2]}), manifest, roots)
    of_tars, of_store = (choose_rows(data, whole, stores) for stores in ([], [open_store(store_path)]))
    of_part = choose_rows(data, part)
    assert of_tars.sha256 == of_store.sha256
    for one, other in zip(of_tars.validation, of_store.validation, strict=True):
        assert set(one.tolist()) == set(other.tolist())
    assert of_part.validation[0].tolist() == of_tars.validation[2].tolist()


def test_a_teacher_that_the_recipe_trains_does_not_see_validation_rows_and_no_subset(
    where, manifest, roots, recipe, tmp_path
):
    content = merged(RECIPE, {"data": {"validation": 0.2, "subset": yaml.safe_load(LOWEST)}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    done = invoke("train", "--teacher", tmp_path / "recipe.yaml", "--out", tmp_path / "teacher", *where)
    assert done.exit_code == 0, done.output
    images = training_images(recipe, manifest, roots)
    rows = choose_rows(recipe.data.model_copy(update={"validation": 0.2}), images)
    result = result_of(tmp_path / "teacher")
    assert (result["rows"], result["rows_sha256"]) == (sum(map(len, rows.trained)), rows.sha256)
    assert [line["images"] for line in metrics(tmp_path / "teacher")] == [result["rows"]] * 3
    assert result["val_top1"] == metrics(tmp_path / "teacher")[-1]["val_top1"]


def test_run_trains_plain_students_on_the_rows_of_the_others_and_reports_what_to_choose_by(
    teacher_weights, where, tmp_path
):
    changes = {
        "data": {"tars": [2], "validation": 0.1, "subset": yaml.safe_load(LOWEST)},
        "teacher": {"weights": str(teacher_weights)},
        "views": {"count": 2},
        "capture": {"views_per_group": 2, "fidelity_rows": 20},
        "training": {"epochs": 1},
    }
    recipe = merged(RECIPE, changes)
    recipe["objectives"] = {name: recipe["objectives"][name] for name in ("ce", "kd")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = invoke(
        *("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--device", "cpu", *where),
        *("--sweep", "data.subset.keep=0.5,1", "--objective", "ce", "--objective", "kd"),
    )
    assert done.exit_code == 0, done.output
    results = {folder.name: result_of(folder) for folder in (tmp_path / "out" / "students").iterdir()}
    for keep in ("0.5", "1.0"):
        plain, kd = (results[f"{name}_keep={keep}_seed0"] for name in ("ce", "kd"))
        assert plain["rows_sha256"] == kd["rows_sha256"]
        assert plain["targets"] == "none"
    assert results["kd_keep=0.5_seed0"]["rows"] * 2 == pytest.approx(results["kd_keep=1.0_seed0"]["rows"], abs=1)
    assert "val top-1 %" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").read_text().splitlines()))
    assert {row["data.subset.keep"] for row in rows} == {"0.5", "1.0"}
    assert all(float(row["val_top1_mean"]) >= 0 and float(row["top1_mean"]) >= 0 for row in rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "settings are chosen by it" in page
    # A store is of all rows: cut others, and it is the same.
    digest = okd.open_store(tmp_path / "out" / "store").digest
    again = ["cache-teacher", tmp_path / "recipe.yaml", "--store", tmp_path / "out" / "store", *where]
    assert invoke(*again, "--set", "data.validation=0.3", "--set", "data.subset=null").exit_code == 0
    assert okd.open_store(tmp_path / "out" / "store").digest == digest


@pytest.mark.slow
def test_ranks_train_on_the_rows_of_one_process(command, keys, tmp_path):
    file = written(tmp_path / "keys.txt", keys[::2])
    sets = [f"data.subset={file}", "data.validation=0.2", "training.sync_batchnorm=true"]
    ours = [*command, *(word for one in sets for word in ("--set", one))]
    assert invoke(*ours, "--out", tmp_path / "one").exit_code == 0
    done = torchrun(2, [], "-m", "offline_kd", *ours, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for ranks, alone in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ranks == pytest.approx(alone, abs=1e-5)
    two, one = (result_of(tmp_path / name) for name in ("two", "one"))
    assert (two["rows"], two["rows_sha256"]) == (one["rows"], one["rows_sha256"])
    shutil.rmtree(tmp_path / "two")
    scored = [*command, "--set", f"data.subset={LOWEST}"]
    assert torchrun(2, [], "-m", "offline_kd", *scored, "--out", tmp_path / "two").returncode == 0
    assert result_of(tmp_path / "two")["rows"] == ROWS // 2
