"""Training as it is practised: every option against a loop written by hand in plain PyTorch."""

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, RECIPE, invoke, make_recipe, merged, refused
from safetensors.torch import load_file, save_file
from students import ended_after
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from offline_kd.data.label_sets import hidden_where, label_tensor, pack_sets
from offline_kd.distill import averaging, loop
from offline_kd.distill.averaging import WeightAverage, decay_of
from offline_kd.distill.loop import train_step
from offline_kd.distill.optimisation import learning_rate, make_optimizer
from offline_kd.distill.results import Result, Run
from offline_kd.distill.run_records import group_runs, read_runs
from offline_kd.distill.student import Student, compiled, new_student
from offline_kd.distill.teacher_signal import TeacherSignal
from offline_kd.distill.training import distill, make_loader, source_of, training_images
from offline_kd.models.checkpoints import read_state_dict
from offline_kd.models.evaluation_file import FILE, read_predictions
from offline_kd.models.kd_layer import insert_kd_layer
from offline_kd.models.networks import build, normalise
from offline_kd.objectives import OBJECTIVES
from offline_kd.recipe import Recipe, dump_recipe
from offline_kd.store.rows import Rows
from offline_kd.support.errors import ModelError, RecipeError, TrainingError
from offline_kd.support.files import file_sha256
from offline_kd.support.places import Folder
from offline_kd.support.strict import parse
from offline_kd.training_recipe import EMA, Training

ADAMW = {"name": "adamw", "lr": 0.01, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.3}


def recipe_with(student: str = "networks:small", **training: object) -> Recipe:
    """Two epochs of 7 steps, with labels alone."""
    return make_recipe(
        data={"tars": [2]},
        student={"model": student, "model_args": {"width": 4} if student == "networks:small" else {}},
        training={"epochs": 2, "schedule": {"name": "cosine", "warmup_epochs": 1}, **training},
    )


def trained(recipe: Recipe, manifest, roots, out: Path) -> Result:
    return distill(recipe, manifest, roots, out, CPU, objective="ce")


# ---- a loop by hand ------------------------------------------------------------------------------------------------


def spared(network: nn.Module) -> set[str]:
    return {name for name, one in network.named_parameters() if one.ndim == 1}  # biases, and both of BatchNorm


def by_hand(recipe: Recipe, manifest, roots) -> tuple[nn.Module, nn.Module | None]:
    """The student of a recipe and the average of its weights, from its first weights and its batches."""
    training = recipe.training
    images = training_images(recipe, manifest, roots)
    network = new_student(recipe, images, 0, CPU).network.train()
    parameters = dict(network.named_parameters())
    groups = [
        {"params": [one for name, one in parameters.items() if name not in spared(network)]},
        {"params": [parameters[name] for name in parameters if name in spared(network)], "weight_decay": 0.0},
    ]
    chosen = groups if training.optimizer.no_decay else list(parameters.values())
    if training.optimizer.name == "adamw":
        optimizer = torch.optim.AdamW(chosen, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    else:
        optimizer = torch.optim.SGD(chosen, lr=0.05, momentum=0.9, weight_decay=5e-4)
    average = None
    if training.ema:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(training.ema.decay), use_buffers=True)
    scaler = torch.amp.GradScaler("cpu", enabled=training.amp == "float16")
    dtype = torch.float16 if training.amp == "float16" else torch.bfloat16
    loader = make_loader(recipe, source_of(recipe, images), 0, CPU)
    for epoch in range(training.epochs):
        for batch in loader.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, epoch + batch.step / loader.steps_per_pass)
            optimizer.zero_grad()
            x, y = normalise(batch.images, recipe.data.normalisation), batch.labels
            edges = [len(y) * part // training.accumulate for part in range(training.accumulate + 1)]
            for start, stop in itertools.pairwise(edges):
                with torch.autocast("cpu", dtype, enabled=bool(training.amp)):
                    logits = network(x[start:stop])
                loss = F.cross_entropy(logits.float(), y[start:stop], reduction="sum") / len(y)
                scaler.scale(loss).backward()
            if training.clip_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), training.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            if average is not None:
                average.update_parameters(network)
    return network, None if average is None else average.module


OPTIONS: Mapping[str, dict[str, object]] = {
    "accumulation": {"accumulate": 3},
    "clipping": {"clip_norm": 0.5},
    "an average": {"ema": {"decay": 0.8, "warmup": False}},
    "no decay": {"optimizer": ADAMW | {"no_decay": ["bias", "norm"]}},
    "bfloat16": {"amp": "bfloat16"},
    "float16": {"amp": "float16", "clip_norm": 0.5, "accumulate": 2},
}


@pytest.fixture(scope="module")
def plain(manifest, roots) -> dict[str, Tensor]:
    """The student without options."""
    return by_hand(recipe_with(), manifest, roots)[0].state_dict()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_trains_the_student_of_a_plain_loop(name, plain, manifest, roots, tmp_path):
    recipe = recipe_with(**OPTIONS[name])
    trained(recipe, manifest, roots, tmp_path)
    network, average = by_hand(recipe, manifest, roots)
    found = {"": network} | ({} if average is None else {"_ema": average})
    for end, expected in found.items():
        ours = load_file(tmp_path / f"student{end}.safetensors")
        for key, tensor in expected.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6, msg=f"{end} {key}")
    # Each of them makes a difference.
    assert any(not torch.equal(plain[key], tensor) for key, tensor in found[max(found)].state_dict().items())


def test_true_is_bfloat16(manifest, roots, tmp_path):
    for name, amp in (("one", True), ("other", "bfloat16")):
        trained(recipe_with(amp=amp, epochs=1), manifest, roots, tmp_path / name)
    one, other = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "other"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_what_is_not_due_is_not_evaluated_and_the_student_is_the_same(manifest, roots, tmp_path):
    rare = {"evaluate_every": 3, "keep": ["best"]}
    results = {
        name: trained(recipe_with(epochs=5, **options), manifest, roots, tmp_path / name)
        for name, options in {"rare": rare, "always": {}}.items()
    }
    assert results["rare"].student_sha256 == results["always"].student_sha256
    rare, always = metrics(tmp_path / "rare"), metrics(tmp_path / "always")
    assert [line["epoch"] for line in rare if "top1" in line] == [3, 5]
    for found, known in zip(rare, always, strict=True):
        timed = {"seconds": 0, "images_per_second": 0}
        assert found | timed == {name: value for name, value in (known | timed).items() if name in found}
    evaluated = [line["top1"] for line in rare if "top1" in line]
    assert results["rare"].best_top1 == max(evaluated)
    runs = read_runs([tmp_path / "rare", tmp_path / "always"])
    assert len(group_runs(runs)) == 1  # one student, however often it was looked at


# ---- going on ------------------------------------------------------------------------------------------------------

ALL = {
    "ema": {"decay": 0.9},
    "amp": "float16",
    "clip_norm": 1.0,
    "accumulate": 2,
    "optimizer": ADAMW | {"no_decay": ["norm", "head.*"]},
    "keep": ["best", {"every": 1}],
    "checkpoint_steps": 3,
}


@pytest.fixture(scope="module")
def finished(manifest, roots, tmp_path_factory) -> Path:
    """A run with all options together."""
    out = tmp_path_factory.mktemp("options") / "run"
    trained(recipe_with(**ALL), manifest, roots, out)
    return out


def write(network: nn.Module, file: Path, **changes: Tensor) -> None:
    save_file({key: one.contiguous() for key, one in (network.state_dict() | changes).items()}, file)


def weights_of(out: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in out.glob("*.safetensors")}


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("steps", [5, 7])
def test_a_stopped_run_goes_on_to_the_same_weights(finished, manifest, roots, tmp_path, steps):
    """In the middle of a pass, and after its last step: with the average, the scale and what is kept."""
    with ended_after(steps), pytest.raises(KeyboardInterrupt):
        trained(recipe_with(**ALL), manifest, roots, tmp_path)
    trained(recipe_with(**ALL), manifest, roots, tmp_path)
    assert weights_of(tmp_path) == weights_of(finished)
    for ours, whole in zip(metrics(tmp_path), metrics(finished), strict=True):
        timed = {"seconds": 0, "images_per_second": 0}
        assert ours | timed == whole | timed


def test_weights_that_a_kill_kept_from_being_written_are_written_when_the_run_goes_on(
    finished, manifest, roots, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("result.json", "epoch-002.safetensors", "epoch-002_ema.safetensors"):
        (out / name).unlink()
    trained(recipe_with(**ALL), manifest, roots, out)
    assert weights_of(out) == weights_of(finished)


def test_kept_weights_are_those_that_metrics_and_result_tell_of(finished):
    lines = metrics(finished)
    result, files = json.loads((finished / "result.json").read_text()), weights_of(finished)
    kept = ["best", "epoch-001", "epoch-002", "student"]
    assert set(files) - {"evaluation.safetensors"} == {
        f"{name}{end}.safetensors" for name in kept for end in ("", "_ema")
    }
    for end in ("", "_ema"):
        tops = [line[f"top1{end}"] for line in lines]
        best = result[f"best_epoch{end}"]
        assert tops.index(max(tops)) + 1 == best
        assert files[f"best{end}.safetensors"] == files[f"epoch-{best:03d}{end}.safetensors"]
        assert files[f"student{end}.safetensors"] == files[f"epoch-002{end}.safetensors"]
        assert files[f"student{end}.safetensors"] == result[f"student{end}_sha256"]
    assert result["top1_ema"] == lines[-1]["top1_ema"]
    assert files["student.safetensors"] != files["student_ema.safetensors"]


def test_a_report_has_the_answers_of_the_weights_themselves_not_of_their_average(finished, tmp_path):
    result = json.loads((finished / "result.json").read_text())
    assert abs(result["top1"] - result["top1_ema"]) > 0.2
    answered = read_predictions((finished / FILE).read_bytes(), FILE)
    assert answered.top1 == pytest.approx(result["top1"])
    assert invoke("report", finished, "--out", tmp_path / "page.html").exit_code == 0
    (row,) = json.loads((tmp_path / "page.json").read_text())["rows"]
    assert row["top1_mean"] == result["top1"]
    assert sum(row["right_by_class"]) == round(result["top1"] / 100 * sum(row["images_by_class"]))


def test_a_finished_run_whose_average_was_changed_is_not_taken(finished, manifest, roots, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "student_ema.safetensors").write_bytes(b"another")
    with pytest.raises(TrainingError, match=r"student_ema\.safetensors: sha256 is .*, result\.json says"):
        trained(recipe_with(**ALL), manifest, roots, out)


@pytest.mark.parametrize("name", ["best.safetensors", "student_ema.safetensors", "epoch-002_ema.safetensors"])
def test_weights_of_something_else_are_not_overwritten(name, manifest, roots, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(TrainingError, match=f"{name}: belongs to a run whose last.ckpt is not here"):
        trained(recipe_with(**ALL), manifest, roots, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_without_options_has_the_identity_that_it_had_before_there_were_any(tmp_path):
    """As the first code with this order of samples computed it; otherwise runs that are under way would not go on."""
    recipe = make_recipe(training={"amp": True, "checkpoint_steps": 3})
    run = Run(recipe, "ce", recipe.objectives["ce"], 0, Folder(tmp_path), CPU)
    assert run.identity == "7852f2f2582606439c976afcc779d12aff039a126d28fef5ff4ae833add50e05"


# ---- accumulation --------------------------------------------------------------------------------------------------


def one_step(term: dict[str, object], accumulate: int) -> tuple[list[Tensor], float]:
    """The weights of a student after a step on 23 made-up rows, a third of them without a label, and the loss."""
    torch.manual_seed(0)
    recipe = recipe_with("networks:group_norm", accumulate=accumulate)
    terms = parse(Recipe, merged(RECIPE, {"objectives": {"one": [term]}}), where="test").objectives["one"]
    network, layers = build("networks:group_norm", 10), {}
    if "decisions" in term:
        layers = {
            terms[0].after: insert_kd_layer(network, "4", 20, value_ratio=1.0, example=torch.zeros(1, 3, 8, 8))[0]
        }
    known = torch.arange(23) % 3 > 0
    labels = torch.randint(0, 10, (23,)).where(known, -1)
    if terms[0].needs.label == "set":
        labels = hidden_where(label_tensor(pack_sets([[row % 10, 3] for row in range(23)], 10)), known)
    pixels = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)
    batch = Rows(np.arange(23, dtype=np.uint64), labels, labels, torch.ones(23), pixels=pixels)
    decided = {
        "id": torch.randint(0, 20, (23, 2, 2, 2)),
        "prob": torch.rand(23, 2, 2, 2),
        "subclass": torch.randint(0, 2, (23, 2, 2)),
        "table": torch.rand(20, 20).softmax(dim=1),
    }
    signal = TeacherSignal(3 * torch.randn(23, 10) + 2, {"made": decided})
    run = Run(recipe, "one", terms, 0, Folder(Path()), CPU)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    logits, values = train_step(run, Student(network.train(), layers), optimizer, batch, signal, torch.ones(1))
    assert logits.shape == (23, 10)
    # BatchNorm of the KD layer stands behind the scores that its term is about.
    return [one.detach() for name, one in network.named_parameters() if ".norm." not in name], values.item()


TERMS: list[dict[str, object]] = [
    {"term": name, **one.example}
    for name, one in OBJECTIVES.items()
    if not {"decisions", "features"} & set(one.example)
] + [
    {"term": "decisions", "decisions": "made", "after": "4"},
    {"term": "subclass_decisions", "decisions": "made", "after": "4"},
]


@pytest.mark.parametrize("term", TERMS, ids=lambda term: str(term["term"]))
def test_parts_of_a_batch_have_the_gradient_of_the_whole(term):
    """Of 8, 7 and 8 rows. DIST alone is another: it correlates over the rows of a part."""
    (whole, loss), (parts, sum_of_parts) = one_step(term, 1), one_step(term, 3)
    same = all(torch.allclose(one, other, rtol=0, atol=2e-6) for one, other in zip(whole, parts, strict=True))
    if term["term"] == "dist":
        assert not same
        return
    assert same, max((one - other).abs().max() for one, other in zip(whole, parts, strict=True))
    assert sum_of_parts == pytest.approx(loss, rel=1e-5)


def test_a_small_last_batch_passes_in_fewer_parts():
    assert [part.stop - part.start for part in loop._pieces(23, 3)] == [7, 8, 8]
    assert [part.stop - part.start for part in loop._pieces(5, 4)] == [2, 3]
    assert loop._pieces(1, 4) == [slice(0, 1)]


# ---- averages ------------------------------------------------------------------------------------------------------


def test_the_decay_grows_with_the_steps():
    settings = EMA(decay=0.99)
    assert [decay_of(settings, n) for n in (0, 1, 2, 890, 10**6)] == [0, 2 / 11, 3 / 12, 0.99, 0.99]
    assert [decay_of(EMA(decay=0.99, warmup=False), n) for n in (0, 1, 2)] == [0, 0.99, 0.99]


def test_nothing_between_gradients_and_weights_waits_for_a_gpu(monkeypatch):
    """With tensors that are on a GPU and hold no numbers: asking for one raises, and so does a mix of devices."""

    def network_on_gpu(_: object = None) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4, device="cuda"), nn.BatchNorm1d(4, device="cuda"))

    monkeypatch.setattr(averaging.copy, "deepcopy", network_on_gpu)  # which cannot copy such tensors
    with FakeTensorMode():
        network = network_on_gpu()
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        training = recipe_with(clip_norm=0.5, ema={}, optimizer={"no_decay": ["norm"]}).training
        optimizer = make_optimizer(training, network)
        average = WeightAverage(network, EMA())
        for _ in range(2):
            loop._update(Student(network, {}, average=average), optimizer, training)
        assert {one.device.type for one in average.network.parameters()} == {"cuda"}


# ---- pretrained students -------------------------------------------------------------------------------------------


def test_a_student_begins_from_weights_whose_head_may_be_for_other_classes(manifest, roots, tmp_path, capsys):
    recipe, images = recipe_with(), training_images(recipe_with(), manifest, roots)
    other = build("networks:small", 7, {"width": 4})
    write(other, tmp_path / "seven.safetensors")
    student = new_student(
        recipe, images, 0, CPU, weights=read_state_dict(tmp_path / "seven.safetensors")
    ).network.state_dict()
    assert "is for another number of classes: head.weight, head.bias begin anew" in " ".join(
        capsys.readouterr().err.split()
    )
    for name, tensor in student.items():
        expected = torch.zeros_like(tensor) if name.startswith("head.") else other.state_dict()[name]
        assert torch.equal(tensor, expected)
    for damage in (
        {"body.0.weight": torch.zeros(7, 3, 3, 3)},  # as many rows as the head has, and the network wants 4
        {"head.bias": torch.zeros(8)},  # two numbers of classes
        {"more": torch.zeros(1)},
    ):
        write(other, tmp_path / "bad.safetensors", **damage)
        with pytest.raises(ModelError, match=r"bad\.safetensors: '"):
            new_student(recipe, images, 0, CPU, weights=read_state_dict(tmp_path / "bad.safetensors"))


def test_a_run_is_known_by_the_weights_it_began_from(manifest, roots, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "moved", "second")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        torch.manual_seed(seed)
        write(build("networks:small", 10, {"width": 4}), file)
    recipes = [
        parse(Recipe, merged(recipe_with(epochs=1).model_dump(), {"student": {"weights": str(file)}}), where="test")
        for file in files
    ]
    result = trained(recipes[0], manifest, roots, tmp_path / "run")
    assert result.initial_sha256 == file_sha256(files[0])
    assert trained(recipes[1], manifest, roots, tmp_path / "run") == result  # the same, elsewhere
    with pytest.raises(TrainingError, match="holds a run of another recipe, objective, seed or store"):
        trained(recipes[2], manifest, roots, tmp_path / "run")


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("amp=fp8", "Input should be False, True, 'bfloat16' or 'float16', got 'fp8'"),
        ("compile=fast", "got 'fast'"),
        ("ema.decay=1", "Input should be less than 1"),
        ("ema.rate=1", "unknown field 'training.ema.rate'"),
        ("accumulate=40", "accumulate is 40, batch_size 64: a part must have 2 rows at least"),
        ("clip_norm=0", "Input should be greater than 0"),
        ("optimizer.layer_decay=2", "less than or equal to 1"),
        ("optimizer.no_decay=[head.wait]", "no parameter of the student has such a name. Did you mean 'head.weight'?"),
        ("keep=[worst]", "Input should be 'best'"),
        ("keep=[{each: 3}]", "'training.keep.0"),
    ],
)
def test_a_wrong_option_is_one_line(field, said, where, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_with()))
    message = refused(
        "train", tmp_path / "recipe.yaml", "--set", f"training.{field}", "--out", tmp_path / "out", *where
    )
    assert said in message


def test_weights_between_passes_are_refused():
    with pytest.raises(RecipeError, match="keep: every is 3, views_per_decode 2"):
        parse(
            Training, recipe_with().training.model_dump() | {"keep": [{"every": 3}], "views_per_decode": 2}, where="x"
        )


# ---- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "amp": True, "ema": {}}])
def test_a_compiled_student_is_the_plain_one(options, recipe, manifest, roots, store_path, tmp_path):
    """With a KD layer, whose scores leave the compiled part by an attribute."""
    weights = []
    for name, more in (("plain", {}), ("compiled", {"compile": True})):
        again = recipe_with(**options, **more)
        again = again.model_copy(update={"training": again.training.model_copy(update={"epochs": 1})})
        trained(again, manifest, roots, tmp_path / name)
        weights.append(load_file(tmp_path / name / "student.safetensors"))
    assert list(weights[0]) == list(weights[1])
    for key, tensor in weights[0].items():
        torch.testing.assert_close(
            weights[1][key], tensor, rtol=1e-2 if options else 1e-4, atol=1e-2 if options else 1e-4
        )


@pytest.mark.slow
def test_a_kd_layer_in_a_compiled_student_gives_its_scores():
    """They leave the compiled part by an attribute."""
    found = []
    for mode in (False, True):
        torch.manual_seed(0)
        network = build("networks:small", 10)
        layer, _ = insert_kd_layer(network, "body.4", 6, value_ratio=1.0, example=torch.zeros(1, 3, 8, 8))
        student = compiled(Student(network.train(), {"body.4": layer}), recipe_with(compile=mode).training)
        for rows in (8, 8, 5):
            network.zero_grad()
            x = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))
            logits = (student.network if student.trained is None else student.trained)(x)
            assert layer.scores is not None
            (layer.scores.square().mean() + logits.square().mean()).backward()
        found.append([one.grad for one in network.parameters()])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_one_line(manifest, roots, tmp_path):
    from torch._inductor import config

    recipe = recipe_with(compile=True)
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model_args": {"width": 5}})})
    said = pytest.raises(TrainingError, match=r"training\.compile: torch\.compile cannot do this student here \(")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), said:
        trained(recipe, manifest, roots, tmp_path)


def test_a_network_whose_statistics_are_too_slow_for_so_few_steps_is_told_of(recipe_file, where, tmp_path):
    few = ("--set", "data.tars=[2]", "--set", "training.epochs=1", "--set", "training.batch_size=16")
    said = invoke("train", recipe_file, "--out", tmp_path / "few", *few, *where).stderr
    assert said.count("warning: the running statistics") == 1
    assert "change by 0.1 a step, and there are " in said
    many = (*few[:2], "--set", "training.epochs=2", "--set", "training.batch_size=4")
    assert "warning: the running" not in invoke("train", recipe_file, "--out", tmp_path / "many", *many, *where).stderr
