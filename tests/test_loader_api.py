"""The loader as other people's loops use it: a plain loop trains the student that `distill` trains, bit by bit."""

import pytest
import safetensors.torch
import torch
from conftest import CPU

from offline_kd.distill.loop import Run, train_step
from offline_kd.distill.loss import term_weights
from offline_kd.distill.open_loader import open_loader
from offline_kd.distill.optimisation import learning_rate, make_optimizer, set_learning_rate
from offline_kd.distill.reader import Options
from offline_kd.distill.student import new_student
from offline_kd.distill.teacher_signal import TeacherSignal
from offline_kd.distill.training import distill, make_loader, source_of, training_images
from offline_kd.models.networks import normalise
from offline_kd.objectives.ce import CE
from offline_kd.store.join import Wanted, joined_arrays
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.support.errors import DataError
from offline_kd.support.places import Folder


def test_a_plain_loop_trains_the_very_student_of_distill(recipe, manifest, roots, store_path, data_root, tmp_path):
    distill(recipe, manifest, roots, tmp_path, CPU, objective="kd", seed=3, stores=[str(store_path)])
    normalisation, terms = recipe.data.normalisation, recipe.objectives["kd"]
    loader = open_loader(
        open_store(store_path), data_root / "digits", Options(batch_size=64, seed=3), normalisation=normalisation
    )
    student = new_student(recipe, training_images(recipe, manifest, roots), 3, CPU, terms)
    student.network.train()
    optimizer = make_optimizer(recipe.training, student.network)
    run = Run(recipe, "kd", terms, 3, Folder(tmp_path / "plain"), CPU)
    for epoch in range(recipe.training.epochs):
        weights = term_weights(terms, epoch, recipe.training.epochs, CPU)
        for batch in loader:
            set_learning_rate(optimizer, learning_rate(recipe.training, epoch + batch.step / len(loader)))
            train_step(run, student, optimizer, batch, TeacherSignal(batch.teacher_logits), weights)
    trained = safetensors.torch.load_file(tmp_path / "student.safetensors")
    for name, tensor in student.network.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_a_loader_goes_on_with_exactly_the_batches_that_are_left(store_path, data_root):
    store, folder = open_store(store_path), data_root / "digits"
    whole = open_loader(store, folder, Options(batch_size=100))
    keys = [batch.key_hash.tolist() for _ in range(2) for batch in whole]
    assert len(keys) == 2 * len(whole)
    first = open_loader(store, folder, Options(batch_size=100))
    shown = []
    for batch in first:
        shown.append(batch.key_hash.tolist())
        if len(shown) == 5:
            break
    assert first.state_dict() == {"epoch": 0, "step": 5}
    again = open_loader(store, folder, Options(batch_size=100))
    again.load_state_dict(first.state_dict())
    shown += [batch.key_hash.tolist() for _ in range(2) for batch in again]
    assert shown == keys
    assert again.state_dict() == {"epoch": 2, "step": 0}


def test_images_are_pixels_or_the_input_of_a_network(recipe, store_path, data_root):
    store, normalisation = open_store(store_path), recipe.data.normalisation
    pixels = next(iter(open_loader(store, data_root / "digits", Options(batch_size=64))))
    inputs = next(iter(open_loader(store, data_root / "digits", Options(batch_size=64), normalisation=normalisation)))
    assert pixels.images.dtype == torch.uint8
    assert torch.equal(normalise(pixels.images, normalisation), inputs.images)
    assert pixels.teacher_logits.shape == (64, 10)
    assert pixels.teacher_logits.dtype == torch.float32


def test_a_folder_without_the_tars_is_refused_by_name(store_path, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_loader(open_store(store_path), tmp_path / "nowhere", Options(batch_size=64))


def test_logits_are_not_read_for_an_objective_without_them(recipe, manifest, roots, store_path, monkeypatch):
    read: list[str] = []
    asked = Store.read

    def spy(self: Store, block: int, group: int, names: list[str]) -> object:
        read.extend(names)
        return asked(self, block, group, names)

    monkeypatch.setattr(Store, "read", spy)
    images, store = training_images(recipe, manifest, roots), open_store(store_path)
    counts = {}
    for name, terms in (("ce", [CE(term="ce")]), ("kd", recipe.objectives["kd"])):
        read.clear()
        (batch, *_) = make_loader(recipe, source_of(recipe, images, [store], terms), 0, CPU).epoch(0)
        counts[name] = sum(array.startswith("logits/") for array in read)
        assert (batch.signal[0].logits is None) == (name == "ce")
    assert counts == {"ce": 0, "kd": 3}
    assert not [name for name in joined_arrays(store, Wanted(logits=False)) if name.startswith("logits/")]
