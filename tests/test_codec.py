"""decode(encode(z)) is within the bound that the codec states, for any logits, and stores of every codec work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, invoke, refused
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from offline_kd.cache.codec_choice import pack_logits
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.recipe import AutoCodec
from offline_kd.store.codecs import AnyCodec, klt, rans
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.codecs.klt import Klt
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
