"""How a teacher computes: what a recipe says is what is done, recorded, and done again; batches found by trial."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, invoke, refused
from networks import small
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offline_kd.cache.asking import Batch, Inquiry, Portion, answer
from offline_kd.cache.fidelity import ask_again
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import fastest_batch_size, load_teacher
from offline_kd.distill.training import training_images
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import Recipe, dump_recipe
from offline_kd.store.decisions import TemplateDecisions
from offline_kd.store.identity import DecisionsIdentity, TeacherIdentity
from offline_kd.store.opening import open_store
from offline_kd.support.errors import TeacherError
from offline_kd.views.kind import draw


def teacher_of(network: nn.Module, recipe: Recipe, **about: object) -> Teacher:
    network.requires_grad_(False).eval()
    return Teacher(
        "t", "m", {}, "0" * 64, recipe.data.normalisation, None, expected=None, licence="", network=network,
        batch_size=64, **{"dtype": "float32"} | about,
    )  # fmt: skip


def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Notes(nn.Module):
    """Says how torch computes while it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Conv2d(3, 4, 8), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        backends = torch.backends
        self.seen.append((y.dtype, backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision))
        return y.flatten(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_products_and_logits_are_float32(dtype, recipe):
    network = Notes()
    logits = teacher_of(network, recipe, dtype=dtype).logits(images())
    assert logits.dtype == torch.float32
    assert network.seen[0][0] == getattr(torch, dtype)
    assert network.layer.weight.dtype == torch.float32


def test_tf32_is_as_the_recipe_says_while_the_teacher_is_asked_and_as_before_afterwards(recipe):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    for elsewhere in ("ieee", "tf32"):
        matmul.fp32_precision = conv.fp32_precision = elsewhere
        try:
            for tf32, expected in ((False, "ieee"), (True, "tf32")):
                network = Notes()
                teacher_of(network, recipe, tf32=tf32).logits(images())
                assert network.seen[0][1:] == (expected, expected)
                assert (matmul.fp32_precision, conv.fp32_precision) == (elsewhere, elsewhere)
        finally:
            matmul.fp32_precision, conv.fp32_precision = before


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same_with_and_without_taps(recipe):
    network = small(10)
    points = [TapPoint(module="body.5"), TapPoint(module="body.2", at="input", grid=(2, 2))]
    plain, compiled = teacher_of(network, recipe), teacher_of(network, recipe, compile=True)
    for count in (5, 5, 3):
        expected, maps = plain.logits_and_maps(images()[:count], points)
        torch.testing.assert_close(compiled.logits(images()[:count]), expected, rtol=1e-4, atol=1e-4)
        again, again_maps = compiled.logits_and_maps(images()[:count], points)
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
        for one, other in zip(again_maps, maps, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not network.body[5]._forward_hooks


def test_what_a_store_says_of_its_teacher_is_left_out_where_it_is_as_ever(store_path):
    about = json.loads((store_path / "store.json").read_text())["teacher"]
    assert not {"compile", "tf32"} & set(about)
    described = TeacherIdentity.model_validate(about)
    assert described.arithmetic == "float32"
    fast = described.model_copy(update={"dtype": "float16", "compile": True, "tf32": True})
    assert fast.arithmetic == "float16, TF32, compiled"
    assert {"compile": True, "tf32": True}.items() <= json.loads(fast.model_dump_json()).items()


def test_a_recipe_that_leaves_it_as_it_was_is_written_as_it_was(recipe):
    written = yaml.safe_load(dump_recipe(recipe))
    assert not {"compile", "tf32"} & set(written["teacher"])
    assert "batch_size" not in written["capture"]


def test_a_half_precision_store_says_so_and_its_teacher_is_asked_again_in_half_precision(
    recipe, manifest, roots, where, recipe_file, tmp_path
):
    half = recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"dtype": "bfloat16", "tf32": True}),
            "data": recipe.data.model_copy(update={"tars": [2]}),
        }
    )
    cache_teacher(half, manifest, roots, tmp_path / "store", CPU)
    store = open_store(tmp_path / "store")
    assert (store.identity.teacher.dtype, store.identity.teacher.tf32) == ("bfloat16", True)
    assert "bfloat16, TF32" in (tmp_path / "store" / "README.md").read_text()
    again = ask_again(store, recipe, manifest, roots, 50, CPU)  # the recipe's own dtype is float32
    assert again.max_error < 1e-5
    command = ("cache-teacher", recipe_file, "--store", tmp_path / "store", "--set", "data.tars=[2]", *where)
    assert "its teacher.dtype is 'bfloat16', this run's is 'float32'" in refused(*command)
    message = refused(*command, "--set", "teacher.dtype=bfloat16")
    assert "its teacher.tf32 is True, this run's is" in message
    late = "capture.decisions={late: {kind: templates, module: body.5, templates: 8}}"
    assert "its teacher.dtype is 'bfloat16'" in refused(*command, "--set", late)
    same = ("--set", "teacher.dtype=bfloat16", "--set", "teacher.tf32=true")
    assert invoke(*command, *same).exit_code == 0


# ---- batch size ----------------------------------------------------------------------------------------------------


def limited(rise_until: int, limit: int) -> tuple[object, list[int]]:
    """A device that is faster with larger batches up to a size, and has memory up to another."""
    tried: list[int] = []

    def seconds(size: int) -> float:
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError(f"{size}")
        return 0.01 + max(0, size - rise_until) * 1e-3

    return seconds, tried


def test_batches_are_doubled_until_that_is_no_faster():
    seconds, tried = limited(rise_until=256, limit=10_000)
    assert fastest_batch_size(seconds) == 256
    assert tried == [size for size in (64, 128, 256, 512) for _ in range(3)]


def test_batches_that_do_not_fit_are_halved():
    assert fastest_batch_size(limited(10_000, 700)[0]) == 512
    assert fastest_batch_size(limited(10_000, 20)[0]) == 16
    assert fastest_batch_size(limited(10_000, 1)[0]) == 1
    with pytest.raises(TeacherError, match="too small for one image"):
        fastest_batch_size(limited(10_000, 0)[0])
    assert fastest_batch_size(limited(10**9, 10**9)[0]) == 8192


def test_on_a_cpu_nothing_is_tried_and_a_number_is_a_number(recipe, manifest, roots):
    assert load_teacher(recipe, manifest, roots, 10, CPU).batch_size == 64
    chosen = recipe.model_copy(update={"capture": recipe.capture.model_copy(update={"batch_size": 7})})
    assert load_teacher(chosen, manifest, roots, 10, CPU).batch_size == 7


# ---- without a GPU, for the GPU ------------------------------------------------------------------------------------


def test_nothing_waits_for_a_gpu_while_the_teacher_is_asked(recipe, manifest, roots, store_path):
    """On a made-up GPU: whatever needs a value of it, or mixes devices, raises."""
    store, cuda = open_store(store_path), torch.device("cuda")
    config = TemplateDecisions(kind="templates", module="body.5", templates=16)
    last = DecisionsIdentity(config=config, channels=16, height=4, width=4)
    identity = store.identity.model_copy(update={"decisions": {"last": last}})
    block = training_images(recipe, manifest, roots)[0]
    portion = Portion(block, draw(identity.views, block.key_hash, block.sizes()), 0, 0)
    with FakeTensorMode():
        teacher = teacher_of(on(small(10), cuda), recipe)
        inquiry = Inquiry(teacher, identity, {"last": {"centroids": torch.zeros(16, 16, device=cuda)}}, cuda)
        pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device=cuda)
        batch = Batch(np.arange(4), np.arange(4), pixels, torch.zeros(4, dtype=torch.int64, device=cuda), None)
        found = answer(inquiry, portion, batch)
    assert (found.logits.device.type, tuple(found.logits.shape), found.logits.dtype) == ("cpu", (4, 10), torch.float32)
    assert tuple(found.finite.shape) == (2,)
    assert tuple(found.decided["decisions/last/id"].shape) == (4, 4, 4, 4)


def on(network: nn.Module, device: torch.device) -> nn.Module:
    """A made-up network moved to a made-up device, tensor by tensor: modules cannot be."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(device), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return network
