"""A trained student for other programs: ONNX, torch.export, timm. What is written has given the student's own logits.

`onnx` and `torch-export` are one file, for batches of any size; classes and the rest of `StudentFile` are in its
metadata, under `offline_kd`. `timm` is a folder: weights, and the JSON by which timm knows input and classes.
"""

import copy
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from offline_kd.data.manifest import Normalisation
from offline_kd.models.networks import build, normalise
from offline_kd.models.student_file import ENTRY, OTHER_WEIGHTS, TrainedStudent
from offline_kd.support.errors import ModelError, RecipeError
from offline_kd.support.files import write_atomically

Format = Literal["onnx", "torch-export", "timm"]
# uint8: pixels 0..255; float: float32 0..1; normalised: what the network takes. The first two normalise inside.
Input = Literal["uint8", "float", "normalised"]
TOLERANCE = 1e-4  # of a logit; of logits beyond 1, relative to the largest
MAX_ONNX_BYTES = 2**31 - 2**20  # a protobuf holds no more, and the graph takes some
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # as timm calls them


@dataclass(frozen=True)
class Agreement:
    """How near what was written comes to the student itself."""

    images: int
    difference: float  # largest, of any logit
    largest: float  # logit


class WithInput(nn.Module):
    """A network that takes pixels: `[B, 3, H, W]`, uint8 or float32 in 0..1, and normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalisation: Normalisation, form: Input) -> None:
        super().__init__()
        self.network, self.form = network, form
        self.register_buffer("mean", torch.tensor(normalisation.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(normalisation.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.form != "normalised":
            pixels = images / 255 if self.form == "uint8" else images
            images = (pixels - self.mean) / self.std
        logits: Tensor = self.network(images)
        return logits


def export_student(student: TrainedStudent, form: Format, out: Path, images: Tensor, takes: Input) -> Agreement:
    """Write `out`, which is compared with the student on some images before it appears.

    Args:
        student: on the CPU.
        out: a file; a folder for timm.
        images: `[n, 3, H, W]` uint8, as the student takes them.
        takes: the input of what is written; timm's is always normalised by who asks.

    Raises ModelError for a network that cannot be exported, RecipeError where a package is missing or the format is not
    one for this student, and ModelError for logits that differ by more than TOLERANCE: then nothing is written.
    """
    if form == "timm":
        return _write_timm(student, out, images)
    make = {"onnx": _onnx, "torch-export": _torch_export}[form]
    content, ask = make(student, takes)
    agreement = _compare(student, ask, _fed(images, student.about.normalisation, takes), images, str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, content)
    return agreement


def _fed(images: Tensor, normalisation: Normalisation, takes: Input) -> Tensor:
    if takes == "normalised":
        return normalise(images, normalisation)
    return images / 255 if takes == "float" else images


def _compare(
    student: TrainedStudent, ask: Callable[[Tensor], Tensor], fed: Tensor, images: Tensor, where: str
) -> Agreement:
    """Of one image alone, and of the others in one batch."""
    expected = student.vectors(images) if student.about.kind == "embedding" else student.logits(images)
    found = torch.cat([ask(part) for part in (fed[:1], fed[1:]) if len(part)])
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ModelError(
            f"{where}: logits differ by {difference:.3g} from the student's, whose largest is {largest:.3g}. Nothing "
            "was written: export in another format, or use the student itself."
        )
    return Agreement(len(images), difference, largest)


@torch.no_grad()
def _without_gradients(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


# ---- formats -------------------------------------------------------------------------------------------------------


def _program(student: TrainedStudent, takes: Input) -> torch.export.ExportedProgram:
    """The student as a graph, for batches of any size."""
    about = student.about
    plain = copy.deepcopy(student.network)
    for tensor in (*plain.parameters(), *plain.buffers()):
        tensor.data = tensor.data.contiguous()  # channels-last is not what files hold
    network = WithInput(plain, about.normalisation, takes).eval()
    try:
        example = _fed(torch.zeros((2, 3, *about.input_size), dtype=torch.uint8), about.normalisation, takes)
        return torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # whatever the code of a network leads to
        raise _cannot(student, error) from error


def _cannot(student: TrainedStudent, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(f"{student.about.model}: cannot be exported ({lines[0][:200]}). Use the student itself.")


def _torch_export(student: TrainedStudent, takes: Input) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    buffer = io.BytesIO()
    about = student.about.model_dump_json(exclude_none=True)
    torch.export.save(_program(student, takes), buffer, extra_files={f"{ENTRY}.json": about})
    written = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda images: _without_gradients(written, images)


def _onnx(student: TrainedStudent, takes: Input) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it, and says so in other words
        from torch import onnx
    except ImportError as error:
        raise RecipeError(f"{error.name} is not installed: pip install 'offline-kd[onnx]'") from error
    size = sum(tensor.nbytes for tensor in student.network.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ModelError(
            f"{student.about.model}: has {size:,} bytes of weights, an ONNX file holds 2 GiB. Use torch-export."
        )
    try:
        made = onnx.export(
            _program(student, takes),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
        )
    except onnx.errors.OnnxExporterError as error:
        raise _cannot(student, error) from error
    assert made is not None
    made.model.metadata_props[ENTRY] = student.about.model_dump_json(exclude_none=True)
    content = made.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_timm(student: TrainedStudent, out: Path, images: Tensor) -> Agreement:
    """For `timm.create_model(NAME, num_classes=..., checkpoint_path=OUT/model.safetensors)`, or `local-dir:OUT`."""
    about, network = student.about, student.network
    if not about.model.startswith("timm:") or about.kd_layers:
        what = "has KD layers inside, which timm does not know" if about.kd_layers else f"is '{about.model}'"
        raise RecipeError(f"the student {what}: timm loads its own models only. Use --format onnx or torch-export.")
    weights = safetensors.torch.save({name: one.contiguous() for name, one in network.state_dict().items()})
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / WEIGHTS
        file.write_bytes(weights)
        args = {name: value for name, value in about.model_args.items() if name not in OTHER_WEIGHTS}
        loaded = build(about.model, len(about.classes), {**args, "checkpoint_path": str(file)}).eval()
    fed = normalise(images, about.normalisation)
    agreement = _compare(student, lambda images: _without_gradients(loaded, images), fed, images, str(out))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / WEIGHTS, weights)
    write_atomically(out / CONFIG, json.dumps(_timm_config(student, args), indent=2) + "\n")
    return agreement


def _timm_config(student: TrainedStudent, args: dict[str, int | float | str | bool]) -> dict[str, object]:
    about = student.about
    height, width = about.input_size
    pretrained = {
        "input_size": [3, height, width],
        "fixed_input_size": False,
        "crop_pct": about.crop.size / about.crop.resize if about.crop else 1.0,
        "crop_mode": "center",
        "interpolation": about.crop.interpolation if about.crop else "bilinear",
        "mean": about.normalisation.mean,
        "std": about.normalisation.std,
        "num_classes": len(about.classes),
        "label_names": about.classes,
    }
    return {
        "architecture": about.model.removeprefix("timm:"),
        "num_classes": len(about.classes),
        "num_features": getattr(student.network, "num_features", None),
        "pretrained_cfg": pretrained,
        "model_args": args,
    }


FORMATS, INPUTS = get_args(Format), get_args(Input)
