"""What finds a store that was changed with all its hashes: every row of the table in docs/trust.md is produced here."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, ROOT, invoke, make_recipe
from hypothesis import given
from hypothesis import strategies as st
from pictures import command_line, make_samples, photographs, views_of
from tampering import change_identity, rewrite, stored, swap
from test_signing import key_pair

from offline_kd.cache.fidelity import ask_again, rows_of_blocks
from offline_kd.cache.pipeline import Worker, cache_teacher
from offline_kd.data.manifest import Dataset, Manifest, Split
from offline_kd.data.packing import pack
from offline_kd.data.tars import read_tar, tars_in
from offline_kd.recipe import Recipe
from offline_kd.store.comparison import images_of
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.store.schema import StoreManifest
from offline_kd.store.signing import check_signed, sign
from offline_kd.store.verification import verify
from offline_kd.store.writer import write_manifest
from offline_kd.support.errors import OfflineKDError, StoreCorrupt, StoreMismatch
from offline_kd.support.places import Folder

NUM_BLOCKS, ROWS, GROUPS = 12, 10, 2
LOGITS, IDS = "logits/values", "decisions/last/id"


@dataclass(frozen=True)
class Sorted:
    """120 digits in 12 tars, sorted by class, and a store of 4 views of each in 2 groups."""

    folder: Path
    recipe: Recipe
    manifest: Manifest

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def one_view(self, **capture: object) -> Recipe:
        """Of every image, captured in another way."""
        about = self.recipe.model_dump()
        changed = {"views_per_group": 1, "decisions": {}} | capture
        views, capture = about["views"] | {"count": 1}, about["capture"] | changed
        return Recipe.model_validate(about | {"views": views, "capture": capture})


@pytest.fixture(scope="session")
def sorted_store(data_root, teacher_weights, tmp_path_factory) -> Sorted:
    folder = tmp_path_factory.mktemp("sorted")
    samples = sorted(read_tar(tars_in(data_root / "digits")[-1])[0][: NUM_BLOCKS * ROWS], key=lambda one: one.label)
    tars = pack(samples, folder / "sorted", "train", ROWS)
    dataset = Dataset(folder="sorted", classes=[str(digit) for digit in range(10)], splits={"train": Split(tars=tars)})
    recipe = make_recipe(
        data={"dataset": "sorted", "evaluation": "train"},
        teacher={"weights": str(teacher_weights), "training": None},
        views={"flip": True, "count": 4, "seed": 1},
        capture={
            "views_per_group": 2,
            "fidelity_rows": 1,
            "decisions": {"last": {"kind": "templates", "module": "body.5", "templates": 4, "top": 1}},
        },
    )
    made = Sorted(folder, recipe, Manifest(datasets={"sorted": dataset}))
    cache_teacher(made.recipe, made.manifest, [folder], made.store, CPU)
    return made


# ---- the table -------------------------------------------------------------------------------------------------------


def in_both_groups(name: str, block: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        for group in range(GROUPS):
            rewrite(path, name, block, group, change)

    return apply


def moved(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 1, axis=0)


def one_pair_exchanged(rows: np.ndarray) -> np.ndarray:
    """Of the rows that differ most."""
    one, other = 0, int(np.abs(rows - rows[:1]).reshape(len(rows), -1).max(axis=1).argmax())
    rows[[one, other]] = rows[[other, one]]
    return rows


def negate(path: Path) -> None:
    for block in (2, 5, 8, 11):
        in_both_groups(LOGITS, block, np.negative)(path)


def exchange_class_names(about: dict) -> None:
    names = about["dataset"]["classes"]
    names[0], names[1] = names[1], names[0]


def flatter(path: Path) -> None:
    manifest = StoreManifest.model_validate_json((path / "manifest.json").read_bytes())
    better = {"": manifest.fidelity[""].model_copy(update={"teacher_top1": 100.0})}
    write_manifest(Folder(path), manifest.model_copy(update={"fidelity": better}))


# By row of the table: what is done, and what finds it; a signature finds all. `--dataset` comes after `verify` and
# finds what it finds, `--teacher` after both, as far as blocks are looked at.
COLUMNS = ["`verify`", "`--dataset`", "`--teacher N`", "`--all`", "pinned digest", "signature"]
VERIFY = {"verify", "--dataset", "--teacher", "--all", "digest"}
DATASET = VERIFY - {"verify"}
TEACHER = DATASET - {"--dataset"}
BY_CHANCE = "logits of two rows exchanged"  # --teacher N finds it if it asks about one of them
TAMPERINGS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "logits exchanged between blocks": (lambda path: swap(path, [LOGITS], (0, 0), (9, 0)), TEACHER),
    "logits exchanged between view groups": (lambda path: swap(path, [LOGITS], (3, 0), (3, 1)), TEACHER),
    "logits of a block moved by one row": (in_both_groups(LOGITS, 4, moved), TEACHER),
    "logits of a block moved by one view": (in_both_groups(LOGITS, 4, lambda z: np.roll(z, 1, axis=1)), TEACHER),
    "logits negated in some blocks": (negate, TEACHER),
    BY_CHANCE: (lambda path: rewrite(path, LOGITS, 7, 1, one_pair_exchanged), {"--all", "digest"}),
    "decisions of a view group changed": (lambda path: rewrite(path, IDS, 6, 1, lambda ids: (ids + 1) % 4), TEACHER),
    "boxes moved by one row": (in_both_groups("view/box", 1, moved), VERIFY),
    "boxes moved by one pixel": (in_both_groups("view/box", 1, lambda box: box + np.int16([1, 0, 0, 0])), VERIFY),
    "flips inverted": (lambda path: rewrite(path, "view/flip", 8, 1, lambda flip: 1 - flip), VERIFY),
    "another seed of the views": (lambda path: change_identity(path, lambda c: c["views"].update(seed=2)), VERIFY),
    "keys moved by one row": (lambda path: rewrite(path, "key_hash", 5, 0, moved), VERIFY),
    "labels shifted": (lambda path: rewrite(path, "label", 3, 0, lambda label: (label + 1) % 10), DATASET),
    "class names exchanged": (lambda path: change_identity(path, exchange_class_names), DATASET),
    "image digests changed": (lambda path: rewrite(path, "image_digest", 2, 0, lambda digest: digest + 1), DATASET),
    "probe pixels changed": (lambda path: rewrite(path, "probe/pixels", 2, 1, lambda p: 255 - p), DATASET),
    "another teacher named": (
        lambda path: change_identity(path, lambda c: c["teacher"].update(weights_sha256="0" * 64)),
        TEACHER,
    ),
    "another normalisation named": (
        lambda path: change_identity(path, lambda c: c["teacher"]["normalisation"].update(mean=[0.5, 0.5, 0.5])),
        TEACHER,
    ),
    "figures in manifest.json changed": (flatter, set()),
}


def finders(path: Path, made: Sorted, digest: str, num_rows: int) -> set[str]:
    """What finds that the store is not what it was."""
    store, found = open_store(path), set()
    if verify(Folder(path)).faults:
        return VERIFY
    try:
        if verify(Folder(path), images=images_of(store, made.manifest, [made.folder])).faults:
            found.add("--dataset")
    except StoreMismatch:
        found.add("--dataset")
    for name, asked in (("--teacher", num_rows), ("--all", None)):
        try:
            ask_again(store, made.recipe, made.manifest, [made.folder], asked, CPU)
        except OfflineKDError:
            found.add(name)
    if verify(Folder(path), digest=digest).faults:
        found.add("digest")
    return found


@pytest.mark.parametrize("row", list(TAMPERINGS))
def test_consistent_tampering_is_found_by_what_the_table_says(row, sorted_store, signed, tmp_path):
    tamper, expected = TAMPERINGS[row]
    path = Path(shutil.copytree(sorted_store.store, tmp_path / "copy"))
    digest = open_store(path).digest
    tamper(path)
    found = finders(path, sorted_store, digest, num_rows=96)  # 8 of 40 rows of every block
    assert found - ({"--teacher"} if row == BY_CHANCE else set()) == expected
    shutil.copytree(signed.store / "signatures", path / "signatures")
    with pytest.raises(StoreMismatch, match="not signed by"):
        check_signed(open_store(path), signed.public_key)


@dataclass(frozen=True)
class Signed:
    store: Path
    public_key: Path


@pytest.fixture(scope="module")
def signed(sorted_store, tmp_path_factory) -> Signed:
    """The same store, signed by somebody."""
    folder = tmp_path_factory.mktemp("signed")
    private, public = key_pair(folder, "somebody")
    store = Path(shutil.copytree(sorted_store.store, folder / "store"))
    sign(open_store(store), private)
    check_signed(open_store(store), public)
    return Signed(store, public)


def test_the_table_in_the_documentation_is_the_one_that_is_tested():
    text = (ROOT / "docs" / "trust.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    table = {row[0]: row[1:] for row in rows if len(row) == len(COLUMNS) + 1}
    assert table.pop("changed") == COLUMNS
    assert list(table) == list(TAMPERINGS)
    for row, (_, expected) in TAMPERINGS.items():
        finds = {name.strip("`").split()[-1] for name, cell in zip(COLUMNS, table[row], strict=True) if cell == "yes"}
        assert {"--teacher" if name == "N" else name for name in finds} == expected | {"signature"}, row


def test_boxes_of_images_of_different_sizes_are_found_with_the_dataset_and_all_else_without(tmp_path):
    recipe, manifest = photographs(tmp_path, make_samples()[:20], views=views_of())
    whole = tmp_path / "store"
    cache_teacher(recipe, manifest, [tmp_path], whole, CPU)
    images = images_of(open_store(whole), manifest, [tmp_path])
    assert verify(Folder(whole), images=images).faults == []
    for name in open_store(whole).identity.views.arrays():
        path = Path(shutil.copytree(whole, tmp_path / name))
        rewrite(path, f"view/{name}", 0, 0, moved)
        faults = verify(Folder(path)).faults if name != "box" else verify(Folder(path), images=images).faults
        assert any("are not those that follow from their keys" in one.problem for one in faults) or name == "box", name
        assert faults, name


# ---- asking the teacher again ----------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.integers(0, 50), st.integers(1, 400), min_size=1, max_size=30),
    st.integers(1, 10_000),
    st.integers(0, 2**32),
)
def test_rows_lie_in_every_block_where_there_are_enough_of_them(there, num_rows, seed):
    wanted = rows_of_blocks(there, num_rows, seed)
    assert sum(wanted.values()) == min(num_rows, sum(there.values()))
    assert len(wanted) == min(num_rows, len(there))
    assert all(0 < count <= there[block] for block, count in wanted.items())


def test_a_store_is_not_finished_when_any_one_block_is_not_the_teachers(sorted_store, tmp_path):
    for block in (1, 5):  # of 12, of which 8 at even distances were looked at once
        path = Path(shutil.copytree(sorted_store.store, tmp_path / f"{block}"))
        in_both_groups(LOGITS, block, np.negative)(path)
        (path / "manifest.json").unlink()
        with pytest.raises(StoreCorrupt, match=rf"block {block}, sample '.*': the teacher run again differs"):
            cache_teacher(sorted_store.recipe, sorted_store.manifest, [sorted_store.folder], path, CPU)


def test_the_share_that_was_looked_at_is_printed_and_kept(sorted_store, tmp_path):
    finished = open_store(sorted_store.store).manifest.fidelity[""]
    assert (finished.rows, finished.of_rows, finished.blocks, finished.of_blocks) == (12, 480, 12, 12)
    file, where = command_line(tmp_path, sorted_store.recipe, sorted_store.manifest)
    where[-1] = str(sorted_store.folder)
    for option, said in (
        (["--teacher", "6"], "6 of 480 rows (1.25 %), in 6 of 12 blocks"),
        (["--teacher", "48"], "48 of 480 rows (10 %), in 12 of 12 blocks"),
        (["--all"], "480 of 480 rows (100 %), in 12 of 12 blocks"),
    ):
        result = invoke("store", "verify", sorted_store.store, *option, "--recipe", file, *where)
        assert result.exit_code == 0, result.output
        assert f"the teacher was asked again about {said}" in " ".join(result.stderr.split())
    assert "12 of 480 rows (2.5 %), in 12 of 12 blocks" in (sorted_store.store / "README.md").read_text()


def test_a_pinned_digest_is_part_of_verification(sorted_store):
    result = invoke("store", "verify", f"{sorted_store.store}@sha256:{'0' * 64}", "--json")
    assert result.exit_code == 1
    (fault,) = json.loads(result.stdout)["faults"]
    assert "wanted is sha256:000" in fault["problem"]


# ---- what is learned, is learned from all tars -----------------------------------------------------------------------


def captured(made: Sorted, path: Path, **capture: object) -> Store:
    cache_teacher(made.one_view(**capture), made.manifest, [made.folder], path, CPU)
    return open_store(path)


def test_axes_are_learned_from_as_many_views_as_asked_for_of_all_tars_by_any_writer(sorted_store, tmp_path):
    """Of tars sorted by class, and in batches of 8 and 2."""
    step, batches = 0.5, {"codec": {"name": "klt", "step": 0.5, "refine": 4, "fit_rows": 24}, "batch_size": 8}
    store = captured(sorted_store, tmp_path / "one", **batches)
    assert store.tables_statistics("codec")["rows"] == 24
    learned = store.codec_tables["mean"] * (step / 2048)
    of_tar = np.stack([stored(sorted_store.store, LOGITS, block, 0).mean(axis=(0, 1)) for block in range(NUM_BLOCKS)])
    assert np.abs(learned - of_tar.mean(axis=0)).max() < 0.3 * np.abs(learned - of_tar[:3].mean(axis=0)).max()
    recipe, seventh = sorted_store.one_view(**batches), Worker(7, 12)  # begins with another tar
    cache_teacher(recipe, sorted_store.manifest, [sorted_store.folder], tmp_path / "other", CPU, worker=seventh)
    assert open_store(tmp_path / "other").digest == store.digest


def test_templates_and_subclasses_are_learned_from_some_images_of_all_tars(sorted_store, tmp_path):
    templates = {"kind": "templates", "module": "body.5", "templates": 8, "top": 1, "grid": [1, 1], "max_vectors": 80}
    subclasses = {"kind": "subclasses", "module": "body.5", "per_class": 2, "components": 3, "max_vectors": 1600}
    store = captured(sorted_store, tmp_path / "store", decisions={"some": templates, "own": subclasses})
    rows = store.read_tables("some")["nearest_row"]
    assert len(set((rows[rows >= 0] // ROWS).tolist())) == NUM_BLOCKS
    assert store.tables_statistics("some")["vectors"] < NUM_BLOCKS * ROWS
    assert np.isfinite(store.read_tables("own")["centers"]).all()


def test_the_automatic_codec_is_chosen_on_images_of_all_tars(sorted_store, tmp_path, capsys):
    captured(sorted_store, tmp_path / "store", codec={"name": "auto"})
    assert "on 24 views" in " ".join(capsys.readouterr().err.split())  # every fifth of 120 images
