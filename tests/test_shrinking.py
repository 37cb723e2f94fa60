"""Pictures of many more pixels than networks see: made smaller once, when they are packed."""

import numpy as np
from conftest import invoke, refused
from pictures import encoded, photograph
from PIL import ExifTags, Image

from offline_kd.data.decoding import decode_image
from offline_kd.data.manifest import EvaluationCrop
from offline_kd.data.tars import read_tar
from offline_kd.first_plan import Start, side_for
from offline_kd.first_recipe import OF_IMAGENET
from offline_kd.models.networks import Input


def test_larger_pictures_are_packed_smaller_upright_and_others_byte_for_byte(tmp_path):
    """Of a JPEG that is decoded at 1/4, one that lies on its side, a PNG with transparency, and two small enough."""
    wide, small = photograph(0, 300, 500), photograph(1, 40, 90)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    clear = photograph(2, 200, 100)
    clear.putalpha(Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (200, 1))))
    pictures = {
        "a/wide.jpg": encoded(wide, quality=95),
        "a/turned.jpg": encoded(wide, exif=turned),
        "b/clear.png": encoded(clear, "PNG"),
        "b/small.jpg": encoded(small),
        "b/small.webp": encoded(small, "WEBP"),
    }
    for name, content in pictures.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    pack = ("data", "pack", "imagefolder", "--source", tmp_path / "photos", "--side", 40, "--out")
    said = invoke(*pack, tmp_path / "one").stderr
    assert "3 pictures of 5 with more than 40 pixels on the shorter side will be packed with 40" in said
    packed = {sample.key: sample for sample in read_tar(tmp_path / "one/train-000000.tar")[0]}
    sizes = {key: decode_image(sample.encoded).size for key, sample in packed.items() if "small" not in key}
    assert sizes == {"a/wide": (67, 40), "a/turned": (40, 67), "b/clear": (40, 80)}
    for key in sizes:
        name = next(name for name in pictures if name.startswith(key))
        whole = decode_image(pictures[name]).resize(sizes[key], Image.Resampling.BOX)
        apart = np.abs(np.asarray(whole, dtype=float) - np.asarray(decode_image(packed[key].encoded), dtype=float))
        assert apart.mean() < 6, key
        assert packed[key].extension == "jpg"
    unchanged = [sample.encoded for key, sample in packed.items() if "small" in key]
    assert sorted(unchanged) == sorted([pictures["b/small.jpg"], pictures["b/small.webp"]])
    invoke(*pack, tmp_path / "two")
    assert (tmp_path / "one/train-000000.tar").read_bytes() == (tmp_path / "two/train-000000.tar").read_bytes()
    assert "--side: for imagefolder only" in refused("data", "pack", "digits", "--side", 40, "--out", tmp_path / "d")


def test_a_side_leaves_a_view_of_a_quarter_more_pixels_than_the_teacher_sees():
    for seen, side in ((224, 512), (384, 768)):
        start = Start("any", None, False, True, "", Input(OF_IMAGENET, EvaluationCrop(size=seen, resize=seen)))
        assert side_for(start) == side
    assert side_for(Start("any", None, False, True, "", None)) == 512
