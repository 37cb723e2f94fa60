"""`bench codecs`: what every codec makes of a store's logits, and what an ideal coder would; the store-format page."""

import json

import numcodecs
import numpy as np
import pytest
import torch
from conftest import invoke, refused
from test_codec import captured

from offline_kd.cache.codec_choice import pack_arrays
from offline_kd.cli import bench_codecs
from offline_kd.cli.bench_entropy import ideal_bytes
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.codecs.klt import Klt
from offline_kd.store.codecs.klt_means import KltMeans


def test_bench_codecs_compares_them_on_a_stores_logits(store_path, recipe, manifest, roots, tmp_path):
    found = json.loads(invoke("bench", "codecs", store_path, "--rows", "5000", "--json").stdout)
    by_name = {one["codec"]: one for one in found}
    assert {"f16", "int 8", "int 3", "int 8 + top 8", "topk 5"} <= set(by_name)
    widths = [by_name[f"int {bits}"] for bits in (8, 6, 4, 3)]
    sizes = [one["bytes_per_row"] for one in widths]
    errors = [one["distortion"]["total_variation"]["1"] for one in widths]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert by_name["f16"]["distortion"]["total_variation"]["1"] < 1e-3
    assert all(one["change"]["kd"] < 0.5 for one in found)
    assert all(one["bytes_per_row"] == pytest.approx(sum(one["stored"].values())) for one in found)
    assert all(one[f"{part}_rows_per_second"] > 0 for one in found for part in ("encode", "unpack", "decode"))
    plot = tmp_path / "codecs.svg"
    assert "TV1" in invoke("bench", "codecs", store_path, "--rows", "2000", "--out", plot).stdout
    assert plot.read_text().startswith("<?xml")
    assert "views of an image, 99 were asked for" in refused("bench", "codecs", store_path, "--views", "99")
    captured(recipe, manifest, roots, tmp_path / "store", Int(name="int"))
    assert "were kept whole" in refused("bench", "codecs", tmp_path / "store")


def test_bench_codecs_says_what_means_views_and_refinement_take_and_what_an_ideal_coder_would(store_path):
    settings = "{name: klt_means, step: 2, refine: 4}", "{name: klt, step: 2, refine: 4}", "{name: f16}"
    codecs = [word for setting in settings for word in ("--codec", setting)]
    means, alone, plain = json.loads(invoke("bench", "codecs", store_path, "--json", *codecs).stdout)
    assert set(means["stored"]) == {"means", "codes"}
    assert set(means["ideal"]) == {"means", "views", "refinement"}
    assert set(alone["ideal"]) == {"views", "refinement"}
    assert plain["ideal"] == {}
    assert plain["table_bytes"] == 0
    for one in (means, alone):
        # A state behind every code, and whole bytes: more than an ideal coder, and less than 8 bytes more.
        assert 0 < sum(one["ideal"].values()) < one["bytes_per_row"] < sum(one["ideal"].values()) + 8
        assert one["table_bytes"] > 0
    # Two views of an image tell less of each other than four, and a mean is shared by fewer.
    (of_two,) = json.loads(invoke("bench", "codecs", store_path, "--json", "--views", "2", *codecs[:2]).stdout)
    assert of_two["ideal"]["means"] > means["ideal"]["means"]


def test_bench_codecs_learns_from_other_images_of_every_class_where_tars_are_sorted_by_class():
    labels = torch.arange(5).repeat_interleave(20)
    logits = np.arange(100, dtype=np.float32)[:, None, None].repeat(2, axis=1)
    block = bench_codecs.Block([logits, logits[:, :1]], labels)
    measured = block.take(bench_codecs._is_measured(block))
    assert measured.labels.bincount().tolist() == [4] * 5
    learned = bench_codecs._learned_from([block])
    assert learned.shape == (80, 2, 1)  # a shorter last group is not learned from
    assert not set(learned.flatten()) & set(measured.groups[0].flatten())


def test_what_an_ideal_coder_takes_is_what_frequencies_say():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(60, 1, 12)) + 0.5 * rng.normal(size=(60, 4, 12))).astype(np.float32) * 4
    for codec in (KltMeans(name="klt_means", step=1, refine=4), Klt(name="klt", step=1, refine=4)):
        tables = codec.fit(logits)
        arrays = codec.encode(logits, tables)
        # Codes of klt end with the last byte that is not 0, those of klt_means say how many bytes they have.
        ragged = [about.ragged for about in codec.arrays().values()]
        ends = [array.shape[-1] - (array != 0)[..., ::-1].argmax(axis=-1) for array in arrays.values()]
        lengths = [array[..., 0] + 256 * array[..., 1].astype(int) for array in arrays.values()]
        lengths = [length if one else end for one, end, length in zip(ragged, ends, lengths, strict=True)]
        written, codes = sum(length.sum() for length in lengths), sum(length.size for length in lengths)
        ideal = sum(ideal_bytes(codec, arrays, tables).values())
        assert ideal < written < ideal + 4 * codes


def test_klt_means_is_read_by_the_formulas_of_the_store_format_page():
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(40, 1, 20)) + 0.5 * rng.normal(size=(40, 3, 20))).astype(np.float32) * 3
    codec = KltMeans(name="klt_means", step=1.2, finer=3, refine=9)
    tables = codec.fit(logits)
    arrays = codec.encode(logits, tables)
    expected = codec.decode_stored(arrays, tables, 20)
    for image, view in ((0, 0), (7, 2), (39, 1)):
        mean, code = stored_code(codec, arrays, "means", image), stored_code(codec, arrays, "codes", 3 * image + view)
        found = read_as_the_page_says(codec, tables, mean, code)
        np.testing.assert_allclose(found, expected[image, view], atol=1e-5)


def stored_code(codec, arrays, name, row):
    """The bytes of one code, from the object that the array becomes and `docs/store-format.md`."""
    chunk = np.frombuffer(numcodecs.Zstd().decode(pack_arrays(codec, arrays)[name][1][:-4]), dtype=np.uint8).astype(int)
    rows = arrays[name].size // arrays[name].shape[-1]
    length = chunk[:rows] + 256 * chunk[rows : 2 * rows]
    assert not chunk[2 * rows + length.sum() :].any()
    return chunk[2 * rows + length[:row].sum() :][: length[row]].tolist()


def read_as_the_page_says(codec, tables, mean, code):
    """`[C]` logits of one view, from `docs/store-format.md` and nothing else."""

    def symbols(content):
        state, rest = int.from_bytes(bytes(content[:3]), "big"), content[3:]
        row = yield
        while True:
            frequency, slot = tables[row[0]][row[1]].astype(int), state % 4096
            starts = np.cumsum(frequency) - frequency
            i = next(i for i, start in enumerate(starts) if start <= slot < start + frequency[i])
            state = frequency[i] * (state // 4096) + slot - starts[i]
            while state < 65536 and rest:
                state = state * 256 + rest.pop(0)
            row = yield i - (len(frequency) - 1) // 2

    def on_axes(coded, name):
        used = np.flatnonzero(tables[name][:, 511] != 4096)
        values = [coded.send((name, axis)) for axis in reversed(range(used[-1] + 1))]
        return np.array(values[::-1] + [0] * (len(tables["axes"]) - len(values)))

    of_mean, of_view = symbols(mean), symbols(code)
    next(of_mean), next(of_view)
    p, q = on_axes(of_mean, "mean_frequency"), on_axes(of_view, "view_frequency")
    level, m = of_view.send(("level_frequency", 0)), codec.refine
    d = [of_view.send(("refine_frequency", level * m + r)) for r in reversed(range(round(m ** (level / 7))))][::-1]
    u = codec.step / codec.finer
    whole = tables["mean"] + (codec.finer * q + p) @ tables["axes"].astype(int)
    classes = np.argsort(-whole, kind="stable")[:m]
    below = whole[classes[0]] - whole[classes]
    eighth, width = max(1, round(256 / u)), max(1, round(codec.refine_spread * 0.22314355131420976 / u * 2048))
    total = sum(round(65536 * 1.1331484530668263 ** -min(one // eighth, 99)) for one in below)
    lift = sum(round(65536 * 1.1331484530668263 ** (j + 0.5)) < total for j in range(45))
    steps = [codec.refine_step]
    while steps[-1] * 1.25 <= codec.refine_coarsest:
        steps.append(steps[-1] * 1.25)
    found = whole * u / 2048
    for r, number in enumerate(d):
        found[classes[r]] += number * steps[min((below[r] + eighth * lift) // width, len(steps) - 1)]
    return found
