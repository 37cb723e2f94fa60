"""Views of one image predict each other: what is stored is exact, whoever captures which view group when, and damaged
bytes are nonsense and nothing worse.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, invoke, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import command_line, make_samples, photographs, views_of
from tampering import rewrite
from test_codec import GOLDEN, golden, made_up_logits
from test_images import with_bad_ones

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.models.networks import build
from offline_kd.store.codecs import klt_means, row_coder
from offline_kd.store.codecs.klt import MOST_NORM, whole_logits
from offline_kd.store.codecs.klt_means import KltMeans
from offline_kd.store.codecs.rans import TOTAL
from offline_kd.store.lookup import logits_of
from offline_kd.store.opening import open_store
from offline_kd.store.verification import verify
from offline_kd.support.errors import StoreCorrupt, StoreMismatch, TeacherError
from offline_kd.support.places import Folder

CODEC = KltMeans(name="klt_means", step=0.8, refine=8)
GOLDEN_CODEC = KltMeans(**json.loads(str(GOLDEN["settings"]))[9])
GOLDEN_TABLES = golden("9/tables/")


def views_of_images(images: int, views: int, classes: int, seed: int = 0) -> np.ndarray:
    """`[n, v, C]` logits of which most is common to the views of an image."""
    own = made_up_logits(images * views, classes, seed + 1).reshape(images, views, classes)
    return made_up_logits(images, classes, seed)[:, None] + 0.4 * own


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
    used = int(codes.any(axis=0).nonzero()[0].max(initial=2)) + 1
    np.testing.assert_array_equal(row_coder.decode(codes[:, :used], tables, more and more[2:])[0], values)
    short, too_long = row_coder.encode(values, tables, used - 1, more)
    np.testing.assert_array_equal(short, codes[:, : used - 1])
    assert rows == 0 or set(np.flatnonzero(codes[:, used - 1])) <= set(too_long)


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
@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 4), st.integers(1, 80), st.integers(1, 80))
def test_damaged_bytes_are_numbers_of_the_right_shape(seed, images, views, width, mean_width):
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 256, (images, views, width)).astype(np.uint8)
    mean = rng.choice([0, 255, rng.integers(256)], (images, mean_width)).astype(np.uint8)
    logits = GOLDEN_CODEC.decode_stored({"mean": mean, "code": code}, GOLDEN_TABLES, 20)
    assert logits.shape == (images, views, 20)
    assert logits.isfinite().all()


@pytest.mark.slow
def test_damaged_bytes_read_and_write_nothing_out_of_bounds():
    """As compiled with a check of every index, which the code that is used does without."""
    program = (
        "import numpy as np, test_klt_means as t\n"
        "rng = np.random.default_rng(0)\n"
        "for width in (1, 2, 3, 5, 64):\n"
        "    code, mean = (rng.integers(0, 256, (*size, width)).astype('u1') for size in ((301, 3), (301,)))\n"
        "    assert t.GOLDEN_CODEC.decode_stored({'mean': mean, 'code': code}, t.GOLDEN_TABLES, 20).isfinite().all()\n"
        "t.GOLDEN_CODEC.encode(t.GOLDEN['logits'], t.GOLDEN_TABLES)\n"
    )
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": "/dev/null/none"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def digest_of_codes() -> str:
    """Of what is stored of made-up logits by given tables, and of what it is decoded to."""
    rng = np.random.default_rng(5)
    logits = (rng.integers(-900, 900, (300, 3, 20)) * rng.integers(1, 9, (300, 1, 1)) / 256).astype(np.float32)
    arrays = GOLDEN_CODEC.encode(logits, GOLDEN_TABLES)
    later = GOLDEN_CODEC.encode(logits[:, ::-1] + np.float32(0.3), GOLDEN_TABLES, arrays)
    digest = hashlib.sha256()
    for one in (arrays, later):
        digest.update(one["mean"].tobytes() + one["code"].tobytes())
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
    assert np.count_nonzero(arrays["code"]) + np.count_nonzero(arrays["mean"]) < 0.95 * np.count_nonzero(alone["code"])


def test_one_view_of_an_image_predicts_nothing_and_costs_next_to_nothing():
    logits = views_of_images(400, 1, 60)
    tables = CODEC.fit(logits)
    assert not tables["share"].any()
    arrays = CODEC.encode(logits, tables)
    means, _ = row_coder.decode(arrays["mean"], row_coder.coders_of(tables).means)
    assert not means.any()
    assert (arrays["mean"][:, 3:] == 0).all()  # three bytes of state, the same for every image
    assert (arrays["mean"] == arrays["mean"][0]).all()
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
    short = KltMeans(name="klt_means", step=0.1, refine=2, row_bytes=64, mean_bytes=64)
    roomy = short.model_copy(update={"row_bytes": 1024, "mean_bytes": 2048})
    logits = 2 * views_of_images(200, 3, 100)
    tables = short.fit(logits)
    whole = roomy.encode(logits, tables)
    assert np.count_nonzero(whole["code"], axis=-1).max() > 64
    errors = [
        np.square(codec.decode_stored(codec.encode(logits, tables), tables, 100).numpy() - logits).mean()
        for codec in (roomy, short)
    ]
    assert errors[0] < errors[1] < 0.5 * logits.var()
    fine = KltMeans(name="klt_means", step=0.1, refine=100, refine_step=1e-4, row_bytes=64)
    with pytest.raises(TeacherError, match=r"more than its 64 bytes of row_bytes .* --set capture.codec.row_bytes=256"):
        fine.encode(logits, fine.fit(logits))


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


# ---- stores ----------------------------------------------------------------------------------------------------------

CLASSES = [f"class {index}" for index in range(20)]
MEANS = {"name": "klt_means", "step": 0.4, "refine": 8, "fit_rows": 64}


def recipe_of(folder: Path, samples=None, count: int = 6, codec=MEANS, **changes: object):
    """Six views of 90 photographs, in groups of two; mixed with each other."""
    capture = {"codec": codec, "views_per_group": 2}
    views = views_of(count=count)
    return photographs(folder, samples or make_samples(), CLASSES, views=views, capture=capture, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with the photographs, the store of them that was captured at once, and one in f32."""
    folder = tmp_path_factory.mktemp("means")
    for name, codec in (("store", MEANS), ("f32", {"name": "f32"})):
        recipe, manifest = recipe_of(folder, codec=codec)
        cache_teacher(recipe, manifest, [folder], folder / name, CPU)
    return folder


def all_logits(path: Path, targets: str = "", views=range(6)) -> torch.Tensor:
    store = open_store(path, targets=targets)
    return logits_of(store, np.sort(store.row_index[1]), list(views))


def files_of(path: Path, pattern: str) -> dict[str, tuple[bytes, int]]:
    found = [file for file in sorted((path / "targets.zarr").rglob(pattern)) if file.is_file()]
    return {str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns) for file in found}


def test_every_group_is_close_to_the_teacher_and_means_lie_once_per_block(whole):
    store = open_store(whole / "store")
    assert len(files_of(whole / "store", "logits/mean/c/*/*")) == 3
    assert len(files_of(whole / "store", "logits/code/c/*/*/*")) == 9
    assert verify(Folder(whole / "store")).faults == []
    z, z_t = all_logits(whole / "store"), all_logits(whole / "f32")
    errors = (z - z_t).square().mean(dim=(0, 2)).view(3, 2).mean(dim=1).sqrt()
    assert errors.max() < 1.2 * errors.min()
    assert errors.max() < 0.5 * z_t.std()
    fidelity = store.manifest.fidelity[""]
    assert fidelity.mean_error <= fidelity.max_error < 4 * MEANS["step"]
    assert (z.roll(1, dims=0) - z_t).square().mean().sqrt() > 2 * errors.max()  # what a shifted row would be


def test_views_added_later_by_another_process_are_those_captured_at_once(whole, tmp_path):
    path = tmp_path / "store"
    few, manifest = recipe_of(whole, count=2)
    cache_teacher(few, manifest, [whole], path, CPU)
    means = files_of(path, "logits/mean/c/*/*")
    file, where = command_line(tmp_path, recipe_of(whole)[0], manifest)
    command = [sys.executable, "-m", "offline_kd", "cache-teacher", str(file), "--store", str(path)]
    where[where.index("--data-root") + 1] = str(whole)
    done = subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(path, "logits/mean/c/*/*") == means  # and when they were written
    assert open_store(path).digest == open_store(whole / "store").digest
    assert torch.equal(all_logits(path), all_logits(whole / "store"))


def test_a_capture_that_was_killed_between_groups_and_two_writers_make_the_same_store(whole, tmp_path):
    path = tmp_path / "store"
    file, where = command_line(tmp_path, *recipe_of(whole))
    where[where.index("--data-root") + 1] = str(whole)
    command = ("cache-teacher", file, "--store", path, *where)
    assert invoke(*command, "--worker", "0/2").exit_code == 0
    # The first group of one block and the last of another stay; a third block is open.
    for entry in ("000000-00002-00004", "000000-00004-00006", "000002-00000-00002", "000002-00002-00004"):
        (path / f"ledger/{entry}.json").unlink()
        block, group = int(entry[:6]), int(entry[7:12]) // 2
        (path / f"targets.zarr/logits/code/c/{block}/{group}/0").unlink()
    assert invoke(*command, "--worker", "1/2").exit_code == 0
    assert invoke(*command).exit_code == 0
    assert open_store(path).digest == open_store(whole / "store").digest
    assert verify(Folder(path)).faults == []


@pytest.mark.parametrize(
    ("damaged", "redone"), [("logits/code/c/1/0/0", 1), ("logits/mean/c/1/0", 3)], ids=["code", "mean"]
)
def test_repair_does_again_what_hangs_on_the_damaged_object(whole, tmp_path, damaged, redone):
    path = tmp_path / "store"
    subprocess.run(["cp", "-r", whole / "store", path], check=True)
    before = files_of(path, "logits/*/c/**/*")
    content = bytearray((path / "targets.zarr" / damaged).read_bytes())
    content[len(content) // 2] ^= 4
    (path / "targets.zarr" / damaged).write_bytes(content)
    file, where = command_line(tmp_path, *recipe_of(whole))
    where[where.index("--data-root") + 1] = str(whole)
    result = invoke("store", "repair", path, file, *where)
    assert result.exit_code == 0, result.output
    assert f"doing {redone} blocks again" in result.stderr
    after = files_of(path, "logits/*/c/**/*")
    assert {name: one[0] for name, one in after.items()} == {name: one[0] for name, one in before.items()}
    assert {name for name in after if after[name] != before[name]} == {f"targets.zarr/{damaged}"}
    assert verify(Folder(path)).faults == []


def test_a_part_of_a_store_gives_batches_and_lookups_of_the_same_logits(whole, tmp_path):
    part = tmp_path / "part"
    pulled = invoke("store", "pull", whole / "store", part, "--blocks", "0:2", "--views", "0:4")
    assert pulled.exit_code == 0, pulled.output
    assert verify(Folder(part)).faults == []
    expected = all_logits(whole / "store", views=range(4))[:80]
    assert torch.equal(all_logits(part, views=range(4)), expected)
    recipe, manifest = recipe_of(whole, count=4, data={"tars": [0, 1]})
    images, store = training_images(recipe, manifest, [whole]), open_store(part)
    hashes = np.concatenate([images[0].key_hash, images[1].key_hash])
    stream = make_loader(recipe, source_of(recipe, images, [store], recipe.objectives["kd"]), 0, CPU)
    tables = {name: torch.from_numpy(one.astype("f4")) for name, one in store.codec_tables.items()}
    shown = 0
    for batch in stream.epoch(0):
        z = store.identity.codec.decode(batch.signal[0].logits, 20, tables)
        rows = [int(np.flatnonzero(hashes == one)[0]) for one in batch.key_hash]
        matches = (z[:, None] == expected[rows]).all(dim=2)  # one of the four views of that image
        assert matches.any(dim=1).all()
        shown += len(rows)
    assert shown == 80


def test_another_teacher_is_added_with_means_of_its_own(whole, tmp_path):
    torch.manual_seed(9)
    torch.save(build("cifar:resnet8", 20).state_dict(), tmp_path / "other.pt")
    recipe, manifest = recipe_of(whole)
    teacher = recipe.teacher.model_copy(update={"weights": str(tmp_path / "other.pt")})
    other, path = recipe.model_copy(update={"name": "other", "teacher": teacher}), tmp_path / "store"
    subprocess.run(["cp", "-r", whole / "f32", path], check=True)
    cache_teacher(other, manifest, [whole], path, CPU, add=True)
    at_once = all_logits(path, "other")
    # Two groups of a block again, by what the third has kept.
    for views in ("00000-00002", "00002-00004"):
        (path / f"ledger/000001-{views}.other.json").unlink()
    (path / "targets.zarr/teachers/other/logits/code/c/1/0/0").unlink()
    (path / "manifest.json").unlink()
    cache_teacher(other, manifest, [whole], path, CPU, add=True)
    assert torch.equal(all_logits(path, "other"), at_once)
    assert torch.equal(all_logits(path), all_logits(whole / "f32"))
    assert verify(Folder(path)).faults == []


# ---- rows and means --------------------------------------------------------------------------------------------------


def test_bad_images_shift_no_mean_against_its_rows_whenever_a_group_is_captured(tmp_path):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    changes = {"data": {"bad_images": "skip"}}
    for path, counts in ((whole, [6]), (grown, [2, 6])):
        for count in counts:
            recipe, manifest = recipe_of(tmp_path, with_bad_ones(), count, **changes)
            cache_teacher(recipe, manifest, [tmp_path], path, CPU)
    exact, manifest = recipe_of(tmp_path, with_bad_ones(), codec={"name": "f32"}, **changes)
    cache_teacher(exact, manifest, [tmp_path], tmp_path / "f32", CPU)
    z, z_t = all_logits(grown), all_logits(tmp_path / "f32")
    assert len(z) == 87
    assert torch.equal(z, all_logits(whole))
    for turn in (-1, 1):
        shifted = z_t.roll(turn, dims=0)
        assert ((z - z_t).square().mean(dim=(1, 2)) < (z - shifted).square().mean(dim=(1, 2))).all()


@pytest.mark.parametrize("first_is_bad", [True, False])
def test_groups_of_other_images_than_those_of_the_means_are_refused(tmp_path, first_is_bad):
    """A dataset that nobody vouches for, in which an image was mended, or broke, between two captures."""
    path = tmp_path / "store"
    for samples, count in zip([with_bad_ones(), make_samples()][:: 1 if first_is_bad else -1], (2, 6), strict=True):
        recipe, manifest = recipe_of(tmp_path, samples, count, data={"bad_images": "skip"})
        (split,) = (split for split in manifest.datasets["photos"].splits.values())
        tars = [tar.model_copy(update={"sha256": None}) for tar in split.tars]
        splits = {"train": split.model_copy(update={"tars": tars})}
        unproven = manifest.datasets["photos"].model_copy(update={"splits": splits})
        manifest = manifest.model_copy(update={"datasets": {"photos": unproven}})
        if count == 2:
            with contextlib.suppress(StoreMismatch):  # it cannot be finished when it is not known which image is bad
                cache_teacher(recipe, manifest, [tmp_path], path, CPU)
    means = files_of(path, "logits/mean/c/*/*")
    with pytest.raises(StoreMismatch, match="are not those of which the store has other views already"):
        cache_teacher(recipe, manifest, [tmp_path], path, CPU)
    assert files_of(path, "logits/mean/c/*/*") == means


def test_a_store_whose_rows_were_shifted_is_not_finished(whole, tmp_path):
    path = tmp_path / "store"
    subprocess.run(["cp", "-r", whole / "store", path], check=True)
    rewrite(path, "logits/code", 1, 2, lambda code: np.roll(code, 1, axis=0))
    (path / "manifest.json").unlink()
    recipe, manifest = recipe_of(whole)
    with pytest.raises(StoreCorrupt, match="the teacher run again differs from the store by up to"):
        cache_teacher(recipe, manifest, [whole], path, CPU)


def test_tables_that_no_coder_has_are_refused_in_one_line(whole, tmp_path):
    for name, change, problem in (
        ("view_frequency", lambda one: one // 2, f"do not sum to {TOTAL}"),
        ("refine_frequency", lambda one: np.roll(one, 3, axis=1), "reaches further on one side of 0"),
        ("level_frequency", lambda one: one[:, ::-1], "of other levels than 0 to 7"),
    ):
        tables = {**open_store(whole / "store").codec_tables}
        tables[name] = np.ascontiguousarray(change(tables[name]))
        tables["view_frequency"] = tables["view_frequency"].copy()
        assert problem in klt_means.KltMeans(**MEANS).problem_of(tables)


def test_not_finite_logits_are_refused(recipe_file, where, tmp_path):
    codec = ("--set", "capture.codec={name: klt_means, step: 0.5, refine: 4}")
    model = ("--set", "teacher.model=networks:nan_on_some_views", "--set", "data.tars=[2]")
    message = refused("cache-teacher", recipe_file, "--store", tmp_path / "store", *codec, *model, *where)
    assert "learns from logits that are not finite" in message
    assert not list((tmp_path / "store").glob("ledger/0*"))
