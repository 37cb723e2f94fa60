"""The report over many runs: its figures, its three files, and the page in a real browser."""

import csv
import html.parser
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import scipy.stats
import torch
from browser import Browser
from conftest import CPU, ROOT, invoke, make_recipe, refused
from test_descriptions import finished_run, with_gamma

from offline_kd.distill.differences import difference
from offline_kd.distill.report import record, summarise
from offline_kd.distill.results import Run, write_metrics
from offline_kd.distill.run_records import group_runs, read_runs
from offline_kd.models.evaluation import Answers
from offline_kd.models.evaluation_file import (
    FILE,
    FILE_OF_TEACHER,
    agreement,
    divergence,
    put_predictions,
    read_predictions,
    reliability,
)
from offline_kd.recipe import Recipe, dump_recipe, load_recipe
from offline_kd.store.opening import open_store
from offline_kd.support.packaged import recipe_names
from offline_kd.support.places import Folder

CLASSES = ["zero", "one", "two"]
IMAGES = 60


def answered(
    folder: Path, right: int, seed: int, objective: str = "kd", recipe: Recipe | None = None, **changes
) -> Path:
    """A run directory, of which a run's own writer wrote predictions and curves: so many of 60 answers are right."""
    recipe = recipe or make_recipe()
    numbers = torch.Generator().manual_seed(1000 * right + seed)
    labels = torch.arange(IMAGES) % 3
    said = torch.where(torch.randperm(IMAGES, generator=numbers) < right, labels, (labels + 1) % 3)
    logits = torch.rand(IMAGES, 3, generator=numbers) + 3 * torch.nn.functional.one_hot(said, 3)
    run = finished_run(folder, recipe, objective, seed, top1=100 * right / IMAGES, **changes)
    answers = Answers(np.arange(IMAGES, dtype=np.uint64)[::-1].copy(), labels, logits)
    put_predictions(Folder(run), answers, CLASSES, IMAGES)
    epochs = [
        {"epoch": at, "loss_ce": 2.0 / at + seed / 10, "top1": 100 * right / IMAGES * at / 5, "lr": 0.1 / at}
        | {"seconds": 30.0, "images": 60, "teacher": {"entropy": 0.5 + 0.1 / at}, "comment": "fine", "odd": 10**400}
        for at in range(1, 6)
    ]
    write_metrics(Run(recipe, objective, [], seed, Folder(run), CPU), epochs)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """A teacher, and plain training, KD and TTM with three seeds."""
    folder = tmp_path_factory.mktemp("runs")
    found = [answered(folder / "teacher", 57, 0, "teacher")]
    for objective, right in {"ce": (30, 34, 31), "kd": (45, 47, 47), "ttm": (29, 36, 33)}.items():
        found += [answered(folder / f"{objective}-{seed}", right[seed], seed, objective) for seed in range(3)]
    return found


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    page = tmp_path_factory.mktemp("page") / "report.html"
    assert invoke("report", *runs, "--out", page).exit_code == 0
    return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


# ---- what a run writes ---------------------------------------------------------------------------------------------


def test_a_run_writes_what_its_student_answered(where, manifest, roots, tmp_path):
    """The figures of result.json follow from it, and the keys are those of the images."""
    from offline_kd.distill.training import evaluation_images

    out, recipe = tmp_path / "run", make_recipe(training={"epochs": 1})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert invoke("train", tmp_path / "recipe.yaml", "--out", out, *where).exit_code == 0
    found, result = read_predictions((out / FILE).read_bytes(), FILE), json.loads((out / "result.json").read_text())
    assert found.top1 == pytest.approx(result["top1"], abs=1e-9)
    bins = reliability(found)
    assert np.abs(bins[:, 2] - bins[:, 1]).sum() / bins[:, 0].sum() == pytest.approx(result["ece"], abs=1e-9)
    log_probs = found.log_probs.astype(np.float64)
    assert -log_probs[range(len(found.label)), found.label].mean() == pytest.approx(result["nll"], rel=1e-3)
    images = evaluation_images(recipe, manifest, roots)
    blocks = [images[number] for number in range(len(images))]
    keys, labels = (np.concatenate([getattr(one, name) for one in blocks]) for name in ("key_hash", "labels"))
    assert dict(zip(found.key_hash.tolist(), found.label.tolist(), strict=True)) == dict(
        zip(keys.tolist(), labels.tolist(), strict=True)
    )
    assert found.classes == images.dataset.classes


def test_students_are_compared_with_a_teacher_that_was_trained_elsewhere(
    store_path, teacher_weights, recipe_file, where, tmp_path
):
    """What it answered at the gate lies beside the store; where that is missing or of another teacher, only that is."""
    elsewhere = shutil.copy(teacher_weights, tmp_path / "elsewhere.safetensors")
    (beside,) = store_path.parent.glob(f"{store_path.name}.teacher-*.safetensors")
    stores = {name: shutil.copytree(store_path, tmp_path / name) for name in ("bare", "torn")}
    (tmp_path / beside.name.replace(store_path.name, "torn")).write_bytes(beside.read_bytes()[:-1])
    assert invoke("store", "push", store_path, tmp_path / "copied").exit_code == 0
    sets = ("--set", f"teacher.weights={elsewhere}", "--set", "training.epochs=1", "--objective", "kd")
    for name, store in {"known": store_path, "copied": tmp_path / "copied", **stores}.items():
        run, page = tmp_path / f"run-{name}", tmp_path / f"{name}.html"
        assert invoke("distill", recipe_file, "--store", store, "--out", run, *sets, *where).exit_code == 0
        assert invoke("report", run, "--out", page).exit_code == 0
        (row,) = json.loads(page.with_suffix(".json").read_text())["rows"]
        if name not in ("known", "copied"):
            assert row["teacher_agreement"] is None
            continue
        teacher, student = (read_predictions((run / one).read_bytes(), one) for one in (FILE_OF_TEACHER, FILE))
        assert teacher.top1 == pytest.approx(open_store(store_path).identity.teacher.measured_top1)
        assert row["teacher_agreement"] == pytest.approx(100 * (teacher.predicted == student.predicted).mean())
        assert row["teacher_kl"] > 0


def test_large_splits_are_written_without_log_probabilities(tmp_path):
    answers = Answers(np.arange(4, dtype=np.uint64), torch.zeros(4, dtype=torch.int64), torch.eye(4))
    put_predictions(Folder(tmp_path), answers, list("abcd"), samples=2**26)
    found = read_predictions((tmp_path / FILE).read_bytes(), FILE)
    assert found.log_probs is None
    assert found.predicted.tolist() == [0, 1, 2, 3]


def test_predictions_that_no_run_wrote_or_another_did_are_one_line(runs, tmp_path):
    run, page = Path(shutil.copytree(runs[4], tmp_path / "run")), tmp_path / "page.html"
    whole = (run / FILE).read_bytes()
    arrays = safetensors.numpy.load(whole)
    about = {"classes": json.dumps(CLASSES)}
    wrong = [
        whole[:-1],
        b"",
        b"\xff" * 100,
        safetensors.numpy.save(arrays),
        safetensors.numpy.save(arrays | {"label": arrays["label"] + 1}, metadata=about),
        safetensors.numpy.save(arrays | {"predicted": arrays["predicted"][:-1]}, metadata=about),
        safetensors.numpy.save(arrays | {"confidence": arrays["confidence"] * 2}, metadata=about),
        safetensors.numpy.save(arrays | {"log_probs": arrays["log_probs"][:, :2]}, metadata=about),
        safetensors.numpy.save({name: array[:0] for name, array in arrays.items()}, metadata=about),
        safetensors.numpy.save(arrays, metadata={"classes": "[" * 9999}),
        (runs[1] / FILE).read_bytes(),
    ]
    for content in wrong:
        (run / FILE).write_bytes(content)
        assert f"{run}/{FILE}: " in refused("report", run, "--out", page)
    assert "top-1 is 50.00 %, result.json says 75.00 %" in refused("report", run, "--out", page)
    assert not page.exists()


# ---- figures -------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scipy():
    one, other = {0: 71.2, 1: 70.1, 2: 72.5, 3: 70.9}, {0: 69.0, 1: 69.7, 2: 69.9, 3: 69.1}
    for shared in (other, {seed: other[seed] for seed in (1, 3)}, other | {9: 50.0}):
        found = difference(one, shared)
        pairs = [seed for seed in one if seed in shared]
        values = [[these[seed] for seed in pairs] for these in (one, shared)]
        expected = scipy.stats.ttest_rel(*values).confidence_interval(0.95)
        assert (found.test, found.seeds) == ("paired t", len(pairs))
        assert found.mean - found.half_width == pytest.approx(expected.low, abs=1e-9)
        assert found.mean + found.half_width == pytest.approx(expected.high, abs=1e-9)
    elsewhere = {seed + 3: value for seed, value in other.items()}  # one seed in common: no pairs to speak of
    found = difference(one, elsewhere)
    expected = scipy.stats.ttest_ind([*one.values()], [*elsewhere.values()], equal_var=False).confidence_interval(0.95)
    assert found.test == "Welch t"
    assert found.mean - found.half_width == pytest.approx(expected.low, abs=1e-9)
    assert found.mean + found.half_width == pytest.approx(expected.high, abs=1e-9)
    assert difference({0: 71.0}, other).half_width is None
    assert difference({0: 71.0}, {0: 70.0}).mean == 1.0
    assert difference({0: 1.0, 1: 1.0}, {5: 2.0, 6: 2.0}).half_width == 0.0


def test_a_row_is_compared_with_plain_training_of_the_same_student(tmp_path):
    """Not of another data set or student; of other options of training where there is one candidate alone."""
    wider, slower = {"student": {"model_args": {"width": 9}}}, {"training": {"optimizer": {"lr": 0.01}}}
    made = {
        "ce": ("ce", {}),
        "kd": ("kd", {}),
        "kd-slower": ("kd", slower),
        "kd-wider": ("kd", wider),
        "ttm-longer": ("ttm", {"training": {"epochs": 9}}),
    }
    folders = [
        finished_run(tmp_path / f"{name}-{seed}", make_recipe(**changes), objective, seed, top1=50 + at + seed)
        for at, (name, (objective, changes)) in enumerate(made.items())
        for seed in (0, 1)
    ]

    def found() -> list[tuple[object, object]]:
        lines = map(record, summarise(group_runs(read_runs(folders))))
        return [(line["difference"], line["difference_to"]) for line in lines]

    label = "ce, student.model_args.width 4, training.epochs 2, training.optimizer.lr 0.05"
    assert found() == [(None, None), (1, label), (2, label), (None, None), (None, None)]
    folders.append(finished_run(tmp_path / "another", make_recipe(**slower), "ce", 0, top1=40))
    assert found()[2] == (12.5, label.replace("0.05", "0.01"))


def test_agreement_and_divergence_are_what_they_say(runs, tmp_path):
    teacher, student = (read_predictions((runs[at] / FILE).read_bytes(), FILE) for at in (0, 4))
    log_p, log_q = (torch.from_numpy(one.log_probs).double() for one in (teacher, student))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
    assert divergence(teacher, student) == pytest.approx(expected, abs=1e-12)
    assert agreement(teacher, student) == 100 * np.mean(teacher.predicted == student.predicted)
    assert divergence(teacher, replace(student, log_probs=None)) is None
    assert agreement(teacher, replace(student, key_hash=student.key_hash + np.uint64(1))) is None

    line = record(summarise(group_runs(read_runs(runs)))[2])
    seeds = [read_predictions((run / FILE).read_bytes(), FILE) for run in runs[4:7]]
    assert line["teacher_agreement"] == pytest.approx(np.mean([agreement(teacher, one) for one in seeds]))
    assert line["teacher_kl"] == pytest.approx(np.mean([divergence(teacher, one) for one in seeds]))
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert line["seeds_agreement"] == pytest.approx(np.mean([agreement(seeds[a], seeds[b]) for a, b in pairs]))
    # Two teachers of one network: which one is not known. One that the recipe names is found wherever it lies.
    twin = answered(tmp_path / "twin", 50, 1, "teacher")
    assert record(summarise(group_runs(read_runs([*runs, twin])))[2])["teacher_agreement"] is None
    (runs[0] / "student.safetensors").touch()
    named = make_recipe(teacher={"weights": str(runs[0] / "student.safetensors")})
    alone = answered(tmp_path / "alone", 45, 0, "kd", named)
    assert record(summarise(group_runs(read_runs([alone, twin])))[0])["teacher_agreement"] == agreement(
        teacher, seeds[0]
    )


def test_one_sentence_says_whether_the_teacher_helped(runs, tmp_path):
    said = invoke("report", *runs, "--out", tmp_path / "helped.html").stderr
    helped = "better with the teacher than from labels alone: kd has 77.22 %, ce 52.78 %."
    assert helped in said
    assert helped in (tmp_path / "helped.html").read_text()
    one_seed = invoke("report", runs[1], runs[4], "--out", tmp_path / "seed.html").stderr
    assert "seem better with the teacher than from labels alone, but it may be chance: kd has 75.00 %" in one_seed
    poor = answered(tmp_path / "teacher", 24, 0, "teacher")
    same = answered(tmp_path / "kd", 30, 0)
    worse = invoke("report", runs[1], poor, same, "--out", tmp_path / "worse.html").stderr
    assert "no better with the teacher than from labels alone: kd has 50.00 %, ce 50.00 %. The teacher" in worse
    assert "itself has 40.00 %, no more than plain training: take one that knows more" in worse
    good = invoke("report", runs[0], runs[1], same, "--out", tmp_path / "good.html").stderr
    assert "no better with the teacher than from labels alone: kd has 50.00 %, ce 50.00 %. Try another" in good
    assert "Students " not in invoke("report", runs[4], "--out", tmp_path / "alone.html").stderr


# ---- published numbers ---------------------------------------------------------------------------------------------


def test_published_numbers_stand_beside_those_reached_and_change_no_run(tmp_path):
    recipe = make_recipe(published={"source": "arXiv:1, table <2>", "top1": {"kd": [70.66, 0.24], "teacher": 72}})
    run, page = answered(tmp_path / "kd", 45, 0, recipe=recipe), tmp_path / "page.html"
    done = invoke("report", run, answered(tmp_path / "ce", 45, 0, "ce", recipe), "--out", page)
    assert done.exit_code == 0
    assert re.search(r"kd .*│ 70.66 ± 0.24 │", done.stdout)
    lines = list(csv.DictReader(page.with_suffix(".csv").read_text().splitlines()))
    assert [(line["published_top1"], line["published_std"]) for line in lines] == [("70.66", "0.24"), ("", "")]
    text = page.read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "70.66 ± 0.24" in text
    assert "arXiv:1, table &lt;2&gt;" in text
    one, other = (Run(content, "kd", [], 0, Folder(run), CPU) for content in (recipe, make_recipe()))
    assert one.identity == other.identity
    assert "published" not in dump_recipe(make_recipe())


def test_the_recipes_of_published_tables_name_their_numbers():
    found = load_recipe(ROOT / "pipelines/cifar100/resnet56_resnet20.yaml").published
    assert found.of("wttm") == (71.92, 0.40)
    assert found.of("dtkd") is None
    assert load_recipe(ROOT / "pipelines/imagenet/resnet34_resnet18.yaml").published.of("wttm") == (72.19, None)
    for folder in ("cifar100", "cifar100_letkd", "imagenet"):
        for file in (ROOT / "pipelines" / folder).glob("*_*.yaml"):
            recipe = load_recipe(file)
            gate = recipe.teacher.expected
            assert recipe.published.top1.keys() <= {"teacher", *recipe.objectives}, file
            assert recipe.published.of("teacher") == (pytest.approx(gate.top1, abs=gate.tolerance), None), file


def test_published_numbers_are_listed_for_every_recipe_that_names_some_and_the_page_is_current():
    page = (ROOT / "docs/published.md").read_text()
    assert invoke("recipe", "published", "--markdown").stdout == page, (
        "offline-kd recipe published --markdown > docs/published.md"
    )
    for name in recipe_names():
        found = None if name.endswith("base") else load_recipe(Path(name)).published
        if found is not None:
            folder, _, short = name.rpartition("/")
            section = page.split(f"## {folder}/RECIPE\n")[1].split("\n## ")[0]
            (row,) = (line for line in section.splitlines() if line.startswith(f"| {short} |"))
            numbers = (found.of(objective) for objective in found.top1)
            assert all(f"| {mean:.2f} {f'± {std:.2f} ' if std else ''}|" in row for mean, std in numbers), row


# ---- three files ---------------------------------------------------------------------------------------------------


class Cells(html.parser.HTMLParser):
    """`data-column` of the headings, `data-value` of the cells of every row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.columns: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        if "data-column" in about:
            self.columns.append(about["data-column"])
        if tag == "tbody":
            self.rows.append([])
        if "data-value" in about:
            self.rows[-1].append(about["data-value"])


def test_page_csv_and_json_say_the_same(runs, page):
    cells = Cells(page.read_text())
    lines = list(csv.DictReader(page.with_suffix(".csv").read_text().splitlines()))
    content = json.loads(page.with_suffix(".json").read_text())
    assert {"objective", "top1_mean", "difference", "ece_mean", "teacher_agreement"} <= set(cells.columns)
    assert [[line[name] for name in cells.columns] for line in lines] == cells.rows
    for line, row in zip(lines, content["rows"], strict=True):
        assert line == {name: "" if row[name] is None else str(row[name]) for name in line}
    kd = content["rows"][2]
    assert kd["difference"] == pytest.approx(100 * (15 + 13 + 16) / 3 / 60)
    assert [run["seed"] for run in kd["seeds"]] == [0, 1, 2]
    assert [run["directory"] for run in kd["seeds"]] == [str(run) for run in runs[4:7]]
    assert (kd["images_by_class"], sum(kd["right_by_class"])) == ([60, 60, 60], 45 + 47 + 47)


def test_all_that_was_measured_of_a_pass_has_a_curve(page):
    text = page.read_text()
    for title in ("top-1 %", "loss: ce", "learning rate", "teacher.entropy"):
        for axis in ("epochs", "minutes of training"):
            assert f'aria-label="{title} over {axis}"' in text
    assert "The same\nin every pass of every run: seconds 30, images 60." in text
    assert "comment" not in text
    assert "odd" not in text


def test_a_run_that_measured_no_time_has_curves_over_epochs_alone(runs, tmp_path):
    timeless, page = Path(shutil.copytree(runs[4], tmp_path / "timeless")), tmp_path / "page.html"
    lines = [{"epoch": at, "top1": 50.0 + at, "own": at} for at in (1, 2)]
    (timeless / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert invoke("report", timeless, *runs[5:], "--out", page).exit_code == 0
    assert 'aria-label="own over epochs"' in page.read_text()
    assert 'aria-label="own over minutes of training"' not in page.read_text()
    assert 'aria-label="top-1 % over minutes of training"' in page.read_text()


def test_runs_without_predictions_are_reported_and_said_to_lack_them(runs, tmp_path):
    old, page = finished_run(tmp_path / "old", make_recipe(), "dist", 0), tmp_path / "page.html"
    result = invoke("report", *runs, old, "--out", page)
    assert "1 of 11 runs have no evaluation.safetensors" in result.stderr
    assert "1 of 11 runs have no evaluation.safetensors" in page.read_text()
    assert 'aria-label="reliability of kd"' in page.read_text()
    assert 'aria-label="reliability of dist"' not in page.read_text()
    assert list(csv.DictReader(page.with_suffix(".csv").read_text().splitlines()))[4]["ece_mean"] == "10.0"
    assert "Name the page .html" in refused("report", old, "--out", tmp_path / "page.csv")


# ---- in a browser --------------------------------------------------------------------------------------------------

NAMES = "[...document.querySelectorAll('.sortable th[data-value]')].map(cell => cell.dataset.value)"
SORTED = "[...document.querySelectorAll('[aria-sort]')].map(one => [one.dataset.column, one.getAttribute('aria-sort')])"
SHOWN = "[...document.querySelectorAll('.seed')].filter(row => row.offsetHeight).map(row => row.cells[0].innerText)"


def test_the_table_is_sorted_by_mouse_and_keyboard(browser, page):
    browser.open(page)
    assert browser.value(NAMES) == ["teacher", "ce", "kd", "ttm"]
    browser.click("[data-column=top1_mean] button")
    assert browser.value(NAMES) == ["teacher", "kd", "ttm", "ce"]
    assert browser.value(SORTED) == [["top1_mean", "descending"]]
    browser.click("[data-column=top1_mean] button")
    assert browser.value(NAMES) == ["ce", "ttm", "kd", "teacher"]
    assert browser.value(SORTED) == [["top1_mean", "ascending"]]
    browser.press("Tab")  # from that heading to the next one
    browser.press("Enter")
    assert browser.value(SORTED) == [["difference", "descending"]]
    assert browser.value(NAMES) == ["kd", "ttm", "ce", "teacher"]  # what has no value comes last
    browser.press(" ")
    assert browser.value(NAMES) == ["ttm", "kd", "ce", "teacher"]
    browser.click("[data-column=objective] button")
    assert browser.value(NAMES) == ["ce", "kd", "teacher", "ttm"]
    assert (browser.said, browser.requests) == ([], [page.resolve().as_uri()])


def test_rows_open_to_seeds_and_curves_turn_to_time_without_a_script(browser, page):
    browser._ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert browser.value(SHOWN) == []
        browser.click('[aria-label="seeds of kd"]')
        assert browser.value(SHOWN) == ["seed 0", "seed 1", "seed 2"]
        browser.press(" ")
        assert browser.value(SHOWN) == []
        charts = "['epoch', 'time'].map(axis => document.querySelector('.charts.over-' + axis).offsetHeight > 0)"
        assert browser.value(charts) == [True, False]
        browser.click("#over-time")
        assert browser.value(charts) == [False, True]
    finally:
        browser._ask("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.said == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_shows_what_decides(browser, tmp_path, dark):
    """Row, top-1 and the difference within 390 pixels, hyper-parameters below the name; nothing sticks out."""
    folders = [finished_run(tmp_path / f"ce-{seed}", with_gamma(0.1), "ce", seed) for seed in (0, 1)]
    for gamma in (0.1, 0.25):
        folders += [
            finished_run(tmp_path / f"{gamma}-{seed}", with_gamma(gamma), "wttm", seed, top1=60 + seed * gamma)
            for seed in (0, 1)
        ]
    page = tmp_path / "page.html"
    assert invoke("report", *folders, "--out", page).exit_code == 0
    browser.open(page, width=390, dark=dark)
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    shown = "[...document.querySelectorAll('thead th')].filter(one => one.offsetWidth).map(one => one.dataset.column)"
    assert browser.value(shown) == ["objective", "top1_mean", "difference"]
    right = "[...document.querySelectorAll('.sortable td, .sortable th')].map(one => one.getBoundingClientRect().right)"
    assert max(browser.value(right)) <= 390
    assert "wttm.gamma 0.25" in browser.value("document.querySelector('.sortable').innerText")
    ground, text = browser.value("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (ground == "rgb(24, 26, 29)") == dark
    assert ground != text


def test_hundreds_of_runs_are_one_row_a_group(browser, tmp_path):
    """A sweep: 100 gammas with 3 seeds each; every row is there, the best ones have curves."""
    made = answered(tmp_path / "made", 45, 0)
    for number in range(100):
        first = finished_run(tmp_path / f"runs/{number}-0", with_gamma(1 + number / 100), "wttm", 0, top1=75.0)
        for name in (FILE, "metrics.jsonl"):
            shutil.copy(made / name, first)
        result = json.loads((first / "result.json").read_text())
        for seed in (1, 2):
            other = Path(shutil.copytree(first, tmp_path / f"runs/{number}-{seed}"))
            changed = {"seed": seed, "student_sha256": other.name}
            (other / "result.json").write_text(json.dumps(result | changed))
    folders = (tmp_path / "runs").iterdir()
    page = tmp_path / "page.html"
    assert invoke("report", *folders, "--out", page).exit_code == 0
    assert page.stat().st_size < 1.5e6
    browser.open(page)
    assert len(browser.value(NAMES)) == 100
    assert browser.value("document.querySelectorAll('.seed').length") == 300
    assert browser.value("document.querySelectorAll('.legend span').length") == 10
    browser.click('[data-column="wttm.gamma"] button')
    first = "document.querySelector('tbody [data-value]').closest('tr').innerText"
    assert "1.99" in browser.value(first)
    assert browser.said == []
    lines = csv.DictReader(page.with_suffix(".csv").read_text().splitlines())
    assert [line["runs"] for line in lines] == ["3"] * 100
