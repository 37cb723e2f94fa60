"""`teacher.classes`: which of a teacher's classes are those of the dataset, where it has others or more.

    teacher:
      weights: ResNet50_Weights.IMAGENET1K_V2
      classes: {cat: [tabby, Persian cat, 282], dog: 207}      or a YAML file that says the same

The logit of a class that is several of the teacher's is log(sum(exp(z))) over them: at T = 1 softmax of the selected
logits is then the teacher's probability of each class of ours, given that it is one of them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from offline_kd.data.manifest import Manifest
from offline_kd.models.checkpoints import WeightsFile
from offline_kd.models.weights import PRETRAINED, import_timm, torchvision_entry, weights_name
from offline_kd.support.errors import RecipeError, did_you_mean, shorten


def select(logits: Tensor, classes: Sequence[Sequence[int]]) -> Tensor:
    """`[B, len(classes)]` logits of these classes, of `[B, C]`; those that are one class each are the same numbers."""
    most = max(len(one) for one in classes)
    index = torch.tensor([[*one, *[one[0]] * (most - len(one))] for one in classes], device=logits.device)
    if most == 1:
        return logits[:, index[:, 0]]
    is_one = torch.tensor([[at < len(one) for at in range(most)] for one in classes], device=logits.device)
    return logits[:, index].masked_fill(~is_one, -torch.inf).logsumexp(dim=-1)


def indices_of(
    wanted: Mapping[str, Sequence[int | str]], classes: Sequence[str], names: Sequence[Sequence[str]]
) -> list[list[int]]:
    """For every class of the dataset, in its order, the indices of the teacher's classes that it is.

    Args:
        names: what the teacher's classes are called, in the order of its logits; several lists, where they have
            several names.

    Raises RecipeError for a class that is missing or unknown, and for one of the teacher's that stands twice.
    """
    for name in wanted:
        if name not in classes:
            raise RecipeError(
                f"teacher.classes: '{shorten(name, 80)}' is no class of the dataset.{_near(name, classes)}"
            )
    missing = [name for name in classes if name not in wanted]
    if missing:
        raise RecipeError(
            f"teacher.classes: names {len(wanted)} of the dataset's {len(classes)} classes, '{missing[0]}' is missing. "
            "Every class needs at least one of the teacher's."
        )
    found: dict[int, str] = {}
    for name in classes:
        for one in wanted[name]:
            index = _index_of(one, name, names)
            if index in found:
                raise RecipeError(
                    f"teacher.classes: '{found[index]}' and '{name}' both have class {index} of the teacher. Each of "
                    "its classes may stand once."
                )
            found[index] = name
    return [[index for index, owner in found.items() if owner == name] for name in classes]


def _index_of(one: int | str, name: str, names: Sequence[Sequence[str]]) -> int:
    if isinstance(one, int):
        return one
    found = {index for known in names for index, called in enumerate(known) if called == one}
    if len(found) == 1:
        return found.pop()
    if not names:
        raise RecipeError(
            f"teacher.classes: '{name}' is '{shorten(one, 80)}', but what this teacher's classes are called is not "
            "known. Write the index of its logit, from 0."
        )
    if found:
        raise RecipeError(
            f"teacher.classes: '{name}' is '{one}', which {sorted(found)} are called. Write the index of one."
        )
    known = [called for some in names for called in some]
    raise RecipeError(
        f"teacher.classes: '{name}' is '{shorten(one, 80)}', which none of the teacher's is called.{_near(one, known)}"
    )


def _near(name: str, known: Sequence[str]) -> str:
    """The nearest name, but not a list of a thousand."""
    return shorten(did_you_mean(name, known), 200)


def refuse_beyond(classes: Sequence[Sequence[int]], names: Sequence[str], count: int) -> None:
    """Raise RecipeError for an index that a teacher of so many classes does not have."""
    for name, indices in zip(names, classes, strict=True):
        if max(indices) >= count:
            raise RecipeError(
                f"teacher.classes: '{name}' is class {max(indices):,} of the teacher, which has {count:,} (0 to "
                f"{count - 1:,})."
            )


def names_of_classes(model: str | None, weights: str | WeightsFile, manifest: Manifest) -> list[Sequence[str]]:
    """What the classes of a teacher are called, as far as it is known; several lists, where they have several names.

    Those of a teacher of the manifest are called as those of the dataset that its accuracy is known on; torchvision
    tells those of its weights, timm those of its pretrained networks that know ImageNet.
    """
    name = weights_name(weights, model)
    known = manifest.teachers.get(name)
    if known and known.expected and known.expected.dataset in manifest.datasets:
        return [manifest.datasets[known.expected.dataset].classes]
    if "_Weights." in name:
        return [torchvision_entry(name).meta.get("categories", [])]
    if name != PRETRAINED or model is None:
        return []
    timm = import_timm()
    config = timm.get_pretrained_cfg(model.partition(":")[2])
    subset = timm.data.infer_imagenet_subset({"num_classes": config.num_classes}) if config else None
    if subset is None:
        return []
    info = timm.data.ImageNetInfo(subset)
    return [info.label_names(), [described.split(",")[0] for described in info.label_descriptions()]]
