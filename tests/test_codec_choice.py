"""`codec: {name: auto}`: budgets as numbers and by an objective's gradient, and what is chosen for them."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import invoke, refused
from torch import nn
from torch.nn import functional as F

import offline_kd as okd
from offline_kd.cache.codec_choice import smallest_within
from offline_kd.objectives.gradient import example_student, gradient, relative_change
from offline_kd.objectives.kd import KD
from offline_kd.recipe import AutoCodec, Capture, dump_recipe, load_recipe
from offline_kd.store.codecs.klt_means import KltMeans
from offline_kd.support.errors import RecipeError
from offline_kd.support.strict import parse

CLASSES = 64


def budget_of(text: str):
    codec = parse(Capture, {"codec": {"name": "auto", "error_budget": yaml.safe_load(text)}}, where="here").codec
    assert isinstance(codec, AutoCodec)
    return codec.error_budget


def made_up(images: int, seed: int, views: int = 4) -> np.ndarray:
    """`[n, 1, v, C]`: views of an image say nearly the same, along a few axes that are the same for every seed."""
    axes = np.random.default_rng(0).standard_normal((20, CLASSES)) * 0.8 ** np.arange(20)[:, None]
    rng = np.random.default_rng(seed)
    of_image, of_view = rng.standard_normal((images, 1, 20)), rng.standard_normal((images, views, 20))
    noise = 0.1 * rng.standard_normal((images, views, CLASSES))
    return ((of_image + 0.4 * of_view) @ axes * 1.5 + noise).astype(np.float32)[:, None]


def decoded_on_others(codec, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[n, C]` of other images than those that `made_up(80, 0)` are of, and what a codec makes of them."""
    tables, others = codec.fit(made_up(80, 0)[:, 0]), made_up(40, seed)[:, 0]
    return torch.from_numpy(others).flatten(0, 1), codec.decode_stored(
        codec.encode(others, tables), tables, CLASSES
    ).flatten(0, 1)


def kd_gradient(student: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
    return t * ((student / t).softmax(1) - (teacher / t).softmax(1)) / len(student)


def test_the_gradient_of_kd_is_that_of_its_formula_whoever_has_switched_gradients_off():
    teacher = torch.from_numpy(made_up(20, 3)).flatten(0, 2)
    student = example_student(teacher)
    with torch.no_grad():
        found = gradient(KD(term="kd", temperature=4), student, teacher, teacher.argmax(1))
    torch.testing.assert_close(found, kd_gradient(student, teacher, 4), rtol=1e-4, atol=1e-8)
    assert relative_change(1.25 * found, found) == pytest.approx(0.25)


def test_what_is_chosen_for_a_gradient_keeps_to_the_budget_on_other_images(capsys):
    allowed = 0.3
    codec = smallest_within(budget_of(f"{{objective: kd, temperature: 4, change: {allowed}}}"), made_up(80, 0), 1, 4)
    z_t, z = decoded_on_others(codec)
    student = example_student(z_t)
    true = kd_gradient(student, z_t, 4)
    change = ((kd_gradient(student, z, 4) - true).norm() / true.norm()).item()
    assert 0.3 * allowed < change <= 1.25 * allowed
    said = " ".join(capsys.readouterr().err.split())
    assert f"codec auto: {codec.label()}" in said
    assert "gradient of kd, temperature 4.0 changes by" in said
    assert f"(allowed: {allowed:g})" in said


def test_a_number_is_about_the_total_variation_at_the_worst_temperature():
    codec = smallest_within(0.03, made_up(80, 0), 1, 4)
    z_t, z = decoded_on_others(codec)
    worst = max((F.softmax(z / t, 1) - F.softmax(z_t / t, 1)).abs().sum(1).mean().item() / 2 for t in (1, 2, 4))
    assert 0.01 < worst <= 1.25 * 0.03


def test_the_objective_decides_what_a_byte_is_worth(capsys):
    sizes = []
    for objective in ("kd, temperature: 4", "wttm, gamma: .8"):
        smallest_within(budget_of(f"{{objective: {objective}, change: .05}}"), made_up(80, 0), 1, 4)
        sizes.append(float(capsys.readouterr().err.rpartition(" bytes per view")[0].split()[-1]))
    assert sizes[1] < 0.7 * sizes[0]


def test_a_budget_that_nothing_keeps_to_is_answered_by_f32():
    assert smallest_within(1e-9, made_up(30, 0), 1, 4).name == "f32"


REFUSALS = {
    "{objective: kdd, temperature: 4, change: .1}": "unknown name 'kdd'. Did you mean 'kd'?",
    "{objective: ce, change: .1}": "'ce' does not look at the teacher's logits: name one that does, such as kd",
    "{objective: decisions, decisions: a, change: .1}": "'decisions' does not look at the teacher's logits",
    "{objective: kd, temperature: 4, change: 0}": "change': Input should be greater than 0, got 0",
    "{objective: kd, temperature: 4, change: -0.1}": "change': Input should be greater than 0, got -0.1",
    "{objective: kd, temperature: 4}": "change': Field required",
    "{objective: kd, change: .1}": "objective.kd.temperature': Field required",
    "{objective: kd, temprature: 4, change: .1}": "Did you mean 'temperature'?",
    "{objective: kd, temperature: 4, change: .1, term: wttm}": "unknown field",
    "{change: .1}": "objective': Field required",
    "0": "Input should be greater than 0, got 0",
    "many": "Input should be a valid number",
}


@pytest.mark.parametrize("budget", REFUSALS)
def test_a_budget_that_means_nothing_is_refused_in_one_line(budget):
    with pytest.raises(RecipeError) as caught:
        budget_of(budget)
    assert REFUSALS[budget] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_resolved_recipe_has_the_budget_as_it_was_written_and_another_objective_starts_afresh(recipe_file, tmp_path):
    auto = "{name: auto, error_budget: {objective: kd, temperature: 3, change: .2}}"
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(load_recipe(recipe_file, [f"capture.codec={auto}"])))
    written = yaml.safe_load(resolved.read_text())["capture"]["codec"]
    assert written == {"name": "auto", "error_budget": {"objective": "kd", "temperature": 3.0, "change": 0.2}}
    over = tmp_path / "over.yaml"
    for change, expected in (
        ("objective: wttm, gamma: .8, change: .1", {"objective": "wttm", "gamma": 0.8, "change": 0.1}),
        ("change: .1", {"objective": "kd", "temperature": 3.0, "change": 0.1}),
    ):
        over.write_text(f"extends: resolved.yaml\ncapture: {{codec: {{error_budget: {{{change}}}}}}}\n")
        codec = load_recipe(over).capture.codec
        assert codec.model_dump(mode="json") == {"name": "auto", "error_budget": expected}


def test_the_command_line_captures_by_an_objectives_budget(recipe_file, where, tmp_path):
    def with_budget(change: str) -> tuple:
        auto = f"capture.codec={{name: auto, error_budget: {{objective: kd, temperature: 4, change: {change}}}}}"
        return "cache-teacher", recipe_file, "--store", tmp_path / "store", "--set", auto, "--set", "data.tars=[2]"

    assert "change': Input should be greater than 0, got -1" in refused(*with_budget("-1"), *where)
    result = invoke(*with_budget(".2"), *where)
    assert result.exit_code == 0
    assert "relative change" not in result.stdout
    said = " ".join(result.stderr.split())
    assert "gradient of kd, temperature 4.0 changes by" in said
    assert "bytes per view" in said
    assert okd.open_store(tmp_path / "store").reader.identity.codec.name == "int"


def test_a_capture_shares_an_images_mean_among_its_view_groups_as_auto_counted(data_root, tmp_path, capsys):
    """A teacher of many classes, so that predicting views from each other pays."""
    (tmp_path / "data").mkdir()
    shutil.copy(next((data_root / "digits").glob("train-000000*")), tmp_path / "data")
    torch.manual_seed(0)
    module = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, CLASSES))
    with torch.no_grad():
        module[2].weight *= 8
    store = okd.cache_teacher(
        module,
        tmp_path / "data",
        views={"kind": "pad_crop_flip", "padding": 1, "flip": False, "count": 4},
        out=tmp_path / "store",
        normalisation={"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]},
        codec={"name": "auto", "error_budget": {"objective": "kd", "temperature": 2, "change": 0.2}},
        classes=[str(label) for label in range(CLASSES)],
        views_per_group=2,
    )
    reader = store.reader
    assert isinstance(reader.identity.codec, KltMeans)
    promised = float(capsys.readouterr().err.partition(" bytes per view")[0].split()[-1])
    stored = sum(size for name, size in reader.manifest.bytes_by_array.items() if name.startswith("logits/"))
    rows = sum(tar.count for tar in reader.identity.dataset.tars) * 4
    assert stored / rows == pytest.approx(promised, rel=0.12)
