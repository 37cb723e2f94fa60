"""The card of a store helps to decide: a recipe that trains, warnings with their figures, words instead of dicts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, invoke, refused

from offline_kd.recipe import load_recipe
from offline_kd.store.answers import read_answers, warnings_of
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.opening import open_store
from offline_kd.store.starter import starter_recipe
from offline_kd.store.sync import copy_store
from offline_kd.store.verification import verify
from offline_kd.support.places import Folder
from offline_kd.support.strict import differences, in_words

OLD = ROOT / "tests/fixtures/store_v4/store"  # of a version that wrote no recipe; of the third tar of the digits


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("copied") / "store"
    copy_store(OLD, path)
    return path


def test_the_recipe_of_a_store_trains_from_it_as_it_is(copied, where, tmp_path):
    command = ("distill", copied / "recipe.yaml", "--store", copied, "--out", tmp_path / "run", *where)
    result = invoke(*command, "--set", "training.epochs=1", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run/result.json").read_text())["objective"] == "kd"


def test_the_recipe_of_a_store_is_what_it_was_made_from(store_path, tmp_path):
    store, found = open_store(store_path), load_recipe(store_path / "recipe.yaml")
    assert found.views == store.identity.views
    assert found.capture.codec == store.identity.codec
    assert (found.data.dataset, found.data.train, found.data.evaluation, found.data.tars) == (
        "digits",
        "train",
        "test",
        None,
    )
    assert found.teacher.normalisation == store.identity.teacher.normalisation
    copy_store(store_path, tmp_path / "part", blocks=range(1, 3), only=["logits"])
    assert load_recipe(tmp_path / "part/recipe.yaml").data.tars == [1, 2]


@pytest.mark.parametrize(("tail", "temperature"), [(1, 2), (4, 4)])
def test_the_recipe_has_a_temperature_that_the_codec_serves(store_path, tmp_path, tail, temperature):
    store = open_store(store_path)
    codec = TopK(name="topk", k=5, tail_temperature=tail)
    store = replace(store, identity=store.identity.model_copy(update={"codec": codec}))
    file = tmp_path / "recipe.yaml"
    file.write_text(starter_recipe(store, store.manifest))
    assert load_recipe(file).objectives["kd"][1].temperature == temperature


def test_a_recipe_is_vouched_for_or_clearly_made_by_a_copy(store_path, copied, tmp_path):
    assert "recipe.yaml" in open_store(store_path).manifest.files
    changed = Path(shutil.copytree(store_path, tmp_path / "changed"))
    (changed / "recipe.yaml").write_text((changed / "recipe.yaml").read_text().replace("resnet8", "resnet9"))
    assert [fault.file for fault in verify(Folder(changed), quick=True).faults] == ["recipe.yaml"]
    assert verify(Folder(OLD), quick=True).faults == []
    found = verify(Folder(copied), quick=True)
    assert found.faults == []
    assert any(note.startswith("recipe.yaml: was made by a copy") for note in found.notes)
    foreign = Path(shutil.copytree(copied, tmp_path / "foreign"))
    (foreign / "recipe.yaml").write_text("name: mine\n")
    assert [fault.file for fault in verify(Folder(foreign), quick=True).faults] == ["recipe.yaml"]


def test_a_good_teacher_gets_no_warning_and_a_poor_one_gets_its_figures(store_path):
    store = open_store(store_path)
    answers, fidelity = read_answers(store), store.manifest.fidelity[""]
    assert warnings_of(store, answers, fidelity) == []

    def said(answers=answers, fidelity=fidelity, **teacher: object) -> str:
        about = store.identity.teacher.model_copy(update=teacher)
        other = replace(store, identity=store.identity.model_copy(update={"teacher": about}))
        return " ".join(warnings_of(other, answers, fidelity))

    assert "right about 41.0 % of digits/test, less than 70 %" in said(measured_top1=41.0)
    wrong = replace(answers, correct=answers.correct & (np.arange(len(answers.correct)) % 2 == 0))
    assert "% of the stored views" in said(wrong)
    assert "expected calibration error" in said(wrong)
    blind = replace(answers, named=np.where(answers.named == 3, 4, answers.named))
    assert "It never names 1 of 10 classes" in said(blind)
    assert said(blind).endswith("looked at: 3.")
    assert "45% of the probability lies in classes whose logits were not kept" in said(replace(answers, dropped=0.45))
    lossy = fidelity.model_copy(update={"decisions": {"last": {"mean_dropped": 0.62}}})
    assert "Decisions 'last' leave out 62% of the probability" in said(answers, lossy)


def test_a_warning_stands_on_the_card(copied, tmp_path):
    content = json.loads((copied / "store.json").read_text())
    assert "Warning" not in (copied / "README.md").read_text() or content["teacher"]["measured_top1"] < 70
    for card in ("README.md", "index.html"):
        text = (copied / card).read_text()
        assert "{'" not in text.replace("&#39;", "'")
        assert "offline-kd distill THIS_FOLDER/recipe.yaml" in text
        assert "kind: pad_crop_flip" in text


def test_a_mismatch_names_the_field_and_both_values(store_path, where, tmp_path):
    command = ("distill", store_path / "recipe.yaml", "--store", store_path, "--out", tmp_path / "run", *where, "--set")
    assert "holds other views: views.padding: 1 in the store, 2 in the recipe." in refused(*command, "views.padding=2")
    other = "views={kind: center_crop, size: 8}"
    assert "views.kind: pad_crop_flip in the store, center_crop in the recipe." in refused(*command, other)
    std = "teacher.normalisation.std=[.1,.2,.3]"
    assert "with normalisation.std [0.4, 0.4, 0.4], the recipe's teacher has [0.1, 0.2, 0.3]" in refused(*command, std)


def test_differences_are_fields_and_a_description_is_read_as_words():
    one = {"kind": "a", "x": {"y": [1, 2], "z": 1}, "same": 0}
    assert list(differences(one, one)) == []
    assert list(differences(one, one | {"x": {"y": [1, 3], "z": 1}}, "views")) == [("views.x.y", [1, 2], [1, 3])]
    assert [field for field, *_ in differences(one, {"kind": "b", "other": 1}, "views")] == ["views.kind"]
    said = in_words({"kind": "crop", "scale": [0.25, 1.0], "augment": {"kind": "trivial", "num_ops": 2}, "flip": True})
    assert said == "crop, scale [0.25, 1], augment (trivial, num ops 2), flip yes"
