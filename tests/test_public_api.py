"""What `import offline_kd` offers: names that are imported late, random access to a store, and a store of a module."""

import ast
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from networks import Small
from test_store import rewrite

import offline_kd as okd
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import Normalisation
from offline_kd.models.networks import normalise
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.verification import verify
from offline_kd.support.errors import DataError, RecipeError, StoreCorrupt, StoreError, StoreMismatch
from offline_kd.views.choice import choose
from offline_kd.views.kind import draw
from offline_kd.views.render import render_some

LAZY_ROOMS = ["support", "data", "models", "store", "cache", "distill"]
STORE_2 = ROOT / "tests" / "fixtures" / "store_v2" / "store"
NORMALISATION = {"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]}


def modules_after(*arguments: str) -> set[str]:
    """What a fresh interpreter has imported after it ran these arguments."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


# ---- names ---------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy():
    imported = modules_after("-c", "import offline_kd; assert 'open_store' in dir(offline_kd)")
    assert "offline_kd" in imported
    assert not imported & {"torch", "zarr", "numpy", "pydantic", "rich"}


def test_help_imports_neither_torch_nor_zarr():
    assert not modules_after("-m", "offline_kd", "--help") & {"torch", "zarr"}


@pytest.mark.parametrize("package", ["offline_kd", *(f"offline_kd.{room}" for room in LAZY_ROOMS)])
def test_every_name_of_a_lazy_package_is_there_and_stands_in_all_three_lists(package):
    module = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "offline_kd.support.lazy":
            for name in node.names:
                if node.module == "offline_kd":  # a module that is public itself
                    expected = import_module(f"offline_kd.{name.name}")
                else:
                    expected = getattr(import_module(node.module), name.name, None)
                if name.name != "TYPE_CHECKING":
                    assert getattr(module, name.name) is expected
                    assert name.name in module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    assert module.__all__ == sorted(module.__all__)


def test_an_unknown_name_is_an_attribute_error_as_everywhere():
    with pytest.raises(AttributeError, match="module 'offline_kd' has no attribute 'open_stores'"):
        okd.open_stores  # noqa: B018


def test_the_version_is_that_of_the_installed_package():
    assert okd.__version__ == metadata.version("offline-kd")


def test_type_checkers_find_the_marker_of_a_typed_package():
    assert (Path(okd.__file__).parent / "py.typed").is_file()
    assert 'offline_kd = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


# ---- opening -------------------------------------------------------------------------------------------------------


def test_open_store_takes_folders_digests_and_manifest_names(store_path, tmp_path, monkeypatch):
    store = okd.open_store(store_path)
    assert store.digest.startswith("sha256:")
    assert store.info["digest"] == store.digest
    assert store.classes == [str(digit) for digit in range(10)]
    assert okd.open_store(f"{store_path}@{store.digest}").digest == store.digest
    assert okd.open_store(str(store_path), digest=store.digest).digest == store.digest
    monkeypatch.chdir(tmp_path)
    Path("data_manifest.yaml").write_text(
        f"manifest_version: 1\nstores:\n  ours: {{location: {store_path}, digest: '{store.digest}'}}\n"
    )
    assert okd.open_store("ours").digest == store.digest
    with pytest.raises(RecipeError, match=r"wanted is sha256:00.*Correct one"):
        okd.open_store("ours", digest="sha256:" + "0" * 64)
    with pytest.raises(StoreMismatch, match="wanted is sha256:00"):
        okd.open_store(store_path, digest="sha256:" + "0" * 64)
    with pytest.raises(okd.OfflineKDError, match="no teacher store there"):
        okd.open_store(tmp_path)


# ---- random access -------------------------------------------------------------------------------------------------


def test_keys_come_in_row_order_from_the_store_and_are_proven(store_path, manifest, roots, tmp_path):
    loader = BlockLoader(manifest.dataset("digits"), manifest.split("digits", "train"), roots)
    assert okd.open_store(store_path).keys() == [key for block in loader for key in block.keys]
    with pytest.raises(StoreError, match=r"holds no images\. Name the folder.*data=FOLDER"):
        okd.open_store(store_path).loader(batch_size=2)
    shutil.copytree(store_path, tmp_path / "store")
    rewrite(tmp_path / "store", "key", 1, 0, lambda keys: np.roll(keys, 1, axis=0))
    with pytest.raises(StoreCorrupt, match=r"block 1: 512 keys are not those that were hashed, the first is '\d{4}'"):
        okd.open_store(tmp_path / "store").keys()


def test_keys_of_a_store_before_schema_3_come_from_the_tars(manifest, roots, data_root, tmp_path):
    loader = BlockLoader(manifest.dataset("digits"), manifest.split("digits", "train"), roots)
    assert okd.open_store(STORE_2, data=data_root / "digits").keys() == loader[2].keys
    with pytest.raises(StoreError, match=r"holds no images and no keys\. Name the folder.*data=FOLDER"):
        okd.open_store(STORE_2).keys()
    with pytest.raises(DataError, match="no such folder"):
        okd.open_store(STORE_2).keys(tmp_path / "nowhere")
    shutil.copy(next((data_root / "digits").glob("test*.tar")), tmp_path / "other.tar")
    with pytest.raises(StoreMismatch, match=r"1 tars lack the keys of \d+ of 414 rows"):
        okd.open_store(STORE_2).keys(tmp_path)


def test_logits_by_key_are_the_stored_ones_in_the_order_asked_for(store_path, data_root):
    store = okd.open_store(store_path, data=data_root / "digits")
    keys = store.keys()
    chosen, views = [keys[-1], keys[3], keys[700], keys[3]], [8, 0, 4]
    found = store.logits(chosen, views)
    assert found.dtype == torch.float32
    assert found.shape == (4, 3, 10)
    reader = store.reader
    for row, key in enumerate(chosen):
        block, offset = divmod(_row(reader, key), reader.identity.rows_per_block)
        for column, view in enumerate(views):
            stored = reader.read(block, view // 3, ["logits/values"])["logits/values"]
            assert np.array_equal(found[row, column].numpy(), stored[offset, view % 3])
    assert torch.equal(store.logits(chosen)[:, views], found)
    assert store.logits([]).shape == (0, 9, 10)


def _row(reader, key: str) -> int:
    from offline_kd.data.tars import hash_key

    hashes, rows = reader.row_index
    return int(rows[np.flatnonzero(hashes == hash_key(key))[0]])


def test_unknown_keys_and_views_are_one_line_and_name_what_is_near(store_path, data_root):
    with pytest.raises(StoreMismatch, match=r"has no sample 'no-such' \(and 1 more\).*digits/train\. See its keys"):
        okd.open_store(store_path).logits(["0001", "no-such", "x"])
    with pytest.raises(StoreMismatch, match=r"has no sample '00001'.*Did you mean '0001'\?"):
        okd.open_store(store_path).logits(["00001"])
    with pytest.raises(StoreMismatch, match=r"has no sample '11281'.*Did you mean '1281'\?"):
        okd.open_store(STORE_2, data=data_root / "digits").logits(["11281"])
    with pytest.raises(StoreMismatch, match="has no view 9, it holds 9 of every image: 0 to 8"):
        okd.open_store(store_path).logits(["0001"], views=[9])
    with pytest.raises(StoreMismatch, match=r"holds no decisions 'last'\..*Capture them"):
        okd.open_store(store_path).decisions("last", ["0001"])


def test_a_damaged_byte_is_refused_in_random_access_too(store_path, tmp_path):
    shutil.copytree(store_path, tmp_path / "store")
    file = tmp_path / "store/targets.zarr/logits/values/c/0/0/0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    store = okd.open_store(tmp_path / "store")
    assert store.logits(["0001"], views=[3]).shape == (1, 1, 10)
    with pytest.raises(StoreCorrupt, match="sha256"):
        store.logits(["0001"], views=[0])


# ---- a module as teacher -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_digits(data_root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "some_digits"
    folder.mkdir()
    shutil.copy(data_root / "digits/train-000000.tar", folder)
    return folder


@pytest.fixture(scope="module")
def module() -> Small:
    torch.manual_seed(0)
    return Small(10)


DECISIONS = {
    "last": {"kind": "templates", "module": "body.5", "templates": 8, "top": 2, "iterations": 2},
    "classes": {"kind": "subclasses", "module": "body.2", "per_class": 2, "components": 4, "iterations": 2},
}


@pytest.fixture(scope="module")
def module_store(module, some_digits, tmp_path_factory) -> okd.TeacherStore:
    return okd.cache_teacher(
        module,
        some_digits,
        views={"kind": "pad_crop_flip", "padding": 1, "count": 4},
        out=tmp_path_factory.mktemp("stores") / "mine",
        normalisation=NORMALISATION,
        decisions=DECISIONS,
    )


def test_the_store_of_a_module_holds_its_own_logits_on_the_rendered_views(module, module_store, some_digits):
    views = module_store.reader.identity.views
    keys = module_store.keys()
    block = next(iter(_blocks_of(some_digits)))
    assert keys == block.keys
    parameters, every_row = draw(views, block.key_hash, block.sizes()), np.arange(len(block))
    for view in range(4):
        pixels = render_some(block, choose(parameters, every_row, np.full(len(block), view)), views, 8)
        with torch.no_grad():
            own = module.eval()(normalise(torch.from_numpy(pixels), Normalisation.model_validate(NORMALISATION)))
        found = module_store.logits(keys, views=[view])[:, 0]
        assert ((found - own).abs().numpy() <= Float16(name="f16").error_bound(own.numpy()) + 1e-5).all()


def _blocks_of(folder: Path) -> BlockLoader:
    from offline_kd.cache.in_memory import dataset_of

    dataset = dataset_of(folder, None)
    return BlockLoader(dataset, dataset.splits["train"], [folder.parent])


def test_the_store_of_a_module_is_clean_and_says_whose_it_is(module_store):
    place = module_store.reader.place
    assert not verify(place).faults
    assert module_store.info["teacher"]["model"] == "a module in memory: networks.Small"
    assert "a module in memory: networks.Small" in (place.path / "README.md").read_text()
    assert module_store.info["dataset"]["name"] == "some_digits"


def test_decisions_by_key_are_those_of_the_rows_asked_for(module_store):
    keys = module_store.keys()
    last = module_store.decisions("last", keys[5:8], views=[2, 0])
    everything = module_store.decisions("last", keys)
    assert last["id"].shape[:2] == (3, 2)
    assert last["id"].shape[-1] == 2
    assert last["prob"].shape == last["id"].shape
    assert (last["prob"].sum(axis=-1) <= 1.001).all()
    for name, array in last.items():
        assert np.array_equal(array, everything[name][5:8][:, [2, 0]])
    assert module_store.decisions("classes", keys[:1])["subclass"].max() < 2


def test_a_module_comes_back_in_its_own_modes_and_the_same_call_changes_nothing(module, module_store, some_digits):
    module.train()
    module.body[1].eval()
    again = okd.cache_teacher(
        module,
        some_digits,
        views={"kind": "pad_crop_flip", "padding": 1, "count": 4},
        out=module_store.reader.place.path,
        normalisation=NORMALISATION,
        decisions=DECISIONS,
    )
    assert again.digest == module_store.digest
    assert module.training
    assert not module.body[1].training
    with pytest.raises(StoreMismatch):
        okd.cache_teacher(
            Small(10),
            some_digits,
            views={"kind": "pad_crop_flip", "padding": 1, "count": 4},
            out=module_store.reader.place.path,
            normalisation=NORMALISATION,
        )


def test_what_cannot_be_captured_is_said_in_one_line(module, tmp_path):
    given = {"views": {"kind": "none"}, "out": tmp_path / "store", "normalisation": NORMALISATION}
    with pytest.raises(DataError, match=r"holds no \.tar"):
        okd.cache_teacher(module, tmp_path, **given)
    with pytest.raises(RecipeError, match=r"no dataset 'nowhere' in the manifest"):
        okd.cache_teacher(module, "nowhere", **given)
    assert not (tmp_path / "store").exists()


# ---- batches -------------------------------------------------------------------------------------------------------


def test_a_plain_loop_trains_from_the_store_of_a_module(module_store):
    torch.manual_seed(1)
    student = Small(10, width=4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loader = module_store.loader(batch_size=64, normalisation=NORMALISATION)
    losses = []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            loss = okd.objectives.kd(student(batch.images), batch.teacher_logits, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
