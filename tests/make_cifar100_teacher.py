"""EfficientNet-Lite0 with the linear head for CIFAR-100, as one file of weights.

OFFLINE_KD_DATA=FOLDER python tests/make_cifar100_teacher.py runs/cifar100_filtered/teacher.safetensors

The two files it is made of are those that data_manifest.yaml names; OFFLINE_KD_DATA says where they lie.
"""

import sys
from pathlib import Path

import safetensors.torch

from offline_kd.data.manifest import data_roots, load_manifest, locate_weights

HEAD, BODY = "cifar100_linear_head_on_lite0_128px", "imagenet_efficientnet_lite0"


def main(out: Path) -> None:
    manifest = load_manifest(Path(__file__).parent.parent / "data_manifest.yaml")
    body, head = (
        safetensors.torch.load_file(locate_weights(weights, data_roots()))
        for weights in (manifest.weights(BODY), manifest.weights(HEAD))
        if weights is not None
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    merged = body | {"classifier.weight": head["weight"], "classifier.bias": head["bias"]}
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in merged.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
