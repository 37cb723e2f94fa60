"""Views of one image predict each other: what is stored is exact, whoever captures which view group when, and damaged
bytes are nonsense and nothing worse.
"""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec import GOLDEN, golden, made_up_logits

from offline_kd.store.codecs import row_coder
from offline_kd.store.codecs.klt import MOST_NORM, whole_logits
from offline_kd.store.codecs.klt_means import KltMeans
from offline_kd.store.codecs.likeliest import likeliest, likeliest_by_torch
from offline_kd.store.codecs.rans import TOTAL
from offline_kd.store.codecs.whole import FEW, refined, refined_by_torch, whole_of_views
from offline_kd.support.errors import TeacherError

CODEC = KltMeans(name="klt_means", step=0.8, refine=8)
GOLDEN_CODEC = KltMeans(**json.loads(str(GOLDEN["settings"]))[9])
GOLDEN_TABLES = golden("9/tables/")


def views_of_images(images: int, views: int, classes: int, seed: int = 0) -> np.ndarray:
    """`[n, v, C]` logits of which most is common to the views of an image."""
    own = made_up_logits(images * views, classes, seed + 1).reshape(images, views, classes)
    return made_up_logits(images, classes, seed)[:, None] + 0.4 * own


def length_of(codes: np.ndarray) -> np.ndarray:
    """`[...]` bytes of codes `[..., b]`."""
    return codes[..., 0] + 256 * codes[..., 1].astype(int)


# ---- the entropy coder -----------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data(), st.integers(0, 9), st.integers(1, 30), st.integers(1, 6), st.booleans())
def test_the_compiled_coder_gives_back_every_number(data, rows, places, most, has_levels):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))

    def frequencies(count: int, symmetric: bool = True) -> np.ndarray:
        found = np.zeros((count, 2 * most + 1), dtype=np.uint16)
        for row in found:
            reach = rng.integers(0, most + 1)
            used = slice(most - reach, most + reach + 1) if symmetric else slice(most, None)
            row[used] = 1
            row[used] += rng.multinomial(TOTAL - row.sum(), rng.dirichlet(np.full(row[used].size, 0.3))).astype("u2")
        return found

    def numbers(frequency: np.ndarray) -> np.ndarray:
        reach = (frequency > 0).sum(axis=1) // 2
        return rng.integers(-reach, reach + 1, (rows, len(frequency))).astype(np.int16)

    of_places = frequencies(places)
    values, tables, more, expected = numbers(of_places), row_coder.tables_of(of_places), None, np.zeros((rows, 0))
    if has_levels:
        counts = np.sort(rng.integers(0, 5, most + 1))
        counts[-1] = 4
        of_numbers = frequencies(4 * len(counts))
        level = rng.integers(0, most + 1, rows).astype(np.int16)
        expected = numbers(of_numbers).reshape(rows, len(counts), 4)[np.arange(rows), level]
        expected = np.where(np.arange(4) < counts[level][:, None], expected, 0)
        of_level = row_coder.tables_of(frequencies(1, symmetric=False))
        more = level, expected, of_level, row_coder.tables_of(of_numbers), counts
    codes, too_long = row_coder.encode(values, tables, 100, more)
    assert not len(too_long)
    for some in (slice(None), slice(1), slice(rows // 2, None)):  # four at a time, and one by one
        found, behind = row_coder.decode(codes[some], tables, more and more[2:])
        np.testing.assert_array_equal(found, values[some])
        np.testing.assert_array_equal(behind, expected[some])
    length = length_of(codes)
    assert not codes[:, 2:][np.arange(98) >= length[:, None]].any()
    longest = int(length.max(initial=0))
    np.testing.assert_array_equal(row_coder.decode(codes[:, : longest + 2], tables, more and more[2:])[0], values)
    # Nothing behind a code is looked at, and a code that is too long is not written.
    strange = codes.copy()
    strange[:, 2:][np.arange(98) >= length[:, None]] = rng.integers(256)
    np.testing.assert_array_equal(row_coder.decode(strange, tables, more and more[2:])[1], expected)
    if longest:
        short, too_long = row_coder.encode(values, tables, longest + 1, more)
        np.testing.assert_array_equal(too_long, np.flatnonzero(length == longest))
        np.testing.assert_array_equal(short[length < longest], codes[length < longest, : longest + 1])
        assert not short[too_long].any()


def test_the_bits_of_rows_do_not_change():
    coders = row_coder.coders_of(GOLDEN_TABLES)
    known = golden("rows/")
    more = coders.level, coders.refined, known["counts"]
    codes, too_long = row_coder.encode(known["values"], coders.views, 40, (known["level"], known["numbers"], *more))
    np.testing.assert_array_equal(codes, known["codes"])
    np.testing.assert_array_equal(too_long, known["too_long"])
    values, numbers = row_coder.decode(known["codes"], coders.views, more)
    np.testing.assert_array_equal(values, known["values"])
    np.testing.assert_array_equal(numbers, known["numbers"])
    values, numbers = row_coder.decode(known["garbage"], coders.views, more)
    np.testing.assert_array_equal(values, known["garbage_values"])
    np.testing.assert_array_equal(numbers, known["garbage_numbers"])


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 4), st.integers(2, 80), st.integers(2, 80))
def test_damaged_bytes_are_numbers_of_the_right_shape(seed, images, views, width, mean_width):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (images, views, width)).astype(np.uint8)
    means = rng.choice([0, 255, rng.integers(256)], (images, mean_width)).astype(np.uint8)
    codes[..., :2] = rng.choice([0, 1, width, 255], (images, views, 2))  # lengths, true and impossible ones
    logits = GOLDEN_CODEC.decode_stored({"means": means, "codes": codes}, GOLDEN_TABLES, 20)
    assert logits.shape == (images, views, 20)
    assert logits.isfinite().all()


@pytest.mark.slow
def test_damaged_bytes_read_and_write_nothing_out_of_bounds(tmp_path):
    """As compiled with a check of every index, which the code that is used does without."""
    program = (
        "import numpy as np, test_klt_means as t\n"
        "from dataclasses import replace\n"
        "from offline_kd.store.codecs import row_coder\n"
        "rng = np.random.default_rng(0)\n"
        "for width in (2, 3, 5, 64):\n"
        "    codes, means = (rng.integers(0, 256, (*size, width)).astype('u1') for size in ((301, 3), (301,)))\n"
        "    for length in (0, width - 2, 255):\n"
        "        codes[..., :2], means[..., :2] = length, (length, 0)\n"
        "        arrays = {'means': means, 'codes': codes}\n"
        "        assert t.GOLDEN_CODEC.decode_stored(arrays, t.GOLDEN_TABLES, 20).isfinite().all()\n"
        "t.GOLDEN_CODEC.encode(t.GOLDEN['logits'], t.GOLDEN_TABLES)\n"
        "tables = row_coder.coders_of(t.GOLDEN_TABLES).views\n"
        "wrong = replace(tables, base=tables.base + len(tables.sums))\n"
        "for use in (row_coder.decode, lambda *given: row_coder.encode(np.zeros((1, 9), 'i2'), given[1], 64)):\n"
        "    try:\n"
        "        use(codes[0], wrong)\n"
        "    except IndexError:\n"
        "        print('seen')\n"
    )
    # In a folder of its own: numba would take what it has kept, which was compiled without the check.
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout.split() == [b"seen", b"seen"]  # tables that point anywhere: the check of indices is there


def digest_of_codes() -> str:
    """Of what is stored of made-up logits by given tables, and of what it is decoded to."""
    rng = np.random.default_rng(5)
    logits = (rng.integers(-900, 900, (300, 3, 20)) * rng.integers(1, 9, (300, 1, 1)) / 256).astype(np.float32)
    arrays = GOLDEN_CODEC.encode(logits, GOLDEN_TABLES)
    later = GOLDEN_CODEC.encode(logits[:, ::-1] + np.float32(0.3), GOLDEN_TABLES, arrays)
    digest = hashlib.sha256()
    for one in (arrays, later):
        digest.update(one["means"].tobytes() + one["codes"].tobytes())
        digest.update(GOLDEN_CODEC.decode_stored(one, GOLDEN_TABLES, 20).numpy().tobytes())
    return f"{torch.backends.cpu.get_cpu_capability()} {digest.hexdigest()}"


@pytest.mark.slow
def test_codes_and_logits_are_the_same_with_any_instruction_set():
    """What this machine has at best, what older ones have, and what every one has."""
    command = [sys.executable, "-c", "from test_klt_means import digest_of_codes as made; print(made())"]
    found = [digest_of_codes()]
    for capability, mkl, numpy_lacks in (
        ("avx2", "AVX2", "X86_V4 AVX512_ICL AVX512_SPR"),
        ("default", "SSE4_2", "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"),
    ):
        older = {"ATEN_CPU_CAPABILITY": capability, "MKL_ENABLE_INSTRUCTIONS": mkl, "NUMBA_CPU_NAME": "generic"}
        older |= {"NPY_DISABLE_CPU_FEATURES": numpy_lacks, "MKL_CBWR": "COMPATIBLE"}
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **older}, stdout=subprocess.PIPE, check=True)
        found.append(done.stdout.decode().strip())
    capabilities, digests = zip(*(line.split() for line in found), strict=True)
    assert "DEFAULT" in capabilities
    assert len(set(digests)) == 1, found


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 70), st.sampled_from([1, 3, 40, 2000, 2**22, 2**40]), st.integers(1, 70))
def test_compiled_loops_choose_the_classes_and_steps_that_torch_does(seed, classes, spread, count):
    """Also among equal ones, and in sums of damaged numbers."""
    rng = np.random.default_rng(seed)
    whole = torch.from_numpy(np.rint(spread * rng.standard_normal((7, classes))).astype(np.float32))
    steps = tuple(0.1 * 1.25**index for index in range(rng.integers(1, 12)))
    setting = min(count, classes), int(rng.integers(1, 300)), int(rng.integers(1, 900)), steps
    found, expected = likeliest(whole, *setting), likeliest_by_torch(whole, *setting)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 4), st.integers(1, 5), st.integers(1, 40), st.sampled_from([0, 0.1, 0.9]))
def test_what_views_differ_by_is_added_up_to_what_the_product_of_matrices_is(seed, images, views, axes_used, share):
    """Of views that differ in nothing, in few numbers and in most."""
    rng = np.random.default_rng(seed)
    own = rng.integers(-300, 300, (images, views, axes_used)) * (rng.random((images, views, axes_used)) < share)
    numbers = torch.from_numpy((rng.integers(-900, 900, (images, 1, axes_used)) + own).astype(np.int16))
    classes = int(rng.integers(1, 70))
    axes = torch.from_numpy(rng.integers(-300, 300, (axes_used, classes)).astype(np.float32))
    mean = torch.from_numpy(rng.integers(-9999, 9999, classes).astype(np.float32))
    whole = whole_of_views(numbers, axes, mean)
    assert whole.dtype == torch.float32
    assert torch.equal(whole.double(), numbers.double() @ axes.double() + mean.double())
    rows = whole_of_views(numbers.flatten(0, 1), axes, mean)
    assert torch.equal(rows, whole.flatten(0, 1))
    count = int(rng.integers(1, classes + 1))
    likely, sizes, _ = likeliest(rows, count, 200, 300, (0.1, 0.125, 0.3))
    differences = torch.from_numpy(rng.integers(-500, 500, likely.shape).astype(np.int16))
    by_torch = refined_by_torch(rows.clone(), 0.0123, likely, differences, sizes)
    assert torch.equal(refined(rows, 0.0123, likely, differences, sizes), by_torch)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_views_of_an_image_take_fewer_bytes_together_than_alone():
    learn, logits = views_of_images(300, 4, 80), views_of_images(100, 4, 80, seed=7)
    tables = CODEC.fit(learn)
    arrays = CODEC.encode(logits, tables)
    decoded = CODEC.decode_stored(arrays, tables, 80).numpy()
    alone_tables = CODEC.fit(learn.reshape(-1, 1, 80))
    alone = CODEC.encode(logits.reshape(-1, 1, 80), alone_tables)
    alone_decoded = CODEC.decode_stored(alone, alone_tables, 80).numpy().reshape(logits.shape)
    errors = [np.square(one - logits).mean() for one in (decoded, alone_decoded)]
    assert errors[0] < 1.05 * errors[1]
    assert length_of(arrays["codes"]).sum() + length_of(arrays["means"]).sum() < 0.95 * length_of(alone["codes"]).sum()


def test_a_view_is_decoded_to_the_same_logits_whichever_views_are_beside_it():
    """In training a batch has one view of each of many images; as `bench codecs` reads, all views of each."""
    for step in (0.05, 3.0):  # views differ in most numbers, and in few
        codec = CODEC.model_copy(update={"step": step})
        learn, logits = views_of_images(300, 4, 80), views_of_images(40, 4, 80, seed=7)
        tables = codec.fit(learn)
        unpacked = codec.unpack(codec.encode(logits, tables), tables)
        together = {name: torch.from_numpy(array) for name, array in unpacked.items()}
        few = (together["t"][:, 1:] != together["t"][:, :1]).float().mean() < FEW
        assert few == (step == 3.0)
        axes = codec.decoding_tables(tables)
        expected = codec.decode(together, 80, axes)
        for view in range(4):
            alone = {name: array[:, view] for name, array in together.items()}
            assert torch.equal(codec.decode(alone, 80, axes), expected[:, view])


def test_one_view_of_an_image_predicts_nothing_and_costs_next_to_nothing():
    logits = views_of_images(400, 1, 60)
    tables = CODEC.fit(logits)
    assert not tables["share"].any()
    arrays = CODEC.encode(logits, tables)
    means, _ = row_coder.decode(arrays["means"], row_coder.coders_of(tables).means)
    assert not means.any()
    assert not arrays["means"].any()  # codes of no bytes
    unpacked = CODEC.unpack(arrays, tables)
    assert not (unpacked["t"] % CODEC.finer).any()  # nothing but whole steps of the views


@pytest.mark.parametrize("value", [0.0, -3.5, 1e4])
def test_constant_and_huge_logits_stay_finite_and_sums_exact(value):
    tables = CODEC.fit(views_of_images(200, 3, 60))
    rng = np.random.default_rng(1)
    spread = 1e4 * rng.standard_normal((2, 3, 60))
    logits = np.concatenate([np.full((2, 3, 60), value), spread, np.sign(spread) * 1e30]).astype(np.float32)
    unpacked = CODEC.unpack(CODEC.encode(logits, tables), tables)
    t = torch.from_numpy(unpacked["t"]).flatten(0, 1)
    assert t.double().norm(dim=1).max() <= MOST_NORM
    axes, mean = (torch.from_numpy(tables[name].astype(np.float32)) for name in ("axes", "mean"))
    whole = whole_logits(t, axes[: t.shape[1]], mean)
    assert whole.abs().max() < 2**24
    assert torch.equal(whole.double(), t.double() @ axes[: t.shape[1]].double() + mean.double())
    assert CODEC.decode_stored(CODEC.encode(logits, tables), tables, 60).isfinite().all()
    constant = np.full((30, 2, 60), value, dtype=np.float32)
    of_constants = CODEC.fit(constant)
    assert CODEC.decode_stored(CODEC.encode(constant, of_constants), of_constants, 60).isfinite().all()


def test_a_code_that_is_too_long_loses_its_finest_axes_and_is_refused_without_any():
    roomy = KltMeans(name="klt_means", step=0.1, refine=2)
    logits = views_of_images(200, 3, 100)
    tables = roomy.fit(logits)
    longest = {name: int(length_of(one).max()) + 2 for name, one in roomy.encode(logits, tables).items()}
    errors = []
    for name, setting in (("codes", "row_bytes"), ("means", "mean_bytes")):
        short = roomy.model_copy(update={setting: longest[name] - 1})
        arrays = short.encode(logits, tables)
        assert arrays[name].shape[-1] == longest[name] - 1
        errors += [np.square(short.decode_stored(arrays, tables, 100).numpy() - logits).mean()]
        tiny = roomy.model_copy(update={setting: 20})
        with pytest.raises(TeacherError, match=rf"more than its 20 bytes of {setting} .*{setting}=80"):
            tiny.encode(logits, tables)
    whole = np.square(roomy.decode_stored(roomy.encode(logits, tables), tables, 100).numpy() - logits).mean()
    assert whole < min(errors)
    assert max(errors) < 0.5 * logits.var()


@pytest.mark.parametrize("codec", [CODEC, CODEC.model_copy(update={"refine_coarsest": 10.0})], ids=str)
def test_rows_of_other_views_are_not_taken_for_those_of_the_teacher(codec):
    logits = views_of_images(200, 3, 60)
    tables = codec.fit(logits)
    unpacked = codec.unpack(codec.encode(logits, tables), tables)
    rows = {name: torch.from_numpy(array).flatten(0, 1) for name, array in unpacked.items()}
    again = torch.from_numpy(logits).flatten(0, 1)
    z = codec.decode(rows, 60, {name: torch.from_numpy(one.astype("f4")) for name, one in tables.items()})

    def beyond(teacher: torch.Tensor) -> torch.Tensor:
        found = codec.compare(z, teacher, rows, tables, "float32")
        return (found.differences > found.allowed).any(dim=1)

    assert not beyond(again).any()
    assert beyond(again.roll(1, dims=0)).float().mean() > 0.99
    assert beyond(again + 0.1 * again.sign()).float().mean() > 0.9
