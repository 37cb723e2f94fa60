"""Networks of somebody's own code, named in recipes: found, and told in one line what is wrong with them."""

import os
import sys

import pytest
import torch
from conftest import invoke, refused
from test_teachers import LITTLE, sets

OWN = """
import torch
from torch import nn


def good(num_classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))


def no_classes(classes):
    return good(classes)


def no_module(num_classes):
    return [good(num_classes)]


def seven(num_classes):
    return good(7)


class Pair(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.inside = good(num_classes)

    def forward(self, x):
        return self.inside(x), x


if __name__ == "broken_network":
    raise RuntimeError("not today")
"""


@pytest.fixture
def in_own_folder(tmp_path, monkeypatch):
    for name in ("own_network", "broken_network"):
        (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    yield tmp_path
    for name in ("own_network", "broken_network"):
        sys.modules.pop(name, None)


def test_networks_of_the_current_folder_are_found_and_wrong_ones_named(in_own_folder, recipe_file, where):
    train = ("train", recipe_file, *where, *sets(*LITTLE, "student.model_args={}"), "--out")

    def of(name: str) -> list[str]:
        return sets(f"student.model=own_network:{name}")

    assert invoke(*train, "run", *of("good"), *sets("student.model_args={width: 3}")).exit_code == 0
    for name, message in (
        (
            "no_classes",
            "it is called with num_classes=..., and takes (classes): missing a required argument: 'classes'",
        ),
        ("no_module", "returned a list, not a torch.nn.Module"),
        ("seven", "its forward gives a tensor [64, 7], must give one tensor of logits [64, 10]"),
        ("Pair", "its forward gives a tuple, must give one tensor of logits [64, 10]"),
        ("god", "module 'own_network' has no attribute 'god'"),
    ):
        found = refused(*train, f"wrong-{name}", *of(name))
        assert f"'own_network:{name}'" in found
        assert message in found
    message = refused(*train, "wrong", *sets("student.model=broken_network:good"))
    assert "'broken_network:good' cannot be imported: RuntimeError: not today" in message
    message = refused(*train, "wrong", *sets("student.model=nowhere:good"))
    assert "No module named 'nowhere'. Modules are looked for among installed packages, in PYTHONPATH" in message
    assert os.getcwd() in message


def test_a_teacher_that_gives_no_logits_is_named(in_own_folder, recipe_file, where):
    state = {f"inside.1.{name}": torch.zeros(shape) for name, shape in (("weight", (10, 192)), ("bias", (10,)))}
    torch.save(state, "pair.pt")
    teacher = sets("teacher.model=own_network:Pair", "teacher.weights=pair.pt")
    message = refused("cache-teacher", recipe_file, "--store", "store", *where, *sets(*LITTLE), *teacher)
    assert "'own_network:Pair': its forward gives a tuple, must give one tensor of logits [B, num_classes]" in message
