"""The benchmark networks are the published ones, and weights load only where they belong."""

import pickle

import pytest
import safetensors.torch
import torch
from conftest import CPU, invoke, make_recipe
from torch import nn

from offline_kd.cache.teacher import gate, load_teacher
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import Normalisation, data_roots
from offline_kd.models.evaluation import evaluate
from offline_kd.models.networks import CIFAR, build, normalise, parameter_count
from offline_kd.models.weights import find_weights, load_weights
from offline_kd.support.errors import ModelError

# Parameters with 100 classes (with 10 for option-A ResNets), and the shape of the last feature map for 32x32 images, of
# RepDistiller (github HobbitLong/RepDistiller) and of akamaster/pytorch_resnet_cifar10.
PUBLISHED = {
    "resnet8": (83_892, "layer3", (64, 8, 8)),
    "resnet14": (181_108, "layer3", (64, 8, 8)),
    "resnet20": (278_324, "layer3", (64, 8, 8)),
    "resnet32": (472_756, "layer3", (64, 8, 8)),
    "resnet44": (667_188, "layer3", (64, 8, 8)),
    "resnet56": (861_620, "layer3", (64, 8, 8)),
    "resnet110": (1_736_564, "layer3", (64, 8, 8)),
    "resnet8x4": (1_233_540, "layer3", (256, 8, 8)),
    "resnet32x4": (7_433_860, "layer3", (256, 8, 8)),
    "wrn_16_1": (180_916, "block3", (64, 8, 8)),
    "wrn_16_2": (703_284, "relu", (128, 8, 8)),
    "wrn_40_1": (569_780, "relu", (64, 8, 8)),
    "wrn_40_2": (2_255_156, "relu", (128, 8, 8)),
    "vgg8": (3_965_028, "block4", (512, 4, 4)),
    "vgg13": (9_462_180, "block4", (512, 4, 4)),
    "resnet50": (23_705_252, "layer4", (2048, 4, 4)),
    "mobilenetv2": (812_836, "conv2", (1280, 2, 2)),
    "shufflenetv1": (949_258, "layer3", (960, 4, 4)),
    "shufflenetv2": (1_355_528, "bn2", (1024, 4, 4)),
    "resnet20_a": (269_722, "layer3", (64, 8, 8)),
    "resnet32_a": (464_154, "layer3", (64, 8, 8)),
    "resnet44_a": (658_586, "layer3", (64, 8, 8)),
    "resnet56_a": (853_018, "layer3", (64, 8, 8)),
    "resnet110_a": (1_727_962, "layer3", (64, 8, 8)),
}


@pytest.mark.parametrize("name", CIFAR)
def test_networks_have_the_published_parameters_and_feature_maps(name):
    parameters, last, shape = PUBLISHED[name]
    classes = 10 if name.endswith("_a") else 100
    model = build(f"cifar:{name}", classes).eval()
    assert parameter_count(model) == parameters
    maps = []
    model.get_submodule(last).register_forward_hook(lambda module, inputs, output: maps.append(output.shape))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, classes)
    assert maps == [(2, *shape)]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet20", ["conv1.weight", "layer2.0.downsample.1.running_var", "layer3.2.conv2.weight", "fc.bias"]),
        ("resnet20_a", ["conv1.weight", "layer2.0.conv1.weight", "layer3.2.bn2.bias", "linear.weight"]),
        ("wrn_40_2", ["block1.layer.0.convShortcut.weight", "block3.layer.5.bn2.weight", "bn1.bias", "fc.weight"]),
        ("vgg13", ["block0.0.weight", "block0.3.bias", "block4.4.running_mean", "classifier.weight"]),
        ("resnet50", ["layer1.0.shortcut.1.weight", "layer4.2.conv3.weight", "linear.bias"]),
        ("mobilenetv2", ["conv1.1.weight", "blocks.5.2.conv.7.weight", "conv2.0.weight", "classifier.0.bias"]),
        ("shufflenetv1", ["conv1.weight", "layer1.0.conv3.weight", "layer2.7.bn3.bias", "linear.weight"]),
        ("shufflenetv2", ["layer1.0.conv5.weight", "layer2.7.bn3.weight", "conv2.weight", "bn2.bias"]),
    ],
)
def test_state_dict_keys_are_those_of_published_checkpoints(name, keys):
    assert set(keys) <= set(build(f"cifar:{name}", 100).state_dict())


def test_every_source_of_networks_works():
    for name in ("torchvision:resnet18", "timm:resnet10t", "networks:small"):
        size = 8 if name.startswith("networks") else 64
        assert build(name, 7).eval()(torch.zeros(1, 3, size, size)).shape == (1, 7)
    assert build("networks:small", 7, {"width": 4}).head.in_features == 128


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cifar:resnt110", {}, "Did you mean 'resnet110'?"),
        ("torchvision:resnet19", {}, "Did you mean 'resnet18'?"),
        ("timm:resnet19z", {}, "timm has no"),
        ("resnet20", {}, "is no network name"),
        ("networks:tiny", {}, "cannot be imported"),
        ("nowhere:tiny", {}, "cannot be imported"),
        ("networks:no_module", {}, "returned a int"),
        ("networks:small", {"depth": 3}, "cannot be built with {'depth': 3}"),
    ],
)
def test_unknown_networks_are_named(name, args, message):
    with pytest.raises(ModelError, match=message.replace("?", r"\?")):
        build(name, 10, args)


def test_published_checkpoints_load_whatever_they_are_wrapped_in(tmp_path):
    model = build("cifar:resnet8", 100)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "epoch": 240}, tmp_path / "repdistiller.pth")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "parallel.pth")
    torch.save(state, tmp_path / "bare.pt")
    halved = {name: tensor.half() for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(halved, tmp_path / "half.safetensors")
    for file in tmp_path.iterdir():
        other = build("cifar:resnet8", 100)
        load_weights(other, file)
        tolerance = 2e-3 if file.name.startswith("half") else 0
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(parameter.detach(), state[name], rtol=tolerance, atol=tolerance)


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


def test_weights_that_do_not_belong_are_refused_and_nothing_is_unpickled(tmp_path):
    model = build("cifar:resnet8", 100)
    own = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}

    def refused(state: object, message: str, name: str = "w.pt"):
        torch.save(state, tmp_path / name)
        with pytest.raises(ModelError, match=message):
            load_weights(model, tmp_path / name)

    refused({**own, "fc.weight": torch.zeros(10, 64)}, r"'fc.weight' is \[10, 64\], the network's is \[100, 64\]")
    refused({k: v for k, v in own.items() if k != "fc.bias"}, "lacks 'fc.bias'")
    refused({**own, "extra": torch.zeros(1)}, r"'extra' .* has no place")
    refused([1, 2], "holds no state dict")
    refused(Attack(), "not readable as a checkpoint of plain tensors")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ModelError, match="not readable"):
        load_weights(model, tmp_path / "raw.pth")
    (tmp_path / "t.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="not readable as safetensors"):
        load_weights(model, tmp_path / "t.safetensors")


def test_weights_are_found_by_manifest_name_and_checked(tmp_path, manifest):
    with pytest.raises(ModelError, match="Did you mean 'cifar10_resnet56'"):
        find_weights("cifar10_resnet65", manifest, [tmp_path])
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "cifar10_resnet56.safetensors").write_bytes(b"other weights")
    with pytest.raises(ModelError, match=r"sha256 is [0-9a-f]{64}, the manifest says 7163d700"):
        find_weights("cifar10_resnet56", manifest, [tmp_path])


def test_pixels_are_normalised_per_channel():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 5)
    x = normalise(images, Normalisation(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)))
    assert x.dtype == torch.float32
    assert x[:, :, 0, 0].tolist() == [[-1.0, -1.0, 0.0], [1.0, 3.0, 1.0]]


def test_evaluation_measures_accuracy_and_calibration(manifest, roots):
    loader = BlockLoader(manifest.dataset("digits"), manifest.split("digits", "test"), roots)
    labels = torch.from_numpy(loader[0].labels).long()
    confident = 10 * nn.functional.one_hot(labels, 10).float()
    confident[:36] = confident[:36].roll(1, dims=1)  # 36 of 359 are wrong
    answers = iter(confident.split(100))
    measured = evaluate(lambda images: next(answers), loader, 100, CPU, "test")
    confidence = torch.softmax(confident[0], 0).max().item()
    assert measured.samples == 359
    assert measured.top1 == pytest.approx(100 * 323 / 359)
    assert measured.ece == pytest.approx(abs(confidence - 323 / 359), abs=1e-5)
    with pytest.raises(ModelError, match="gives 7 logits, the dataset has 10 classes"):
        evaluate(lambda images: torch.zeros(len(images), 7), loader, 100, CPU, "test")


def test_real_weights_of_other_libraries_and_half_precision_load(manifest, real_data):
    for name in ("imagenet_efficientnet_lite0", "imagenet_efficientnet_lite2"):
        path, sha256 = find_weights(name, manifest, [real_data])
        assert sha256 == manifest.teachers[name].weights.sha256
        model = build(manifest.teachers[name].model, 1000)
        load_weights(model, path)
        assert model.eval()(torch.zeros(1, 3, 64, 64)).isfinite().all()
    result = invoke("data", "check", "cifar100_linear_head_on_lite0_128px", "--data-root", real_data)
    assert "has the sha256 of the manifest" in result.stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cifar10_resnet20", 91.73), pytest.param("cifar10_resnet56", 93.39, marks=pytest.mark.slow)],
)
def test_real_teachers_have_their_published_accuracy(name, expected, manifest, real_data):
    recipe = make_recipe(
        data={"dataset": "cifar10"}, teacher={"weights": name, "model": None, "training": None}, views={"flip": True}
    )
    roots = data_roots([real_data])
    teacher = load_teacher(recipe, manifest, roots, 10, CPU)
    measured, _ = gate(teacher, recipe, manifest, roots, CPU)
    assert measured.evaluated_on == "cifar10/test"
    assert measured.top1 == pytest.approx(expected, abs=0.005)
