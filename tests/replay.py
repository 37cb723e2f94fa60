"""Do views render to the same pixels with other versions of torch, torchvision and Pillow?

    python tests/replay.py                 makes two environments (needs a package registry) and prints, for every
                                           operation, the largest difference from this one's pixels
    python tests/replay.py IMAGES OUT.npz  renders the images of a folder in this environment; what the above runs

With OFFLINE_KD_DATA, the images are photographs of imagenet_sample; otherwise they are made up.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

VERSIONS = [
    ["torch==2.9.*", "torchvision==0.24.*", "pillow==10.4.*"],
    ["torch==2.11.*", "torchvision==0.26.*", "pillow==11.3.*"],
]
NEEDS = ["numpy", "scipy", "pydantic", "pyyaml", "google-crc32c", "webdataset"]
NUM_IMAGES = 40
MAGNITUDES = {"posterize": 4, "solarize": 128, "hue": 0.2, "rotate": 20, "blur": 1.5}


def render_all(folder: Path, out: Path) -> None:
    from offline_kd.data.decoding import decode_image
    from offline_kd.data.manifest import EvaluationCrop
    from offline_kd.views.operations import OPERATIONS, apply_op
    from offline_kd.views.render import evaluation_crop, render_view

    found: dict[str, list[np.ndarray]] = {}
    for file in sorted(folder.iterdir()):
        image = decode_image(file.read_bytes())
        pixels = np.array(image)
        box = np.array([image.height // 5, image.width // 7, image.height // 2, image.width // 2], dtype=np.int16)
        found.setdefault(f"decode {file.suffix[1:]}", []).append(pixels.ravel())
        # The rest starts from pixels that are the same everywhere.
        lossless = file if file.suffix == ".png" else None
        if lossless is None:
            continue
        for interpolation in ("bilinear", "bicubic"):
            view = {"box": box, "flip": 0}
            crop = EvaluationCrop(size=224, resize=256, interpolation=interpolation)
            for name, rendered in (
                (f"crop {interpolation}", render_view(pixels, view, 224, interpolation)),
                (f"evaluation {interpolation}", evaluation_crop(pixels, crop)),
            ):
                found.setdefault(name, []).append(rendered.ravel())
        square = image.resize((128, 128), 0)
        for op in OPERATIONS:
            done = apply_op(square, op, MAGNITUDES.get(op, 0.3))
            found.setdefault(op, []).append(np.asarray(done).ravel())
    np.savez(out, **{name: np.concatenate(parts) for name, parts in found.items()})


def write_images(folder: Path) -> None:
    """The same photographs as JPEG, as WebP and as PNG."""
    from offline_kd.data.decoding import decode_image
    from offline_kd.data.manifest import data_roots

    contents: list[bytes] = []
    for root in data_roots():
        tars = sorted(root.glob("imagenet_sample/*.tar.gz"))
        if tars:
            with tarfile.open(tars[0]) as tar:
                members = [member for member in tar if member.name.endswith(".jpg")][:: 1000 // NUM_IMAGES]
                contents = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    if not contents:
        from pictures import encoded, photograph

        contents = [encoded(photograph(seed, 240 + seed, 300)) for seed in range(NUM_IMAGES)]
    for index, content in enumerate(contents):
        (folder / f"{index:03d}.jpg").write_bytes(content)
        image = decode_image(content)
        image.save(folder / f"{index:03d}.png", compress_level=1)
        image.save(folder / f"{index:03d}.webp", quality=80)


def environment(folder: Path, packages: list[str]) -> Path:
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--python", python]
    subprocess.run([*install, *packages, *NEEDS], check=True)
    # The package asks for its own version, and not for other versions of the others.
    subprocess.run([*install, "--no-deps", "--editable", Path(__file__).parent.parent], check=True)
    return python


def compare() -> dict[str, dict[str, tuple[int, float]]]:
    """By versions and operation: the largest difference of a pixel, and the share of pixels that differ."""
    found: dict[str, dict[str, tuple[int, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        write_images(folder / "images")
        render_all(folder / "images", folder / "here.npz")
        here = np.load(folder / "here.npz")
        for index, packages in enumerate(VERSIONS):
            python = environment(folder / f"env{index}", packages)
            out = folder / f"{index}.npz"
            paths = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": os.environ["PATH"]}
            subprocess.run([python, __file__, folder / "images", out], check=True, env=paths)
            there, by_op = np.load(out), {}
            for op in here.files:
                difference = np.abs(here[op].astype(int) - there[op].astype(int))
                by_op[op] = (int(difference.max()), float((difference > 0).mean()))
            found[", ".join(packages)] = by_op
    return found


if __name__ == "__main__":
    if len(sys.argv) == 3:
        render_all(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        import PIL
        import torchvision

        print(f"here: torchvision {torchvision.__version__}, pillow {PIL.__version__}")
        for versions, by_op in compare().items():
            print(versions)
            for op, (largest, share) in by_op.items():
                print(f"  {op:20} largest difference {largest:3d}, {share:.3%} of the values differ")
