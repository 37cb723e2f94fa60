"""`offline-kd bench --drift`: how far students trained from each codec end from the live one."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.fetching import Root
from offline_kd.data.labels import need_one_label
from offline_kd.data.manifest import Manifest
from offline_kd.distill.loader import Loader
from offline_kd.distill.loop import train_step
from offline_kd.distill.loss import term_weights
from offline_kd.distill.optimisation import learning_rate, make_optimizer, set_learning_rate
from offline_kd.distill.results import Run
from offline_kd.distill.student import Student, new_student
from offline_kd.distill.teacher_signal import AskTeacher, TeacherSignal, stored_signal
from offline_kd.distill.training import evaluation_images, make_loader, source_of, training_images
from offline_kd.models.evaluation import evaluate
from offline_kd.models.networks import normalise
from offline_kd.recipe import AnyTerm, Recipe, feature_terms, kd_layer_terms, needs_teacher
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.store.rows import Rows
from offline_kd.support.places import Folder

DRIFT_CODECS: dict[str, AnyCodec] = {"f32": Float32(), "f16": Float16(name="f16"), "int8": Int(name="int")}


def measure_drift(
    recipe: Recipe, manifest: Manifest, roots: Sequence[Root], steps: int, device: torch.device
) -> dict[str, dict[str, dict[str, float]]]:
    """Train `steps` steps with the live teacher and from a store of each codec, everything else equal.

    Returns, by objective and codec, `distance`, |offline - online| / |online| over all parameters of the student, and
    `top1` in percent. The entry `online` is the live run itself; `other order` is the yardstick: a live run from the
    same initial weights with the samples in another order.
    """
    objectives = {
        name: terms
        for name, terms in recipe.objectives.items()
        if needs_teacher(terms) and not kd_layer_terms(terms) and not feature_terms(terms)
    }
    loader, evaluation = training_images(recipe, manifest, roots), evaluation_images(recipe, manifest, roots)
    need_one_label(evaluation.split.labels, "data.evaluation", "this benchmark")
    teacher = load_teacher(recipe, manifest, roots, len(loader.dataset.classes), device)

    def from_teacher(batch: Rows) -> TeacherSignal:
        return TeacherSignal(teacher.logits(batch.images))

    def train(terms: Sequence[AnyTerm], store: Store | None, ask: AskTeacher, order: int = 0) -> nn.Module:
        student = new_student(recipe, loader, recipe.seeds[0], device)
        stream = make_loader(
            recipe, source_of(recipe, loader, [store] if store else [], terms), recipe.seeds[0] + order, device
        )
        _train(recipe, student, stream, terms, ask, steps)
        return student.network

    def measure(network: nn.Module, live: nn.Module) -> dict[str, float]:
        def predict(images: Tensor) -> Tensor:
            return network(normalise(images, recipe.data.normalisation))

        network.eval()
        here, there = (torch.cat([p.detach().double().flatten() for p in one.parameters()]) for one in (network, live))
        top1 = evaluate(predict, evaluation, 256, device, "evaluation", recipe.evaluation_crop).top1
        return {"distance": ((here - there).norm() / there.norm()).item(), "top1": top1}

    live = {name: train(terms, None, from_teacher) for name, terms in objectives.items()}
    drifts = {name: {"online": measure(live[name], live[name])} for name in objectives}
    for codec_name, codec in DRIFT_CODECS.items():
        with tempfile.TemporaryDirectory() as folder:
            capture = recipe.capture.model_copy(update={"codec": codec, "decisions": {}, "features": {}})
            path = Path(folder) / "store"
            cache_teacher(recipe.model_copy(update={"capture": capture}), manifest, roots, path, device)
            store = open_store(path)
            for name, terms in objectives.items():
                drifts[name][codec_name] = measure(
                    train(terms, store, stored_signal([store], terms, device)), live[name]
                )
    for name, terms in objectives.items():
        drifts[name]["other order"] = measure(train(terms, None, from_teacher, order=1), live[name])
    return drifts


def _train(
    recipe: Recipe,
    student: Student,
    stream: Loader,
    terms: Sequence[AnyTerm],
    ask: AskTeacher,
    steps: int,
) -> None:
    """Exactly `steps` steps of the recipe, without evaluation."""
    optimizer = make_optimizer(recipe.training, student.network)
    student.network.train()
    run = Run(recipe, "drift", terms, recipe.seeds[0], Folder(Path()), stream.device)
    for step in range(steps):
        epoch, in_epoch = divmod(step, stream.steps_per_pass)
        if in_epoch == 0:
            batches = stream.epoch(epoch)
        set_learning_rate(optimizer, learning_rate(recipe.training, step / stream.steps_per_pass))
        batch = next(batches)
        weights = term_weights(terms, epoch, recipe.training.epochs, stream.device)
        train_step(run, student, optimizer, batch, ask(batch), weights)
