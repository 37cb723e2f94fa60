"""What a file of trained weights says of itself, and the student that it builds.

The header of `student.safetensors` has one entry, `offline_kd`: the JSON of a `StudentFile`. Tensors and this JSON are
all that is read: nothing of a file is run, and no code is imported because a file names it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from numpy import asarray
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from offline_kd.data.decoding import upright_rgb
from offline_kd.data.expected import Kind
from offline_kd.data.fetching import Fetched, is_url
from offline_kd.data.manifest import EvaluationCrop, Normalisation
from offline_kd.models.checkpoints import read_state_dict
from offline_kd.models.kd_layer import KDLayer, WithKDLayer
from offline_kd.models.networks import build, build_without_head, normalise
from offline_kd.models.weights import load_state
from offline_kd.objectives.features import Projection
from offline_kd.support.errors import DataError, ModelError, did_you_mean, shorten
from offline_kd.support.places import place_at
from offline_kd.support.strict import Count, Seed, Sha256, Strict, parse
from offline_kd.views.render import Pixels, evaluation_crop

# One entry: safetensors writes several in an order that changes from one process to the next.
ENTRY = "offline_kd"
PROJECTIONS = "offline_kd.projection."  # what the names of tensors of projections begin with
MAX_BYTES = 2**40  # of a file of weights
OURS = ("cifar", "torchvision", "timm")  # where networks come from whose code is installed anyway
# Arguments of timm and torchvision that fetch or read other weights: those of the file are all that is wanted.
OTHER_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")


class KDLayerInside(Strict):
    """A KD layer of a student. Its sizes are those of its tensors."""

    after: str = Field(description="module it stands behind, by the name that this has once those before are put in")
    value_ratio: float


def _is_classifier(kind: object) -> bool:
    """Left out of JSON, so that files of classifiers are the same bytes as before."""
    return kind == "classifier"


class StudentFile(Strict):
    """What is known of a student, beside its weights: enough to build it, to feed it and to read what it says."""

    file_version: int = Field(1, ge=1, le=1)
    model: str = Field(description="of the network, as recipes name it")
    model_args: dict[str, int | float | str | bool] = Field({}, description="more arguments of the network")
    kd_layers: list[KDLayerInside] = Field([], description="those that are inside, in the order they are put in")
    kind: Kind = Field(
        "classifier",
        exclude_if=_is_classifier,
        description="embedding: it gives vectors, and no logits; multilabel: logits of a sigmoid for every class",
    )
    classes: list[str] = Field(description="names, in the order of the logits; none of an embedding")
    normalisation: Normalisation
    input_size: tuple[Count, Count] = Field(description="height and width of images, in pixels")
    crop: EvaluationCrop | None = Field(None, description="that makes them; absent where images had that size")
    dataset: str = Field(description="name in the manifest that it was trained on")
    evaluation: str = Field(description="split that it was evaluated on, or DATASET/SPLIT")
    recipe: str = Field(description="its name")
    recipe_sha256: Sha256 = Field(description="of the fields that make the student, wherever files lie")
    objective: str
    seed: Seed
    stores: list[Sha256] = Field([], description="digests of the stores that it learned from")
    version: str = Field(description="of offline-kd")

    @model_validator(mode="after")
    def _has_classes(self) -> Self:
        if (len(self.classes) < 2) != (self.kind == "embedding"):
            raise ValueError(f"a student of kind '{self.kind}' with {len(self.classes)} classes")
        return self


def describe_kd_layers(network: nn.Module) -> list[KDLayerInside]:
    """The KD layers inside a student, the outer of nested ones first: these are their names when it is built."""
    return [
        KDLayerInside(after=name, value_ratio=module.kd_layer.value_ratio)
        for name, module in network.named_modules()
        if isinstance(module, WithKDLayer)
    ]


def student_bytes(network: nn.Module, about: StudentFile, projections: Mapping[str, Projection] | None = None) -> bytes:
    """The content of a `.safetensors` file. The same weights and the same description are the same bytes.

    Args:
        projections: of the vectors that the network gives, by name; they lie beside it under PROJECTIONS.
    """
    beside = {f"{PROJECTIONS}{name}": one.embed for name, one in (projections or {}).items()}
    whole = [("", network), *((f"{name}.", one) for name, one in beside.items())]
    tensors = {
        begin + key: tensor.contiguous().cpu() for begin, one in whole for key, tensor in one.state_dict().items()
    }
    return safetensors.torch.save(tensors, metadata={ENTRY: about.model_dump_json(exclude_none=True)})


# ---- the student of a file -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedStudent:
    """A student that was trained, and what it takes. `load_student` makes one."""

    network: nn.Module  # in evaluation mode: normalised images [B, 3, H, W] float32 -> logits [B, C]
    about: StudentFile
    # Of a student without classes: to the space of features of its teacher, by the name that these have in the recipe.
    projections: Mapping[str, nn.Linear] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the logits."""
        return list(self.about.classes)

    def preprocess(self, image: Image.Image | Pixels) -> Tensor:
        """`[3, H, W]` float32 normalised input of the network, of an image of any size: a transform for `Dataset`s.

        Args:
            image: of Pillow, in any mode, or `[h, w, 3]` uint8.

        Raises DataError for another size than that of the training images, where these were not square.
        """
        return normalise(torch.from_numpy(self.pixels(image).copy())[None], self.about.normalisation)[0]

    def pixels(self, image: Image.Image | Pixels) -> Pixels:
        """The same before normalisation, `[3, H, W]` uint8: as images were cut when the student was evaluated.

        Where it was trained on images of one size, others are resized: the short side, and the middle is cut out.
        """
        rgb = upright_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        height, width = self.about.input_size
        crop = self.about.crop
        if crop is None and rgb.size != (width, height):
            if height != width:
                raise DataError(f"the image is {rgb.width}x{rgb.height}, the student takes {width}x{height}: resize it")
            crop = EvaluationCrop(size=height, resize=height)
        return asarray(rgb).transpose(2, 0, 1) if crop is None else evaluation_crop(asarray(rgb), crop)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """`[B, C]` float32 of `[B, 3, H, W]` uint8 images, on the device of the network.

        Raises DataError for a wrong size, ModelError for a student without classes.
        """
        if self.about.kind == "embedding":
            raise ModelError(
                f"the student of recipe '{self.about.recipe}' has no classes, and gives vectors: load_student(...)"
                ".vectors(images); `offline-kd evaluate` says how good these are."
            )
        return self._forward(images)

    @torch.inference_mode()
    def vectors(self, images: Tensor, features: str | None = None) -> Tensor:
        """`[B, D]` float32, what a student without classes gives for `[B, 3, H, W]` uint8 images, on its device.

        Args:
            features: of the teacher, a name in `projections`: then in the space of these; None: the student's own.

        Raises DataError for a wrong size, ModelError for a student with classes or without such a projection.
        """
        if self.about.kind != "embedding":
            raise ModelError(f"the student of recipe '{self.about.recipe}' has classes, and gives logits: .logits(...)")
        if features is not None and features not in self.projections:
            raise ModelError(
                f"the student of recipe '{self.about.recipe}' has no projection to features '{features}'."
                f"{did_you_mean(features, self.projections)}"
            )
        own = self._forward(images)
        if features is None:
            return own
        projected: Tensor = self.projections[features].to(own.device)(own)
        return projected

    def _forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != self.about.input_size:
            (height, width), (own_height, own_width) = images.shape[2:], self.about.input_size
            raise DataError(f"images are {width}x{height}, the student takes {own_width}x{own_height}. Name others.")
        return self.network(normalise(images, self.about.normalisation)).float()


def load_student(location: str | Path, *, network: nn.Module | str | None = None) -> TrainedStudent:
    """Build the student of a finished run or of one of its weight files, on the CPU and in evaluation mode.

    Args:
        location: a run directory, of which `student.safetensors` is taken, or a `.safetensors` file that a run wrote
            (`best.safetensors`, `student_ema.safetensors`, ...): a path or a URL.
        network: needed where the network is code of your own, which is not imported because a file names it: its name
            (`package.module:function`), which may then be imported, or the module itself, without KD layers, into which
            the weights are loaded.

    Raises ModelError where there is no such file, for one that does not say which network it is of, and for weights
    that do not fit; RecipeError for a description that cannot be understood.
    """
    file = _read(location)
    about = _description(file)
    student = _network(about, network, str(file))
    state = read_state_dict(file)
    projections = _projections(state.tensors, str(file))
    own = {name: one for name, one in state.tensors.items() if not name.startswith(PROJECTIONS)}
    state = replace(state, tensors=own)
    for layer in about.kd_layers:
        _put_kd_layer(student, layer, state.tensors, str(file))
    load_state(student, state)
    return TrainedStudent(student.eval(), about, projections)


def _projections(tensors: Mapping[str, Tensor], where: str) -> dict[str, nn.Linear]:
    """Of vectors, by name: pairs of a weight `[D_t, D_s]` and a bias `[D_t]`."""
    found: dict[str, nn.Linear] = {}
    for name in {name.removeprefix(PROJECTIONS).rpartition(".")[0] for name in tensors if name.startswith(PROJECTIONS)}:
        weight, bias = (tensors.get(f"{PROJECTIONS}{name}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None or weight.dim() != 2 or bias.shape != weight.shape[:1]:
            raise ModelError(f"{where}: the projection '{name}' is damaged. Name a file that a run wrote.")
        found[name] = nn.Linear(weight.shape[1], weight.shape[0])
        found[name].load_state_dict({"weight": weight, "bias": bias})
    return {name: one.requires_grad_(False) for name, one in sorted(found.items())}


def _read(location: str | Path) -> Fetched:
    folder, _, name = str(location).rpartition("/")
    if not name.endswith(".safetensors"):
        folder, name = str(location).rstrip("/"), "student.safetensors"
    where = f"{folder}/{name}" if folder else name
    try:
        if is_url(where):
            content = place_at(folder).read(name, MAX_BYTES)
        else:
            content = Path(where).read_bytes()
    except OSError as error:
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        why = "no such file" if absent else error.strerror or type(error).__name__
        raise ModelError(
            f"{shorten(where)}: {why}. Name a finished run directory, or a .safetensors file that a run wrote."
        ) from error
    return Fetched(where, content, hashlib.sha256(content).hexdigest())


def _description(file: Fetched) -> StudentFile:
    size = int.from_bytes(file.content[:8], "little")
    try:
        header = json.loads(file.content[8 : 8 + size])
        said = header.get("__metadata__", {}).get(ENTRY)
        content = None if said is None else json.loads(said)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{file}: not readable as safetensors. Name a file that a run wrote.") from error
    if content is None:
        raise ModelError(
            f"{file}: does not say which network it is of: an earlier version wrote it, or another program. Of a run, "
            "delete result.json and run the same command again: both are written anew from last.ckpt."
        )
    return parse(StudentFile, content, where=f"{file}: its header")


def _network(about: StudentFile, network: nn.Module | str | None, where: str) -> nn.Module:
    if isinstance(network, nn.Module):
        return network
    args = {name: value for name, value in about.model_args.items() if name not in OTHER_WEIGHTS}
    if network is None and about.model.partition(":")[0] not in OURS:
        raise ModelError(
            f"{where}: its network is code of your own, '{shorten(about.model, 100)}', which is not imported because a "
            f"file says so. Name it: --network {shorten(about.model, 100)}, or network=... of load_student."
        )
    if about.kind == "embedding":
        return build_without_head(network or about.model, args)[0]
    return build(network or about.model, len(about.classes), args)


def _put_kd_layer(student: nn.Module, layer: KDLayerInside, state: Mapping[str, Tensor], where: str) -> None:
    weight = state.get(f"{layer.after}.kd_layer.templates.weight")
    try:
        module = student.get_submodule(layer.after)
    except AttributeError:
        raise ModelError(f"{where}: has a KD layer behind '{layer.after}', which the network lacks.") from None
    if weight is None or weight.dim() != 2:
        raise ModelError(f"{where}: lacks the weights of the KD layer behind '{layer.after}'.")
    templates, channels = weight.shape
    kd_layer = KDLayer(channels, templates, value_ratio=layer.value_ratio)
    student.set_submodule(layer.after, WithKDLayer(module, kd_layer))
