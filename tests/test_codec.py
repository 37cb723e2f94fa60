"""decode(encode(z)) is within the bound that the codec states, for any logits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_kd.errors import TeacherError
from offline_kd.store.codec import Float16, Float32, Int, codec_arrays, decode, encode, error_bound

CODECS = [Float32(), Float16(name="f16"), Int(name="int")]


def round_trip(codec, logits):
    arrays = encode(codec, logits)
    declared = codec_arrays(codec)
    assert set(arrays) == set(declared)
    for name, array in arrays.items():
        assert array.dtype == np.dtype(declared[name].dtype)
        assert array.shape == (logits.shape if declared[name].has_classes else logits.shape[:-1])
    return decode(codec, {name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()


@given(
    st.integers(0, 2**31),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
    st.sampled_from([2, 10, 100, 1000]),
    st.sampled_from(CODECS),
)
def test_errors_stay_within_the_stated_bound(seed, scale, offset, classes, codec):
    rng = np.random.default_rng(seed)
    logits = (offset + scale * rng.standard_normal((3, 2, classes))).astype(np.float32)
    decoded = round_trip(codec, logits)
    assert decoded.dtype == np.float32
    assert (np.abs(decoded - logits).max(axis=-1) <= error_bound(codec, logits)).all()


@given(st.integers(0, 2**31))
def test_int_keeps_the_extremes_the_order_and_never_uses_the_empty_mark(seed):
    logits = np.random.default_rng(seed).standard_normal((5, 100)).astype(np.float32) * 8
    codes = encode(Int(name="int"), logits)["codes"]
    assert codes.max() == 254
    assert codes.min() == 0
    decoded = round_trip(Int(name="int"), logits)
    np.testing.assert_allclose(decoded.max(-1), logits.max(-1), rtol=3e-6)
    np.testing.assert_allclose(decoded.min(-1), logits.min(-1), rtol=3e-6)
    order = logits.argsort(-1)
    assert (np.diff(np.take_along_axis(decoded, order, -1), axis=-1) >= 0).all()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e-30, 12345.0])
def test_constant_rows_survive(codec, value):
    logits = np.full((2, 10), value, dtype=np.float32)
    assert (np.abs(round_trip(codec, logits) - logits) <= error_bound(codec, logits).max()).all()


def test_f32_is_exact_and_f16_refuses_what_does_not_fit():
    logits = np.array([[1e30, -1e30, 3.0]], dtype=np.float32)
    assert np.array_equal(round_trip(Float32(), logits), logits)
    with pytest.raises(TeacherError, match="does not fit f16"):
        encode(Float16(name="f16"), logits)
