"""Which rows an image is contrasted with: of other classes, all equally likely, the same on every device."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_kd.objectives.negatives import Negatives
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.device_rng import device_hash
from offline_kd.support.errors import DataError

CPU = torch.device("cpu")


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_random_numbers_on_a_device_are_those_of_counters(first, second):
    numbers = np.arange(5, dtype=np.uint64) * np.uint64(2**61 + 17)
    expected = counter_hash(first, numbers, second).astype(np.int64)
    found = device_hash(first, torch.from_numpy(numbers.astype(np.int64)), second, device=CPU)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("count", [5, 8, 30])
@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_negatives_have_another_class_and_are_distinct_where_they_can_be(mode, count):
    labels = torch.tensor([0] * 7 + [1] * 5 + [2] * 2 + [-1] * 2)
    draws = Negatives(labels, count, mode)
    rows = torch.arange(16).repeat(20)
    contrast = draws(rows, 3, 4)
    own, others = contrast[:, 0], contrast[:, 1:]
    assert contrast.shape == (320, 1 + count)
    classes = torch.where(labels >= 0, labels, 10 + torch.arange(16))  # a row without a label is a class of its own
    assert (classes[others] != classes[rows][:, None]).all()
    assert torch.equal(own, rows) if mode == "exact" else torch.equal(classes[own], classes[rows])
    for row, found in zip(rows.tolist(), others.tolist(), strict=True):
        available = int((classes != classes[row]).sum())
        assert available < count or len(set(found)) == count
    # Of a row and these counters, and of nothing else.
    assert torch.equal(draws(rows[5:9], 3, 4), contrast[5:9])
    assert not torch.equal(draws(rows, 3, 5), contrast)


@pytest.mark.parametrize("count", [4, 40])
def test_every_row_of_another_class_is_equally_likely(count, monkeypatch):
    monkeypatch.setattr("offline_kd.objectives.negatives.DRAWS_AT_ONCE", 64)  # in several parts
    labels = torch.arange(24) % 4
    draws, visits = Negatives(labels, count, "relax"), 60
    contrast = torch.cat([draws(torch.arange(0, 24, 4), 7, visit) for visit in range(visits)])
    for columns, of_class in ((contrast[:, 1:], [1, 2, 3]), (contrast[:, :1], [0])):
        counts = torch.bincount(columns.flatten(), minlength=24)
        possible = torch.isin(labels, torch.tensor(of_class))
        assert counts[~possible].sum() == 0
        expected = counts.sum() / possible.sum()
        chi_squared = ((counts[possible] - expected) ** 2 / expected).sum()
        assert chi_squared < 45  # of at most 17 degrees of freedom: by chance in one of 10,000


def test_rows_of_one_class_have_no_negatives():
    with pytest.raises(DataError, match="all 9 training rows have one class"):
        Negatives(torch.zeros(9, dtype=torch.int64), 3, "exact")
