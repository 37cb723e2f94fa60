"""`store import`: label stores of other programs, made by those programs' own writers (tests/fixtures/README.md)."""

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import invoke, refused
from foreign_labels import CLASSES, FIXTURES, NAMES, SHOWN, SIZE, TINYVIT_SIZE, VIEWS, write_pictures
from PIL import Image
from torch.nn import functional as F

from offline_kd.cache.foreign.answers import Answers
from offline_kd.cache.foreign.fkd import open_fkd
from offline_kd.cache.foreign.ml_dr import open_ml_dr
from offline_kd.cache.foreign.plain import read_plain
from offline_kd.cache.importing import topk_of
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.opening import open_store
from offline_kd.support.errors import DataError
from offline_kd.views.choice import choose
from offline_kd.views.render import render_some

SOURCES = {
    "fkd": ("fkd", FIXTURES / "fkd" / "imagenet", "--size", SIZE),
    "fkd_half": ("fkd", FIXTURES / "fkd_half" / "imagenet", "--size", SIZE),
    "ml_dr": ("ml-dr", FIXTURES / "ml_dr"),
    "ml_dr_plain": ("ml-dr", FIXTURES / "ml_dr_plain"),
    "tinyvit": ("tinyvit", FIXTURES / "tinyvit"),
}
CROPS_ALONE = {
    "AUG": {
        "MIXUP": 0.0,
        "CUTMIX": 0.0,
        "CUTMIX_MINMAX": None,
        "AUTO_AUGMENT": "none",
        "COLOR_JITTER": 0.0,
        "REPROB": 0.0,
    },
    "DATA": {"IMG_SIZE": TINYVIT_SIZE, "INTERPOLATION": "bicubic"},
    "MODEL": {"NAME": "clip"},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """The pictures, packed as people pack them: a manifest, three tars, and the configuration of TinyViT's teacher."""
    folder = tmp_path_factory.mktemp("photos")
    train = write_pictures(folder)
    pack = ["--out", folder / "photos", "--split", "train", "--per-tar", 10]
    assert invoke("data", "pack", "imagefolder", "--source", train, *pack).exit_code == 0
    return folder
