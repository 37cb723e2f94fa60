"""decode(encode(z)) is within the bound that the codec states, for any logits, and stores of every codec work."""

import json
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import torch
from conftest import CPU, invoke, refused
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from offline_kd.cache.codec_choice import pack_arrays, pack_logits
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cli import bench_codecs
from offline_kd.cli.bench_entropy import ideal_bytes
from offline_kd.recipe import AutoCodec
from offline_kd.store.codecs import AnyCodec, klt, rans
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.codecs.klt import Klt
from offline_kd.store.codecs.klt_means import KltMeans
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.opening import open_store
from offline_kd.store.verification import verify
from offline_kd.support.errors import TeacherError
from offline_kd.support.places import Folder

CODECS = [
    Float32(),
    Float16(name="f16"),
    Int(name="int"),
    *(Int(name="int", bits=bits) for bits in range(3, 8)),
    Int(name="int", bits=4, exact_top=1),
    Int(name="int", bits=3, exact_top=8),
    Int(name="int", exact_top=5),
    TopK(name="topk", k=1),
    TopK(name="topk", k=8, tail_temperature=4),
]


def needed_classes(codec) -> int:
    """A codec that keeps m logits apart needs more classes than that."""
    return max(getattr(codec, "exact_top", 0), getattr(codec, "k", 0)) + 1


def round_trip(codec, logits):
    arrays = codec.encode(logits, {})
    declared = codec.arrays()
    assert set(arrays) == set(declared)
    for name, array in arrays.items():
        assert array.dtype == np.dtype(declared[name].dtype)
        axis = declared[name].axis
        assert array.shape == (*logits.shape[:-1], *([axis[1] or logits.shape[-1]] if axis else []))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return codec.decode(tensors, logits.shape[-1], {}).numpy()


@given(
    st.integers(0, 2**31),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
    st.sampled_from([2, 10, 100, 1000]),
    st.sampled_from(CODECS),
)
def test_errors_stay_within_the_stated_bound(seed, scale, offset, classes, codec):
    rng = np.random.default_rng(seed)
    classes = max(classes, needed_classes(codec))
    logits = (offset + scale * rng.standard_normal((3, 2, classes))).astype(np.float32)
    decoded = round_trip(codec, logits)
    assert decoded.dtype == np.float32
    assert (np.abs(decoded - logits) <= codec.error_bound(logits)).all()


@given(st.integers(0, 2**31))
def test_int_keeps_the_extremes_the_order_and_never_uses_the_empty_mark(seed):
    logits = np.random.default_rng(seed).standard_normal((5, 100)).astype(np.float32) * 8
    codes = Int(name="int").encode(logits, {})["codes"]
    assert codes.max() == 254
    assert codes.min() == 0
    decoded = round_trip(Int(name="int"), logits)
    np.testing.assert_allclose(decoded.max(-1), logits.max(-1), rtol=3e-6)
    np.testing.assert_allclose(decoded.min(-1), logits.min(-1), rtol=3e-6)
    order = logits.argsort(-1)
    assert (np.diff(np.take_along_axis(decoded, order, -1), axis=-1) >= 0).all()


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e-30, 12345.0])
def test_constant_rows_survive(codec, value):
    logits = np.full((2, 10), value, dtype=np.float32)
    assert (np.abs(round_trip(codec, logits) - logits) <= codec.error_bound(logits).max()).all()


def test_f32_is_exact_and_f16_refuses_what_does_not_fit():
    logits = np.array([[1e30, -1e30, 3.0]], dtype=np.float32)
    assert np.array_equal(round_trip(Float32(), logits), logits)
    with pytest.raises(TeacherError, match="does not fit f16"):
        Float16(name="f16").encode(logits, {})


@given(st.integers(0, 2**31), st.sampled_from([1, 4, 16]), st.sampled_from([3, 5, 8]))
def test_the_largest_logits_that_are_kept_apart_have_the_error_of_f16(seed, top, bits):
    logits = np.random.default_rng(seed).standard_normal((6, 50)).astype(np.float32) * 5
    decoded = round_trip(Int(name="int", bits=bits, exact_top=top), logits)
    ids = np.argsort(-logits, axis=-1)[:, :top]
    kept, true = (np.take_along_axis(part, ids, axis=-1) for part in (decoded, logits))
    np.testing.assert_allclose(kept, true, rtol=2**-11)
    plain, short = (Int(name="int", bits=bits, exact_top=count).encode(logits, {})["step"] for count in (0, top))
    assert (short < plain).all()  # the others lie on a shorter line


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
def test_topk_has_the_teachers_mass_outside_the_top_at_its_temperature(seed, t):
    logits = np.random.default_rng(seed).standard_normal((6, 300)).astype(np.float32) * 4
    decoded = round_trip(TopK(name="topk", k=10, tail_temperature=t), logits)
    ids = torch.from_numpy(np.argsort(-logits, axis=-1)[:, :10].copy())
    true, kept = (torch.from_numpy(part).double().div(t).softmax(-1).gather(1, ids) for part in (logits, decoded))
    torch.testing.assert_close(kept, true, rtol=2e-2, atol=1e-4)


def test_topk_holds_tens_of_thousands_of_classes_in_few_bytes():
    logits = np.random.default_rng(0).standard_normal((4, 21_841)).astype(np.float32)
    arrays = TopK(name="topk", k=64).encode(logits, {})
    assert sum(array.nbytes for array in arrays.values()) == 4 * (64 * 4 + 12)
    assert arrays["top_id"].max() < 21_841
    with pytest.raises(TeacherError, match="cannot be kept apart"):
        TopK(name="topk").encode(np.zeros((1, 2**16), dtype=np.float32), {})
    with pytest.raises(TeacherError, match="keeps 16 of 10 classes"):
        TopK(name="topk").encode(np.zeros((1, 10), dtype=np.float32), {})


# ---- transform coding ------------------------------------------------------------------------------------------------


def made_up_logits(rows: int, classes: int, seed: int = 0) -> np.ndarray:
    """Logits as teachers give them: most of their variance along a few axes, and one class far above the others."""
    about = np.random.default_rng(classes)
    directions = about.standard_normal((classes, classes)) * (np.arange(1, classes + 1) ** -0.7)[:, None]
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, classes)) @ directions * 0.3
    logits[np.arange(rows), rng.integers(0, classes, rows)] += 6
    return logits.astype(np.float32)


KLT = Klt(name="klt", step=0.8, refine=16)


@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([3, 20, 100]))
def test_the_entropy_coder_gives_back_every_number(seed, rows, classes):
    tables = KLT.fit(made_up_logits(200, classes))
    rng = np.random.default_rng(seed)
    reach = [(table > 0).sum(axis=1) // 2 for table in (tables["frequency"], tables["refine_frequency"])]
    # Also numbers that are hardly ever written: each has a code.
    values = np.concatenate([rng.integers(-most, most + 1, (rows, len(most))) for most in reach], axis=1)
    values = values.astype(np.int16)
    coder = rans.Coder.of(np.concatenate([tables["frequency"], tables["refine_frequency"]]))
    codes, too_long = coder.encode(values, 4096)
    assert not len(too_long)
    decoded = coder.decode(codes)
    assert decoded.dtype == values.dtype
    assert np.array_equal(decoded, values)
    one = rng.integers(rows)
    assert np.array_equal(coder.decode(codes[one : one + 1]), values[one : one + 1])


GOLDEN = np.load(Path(__file__).parent / "fixtures" / "codecs.npz", allow_pickle=False)
SETTINGS = json.loads(str(GOLDEN["settings"]))


def golden(prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN.files if name.startswith(prefix)}


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[str(one) for one in SETTINGS])
def test_what_a_store_holds_of_the_same_logits_does_not_change(number):
    codec = TypeAdapter(AnyCodec).validate_python(SETTINGS[number])
    tables, logits = golden(f"{number}/tables/"), GOLDEN["logits"]
    stored = codec.encode(logits, tables)
    assert list(stored) == list(golden(f"{number}/stored/"))
    for name, array in golden(f"{number}/stored/").items():
        assert stored[name].dtype == array.dtype
        assert stored[name].tobytes() == array.tobytes(), name
    decoded = codec.decode_stored(stored, tables, logits.shape[-1]).numpy()
    np.testing.assert_array_equal(decoded, GOLDEN[f"{number}/decoded"])


def test_the_entropy_coders_bits_do_not_change():
    coder = rans.Coder.of(np.concatenate([GOLDEN["7/tables/frequency"], GOLDEN["7/tables/refine_frequency"]]))
    codes, too_long = coder.encode(GOLDEN["rans/values"], GOLDEN["rans/codes"].shape[1])
    np.testing.assert_array_equal(codes, GOLDEN["rans/codes"])
    np.testing.assert_array_equal(too_long, GOLDEN["rans/too_long"])
    fits = np.setdiff1d(np.arange(len(codes)), too_long)
    np.testing.assert_array_equal(coder.decode(codes)[fits], GOLDEN["rans/values"][fits])
    np.testing.assert_array_equal(coder.decode(GOLDEN["rans/garbage"]), GOLDEN["rans/garbage_values"])
    np.testing.assert_array_equal(rans.frequencies(GOLDEN["rans/counted"], 1023), GOLDEN["rans/frequencies"])


def test_frequencies_sum_to_the_total_and_leave_no_hole():
    tables = KLT.fit(made_up_logits(500, 50))
    for table in (tables["frequency"], tables["refine_frequency"]):
        assert (table.astype(int).sum(axis=1) == rans.TOTAL).all()
        middle = table.shape[1] // 2
        for row in table:
            used = np.flatnonzero(row)
            assert used[0] == 2 * middle - used[-1]
            assert len(used) == used[-1] - used[0] + 1


def test_sums_are_exact_in_float32_in_any_order():
    """Which classes are refined must be the same on every machine."""
    logits = made_up_logits(300, 400)
    tables = Klt(name="klt", step=0.05).fit(logits)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((20, 400))
    q *= klt.MOST_NORM / np.linalg.norm(q, axis=1, keepdims=True)  # the worst there can be
    q = torch.from_numpy(np.trunc(q).astype(np.int16))
    axes, mean = (torch.from_numpy(tables[name].astype(np.float32)) for name in ("axes", "mean"))
    whole = klt.whole_logits(q, axes, mean)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole.double(), q.double() @ axes.double() + mean.double())
    assert torch.equal(whole, klt.whole_logits(q[:, order], axes[order], mean))
    ties = torch.tensor([[3.0, 5.0, 5.0, 1.0, 5.0]])
    assert klt.ranked(ties, 4).tolist() == [[1, 2, 4, 0]]


def total_variation(logits: np.ndarray, decoded: torch.Tensor) -> float:
    return (torch.from_numpy(logits).softmax(-1) - decoded.softmax(-1)).abs().sum(-1).mean().item() / 2


def coded(codec, logits: np.ndarray, tables) -> tuple[torch.Tensor, float]:
    """Decoded logits, and bytes per row as stored."""
    arrays = codec.encode(logits, tables)
    size = sum(len(content) for _, content in pack_logits(codec, logits, tables).values())
    return codec.decode_stored(arrays, tables, logits.shape[-1]), size / (logits.size / logits.shape[-1])


@pytest.mark.parametrize("codec", [*CODECS, Klt(name="klt", step=0.5)], ids=str)
def test_a_batch_of_no_rows_is_decoded_to_no_logits(codec):
    """What a rank gets of a last batch that is smaller than the number of ranks."""
    logits = made_up_logits(50, 10)
    tables = codec.fit(logits)
    unpacked = codec.unpack(codec.encode(logits, tables), tables)
    none = {name: torch.from_numpy(array[:0]) for name, array in unpacked.items()}
    on_torch = {name: torch.from_numpy(array) for name, array in tables.items()}
    assert codec.decode(none, 10, on_torch).shape == (0, 10)


def test_klt_takes_fewer_bytes_than_integers_of_the_same_error():
    learn, logits = made_up_logits(4000, 300), made_up_logits(400, 300, seed=1).reshape(200, 2, 300)
    codec = Klt(name="klt", step=0.5)
    short, short_bytes = coded(codec, logits, codec.fit(learn))
    assert short.shape == logits.shape
    int4, int4_bytes = coded(Int(name="int", bits=4), logits, {})
    assert total_variation(logits, short) < total_variation(logits, int4)
    assert short_bytes < 0.8 * int4_bytes
    steps = [coded(Klt(name="klt", step=step), logits, Klt(name="klt", step=step).fit(learn)) for step in (0.4, 1, 2)]
    assert [size for _, size in steps] == sorted((size for _, size in steps), reverse=True)
    errors = [total_variation(logits, decoded) for decoded, _ in steps]
    assert errors == sorted(errors)


def test_klt_survives_rows_like_none_that_it_learned_from():
    tables = KLT.fit(made_up_logits(400, 60))
    strange = np.stack([np.zeros(60), np.full(60, 1e4), np.linspace(-300, 300, 60)]).astype(np.float32)
    decoded, _ = coded(KLT, strange, tables)
    assert decoded.isfinite().all()
    assert (decoded[0].abs() < 2).all()
    garbage = np.random.default_rng(0).integers(0, 256, (50, KLT.row_bytes)).astype(np.uint8)
    assert KLT.decode_stored({"code": garbage}, tables, 60).isfinite().all()


def test_a_row_that_is_too_long_loses_its_finest_axes():
    codec = Klt(name="klt", step=0.1, refine=4, row_bytes=64)
    tables = codec.fit(made_up_logits(400, 100))
    logits = made_up_logits(20, 100, seed=3)
    decoded, _ = coded(codec, logits, tables)
    assert codec.encode(logits, tables)["code"].shape == (20, 64)
    whole, size = coded(Klt(name="klt", step=0.1, refine=4), logits, tables)
    assert size > 64  # so some were too long
    errors = [(one - torch.from_numpy(logits)).pow(2).mean().item() for one in (whole, decoded)]
    assert errors[0] < errors[1] < 0.5 * logits.var()


def test_klt_of_tens_of_thousands_of_classes_keeps_fewer_axes_than_classes():
    codec = Klt(name="klt", step=1, axes=32, refine=8)
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((64, 16)) @ rng.standard_normal((16, 21_841))).astype(np.float32)
    tables = codec.fit(logits)
    assert tables["axes"].shape == (32, 21_841)
    decoded, size = coded(codec, logits, tables)
    assert (decoded - torch.from_numpy(logits)).abs().mean() < 0.05 * np.abs(logits).mean()
    assert size < 200
    with pytest.raises(TeacherError, match="16 rows at least, there are 3"):
        codec.fit(logits[:3])


def test_students_learn_from_klt_and_the_codec_is_verified(recipe, recipe_file, manifest, roots, where, tmp_path):
    codec = Klt(name="klt", step=0.5, refine=4)
    captured(recipe, manifest, roots, tmp_path / "store", codec)
    command = ("distill", recipe_file, "--store", tmp_path / "store", "--set", "data.tars=[2]", *where)
    for objective in ("kd", "wttm", "dtkd"):
        result = invoke(*command, "--objective", objective, "--out", tmp_path / objective)
        assert result.exit_code == 0, result.output
    page = tmp_path / "page.html"
    shown = invoke("store", "inspect", tmp_path / "store", "--key", "1440", "--out", page, *where)
    assert shown.exit_code == 0, shown.output


def captured(recipe, manifest, roots, path, codec):
    """One tar of digits with that codec."""
    changed = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"tars": [2]}),
            "capture": recipe.capture.model_copy(update={"codec": codec}),
        }
    )
    return cache_teacher(changed, manifest, roots, path, CPU)


@pytest.mark.parametrize(
    "codec",
    [
        Int(name="int", bits=3),
        Int(name="int", bits=5, exact_top=2),
        TopK(name="topk", k=3),
        TopK(name="topk", k=9),
        Klt(name="klt", step=1.0, refine=4),
    ],
    ids=str,
)
def test_stores_of_every_codec_are_finished_and_proven(codec, recipe, manifest, roots, tmp_path):
    finished = captured(recipe, manifest, roots, tmp_path / "store", codec)
    fidelity = finished.fidelity[""]
    assert fidelity.max_error <= fidelity.max_error_allowed
    assert fidelity.top1_agreement > 0.9
    assert verify(Folder(tmp_path / "store")).faults == []
    store = open_store(tmp_path / "store")
    assert store.identity.codec == codec


def test_objectives_that_a_codec_cannot_serve_are_refused_unless_allowed(
    recipe, recipe_file, manifest, roots, where, tmp_path
):
    captured(recipe, manifest, roots, tmp_path / "store", TopK(name="topk", k=3, tail_temperature=4))
    command = ("distill", recipe_file, "--store", tmp_path / "store", "--set", "data.tars=[2]", *where)
    assert invoke(*command, "--objective", "kd", "--out", tmp_path / "kd").exit_code == 0  # at T = 4
    for objective in ("wttm", "dtkd"):
        message = refused(*command, "--objective", objective, "--out", tmp_path / objective)
        assert f"does not serve term '{objective}', which it cannot have of the largest logits alone" in message
    at_t1 = ("--set", "objectives.kd.1.temperature=1")
    message = refused(*command, "--objective", "kd", "--out", tmp_path / "cold", *at_t1)
    assert "does not serve term 'kd', at T = 1; its tail is right at T = 4" in message
    allowed = ("--objective", "wttm", "--allow-biased", "--out", tmp_path / "biased")
    assert invoke(*command, *allowed).exit_code == 0
    assert json.loads(invoke("store", "info", tmp_path / "store", "--json").stdout)["serves"] == ["kd", "ttm"]


def test_wttm_and_dtkd_ask_what_the_store_measured(recipe, recipe_file, manifest, roots, where, tmp_path):
    finished = captured(recipe, manifest, roots, tmp_path / "store", Int(name="int", bits=3))
    measured = finished.fidelity[""]
    assert measured.wttm_weight_error > 0
    assert measured.dtkd_temperature_error < 1e-3  # the largest logit is kept
    command = ("distill", recipe_file, "--store", tmp_path / "store", "--set", "data.tars=[2]", *where)
    result = invoke(*command, "--objective", "wttm", "--out", tmp_path / "wttm")
    assert (result.exit_code == 1) == (measured.wttm_weight_error > 0.05)
    assert invoke(*command, "--objective", "dtkd", "--out", tmp_path / "dtkd").exit_code == 0


def test_auto_takes_the_smallest_codec_within_the_budget_and_keeps_it(recipe, manifest, roots, tmp_path, capsys):
    path, sizes = tmp_path / "store", []
    for budget, expected in ((0.1, Int), (0.01, Int), (1e-3, Float16), (1e-9, Float32)):
        where = tmp_path / f"{budget}"
        finished = captured(recipe, manifest, roots, where, AutoCodec(name="auto", error_budget=budget))
        codec = open_store(where).identity.codec
        assert isinstance(codec, expected)
        # Measured on other rows than those that decided.
        assert max(finished.fidelity[""].total_variation.values()) <= 1.5 * budget + 1e-6
        sizes.append(sum(size for name, size in finished.bytes_by_array.items() if name.startswith("logits/")))
    assert sizes == sorted(sizes)
    assert "codec auto: nothing but f32" in capsys.readouterr().err
    # What was chosen stays, whatever a later run would choose.
    captured(recipe, manifest, roots, path, Int(name="int", bits=6))
    captured(recipe, manifest, roots, path, AutoCodec(name="auto", error_budget=1e-9))
    assert open_store(path).identity.codec == Int(name="int", bits=6)


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
