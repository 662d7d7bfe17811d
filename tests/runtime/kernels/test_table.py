"""The choice of a kernel, and why there is none."""

import dataclasses

import pytest
import torch

from qcompiler.runtime import ops  # noqa: F401 (defines the operator of batches)
from qcompiler.runtime.kernels import table
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.numbers.formats import parse_format

FORMATS = (parse_format("int8"), parse_format("int8"))
LARGE = Facts(device="cpu", formats=FORMATS, rows=512, length=512, columns=512)


def test_the_kernel_of_the_device():
    assert table.find_kernel(LARGE, faster=True) is table.find_kernel(LARGE, faster=False)
    assert table.find_kernel(LARGE, faster=True).device == "cpu"


def test_another_device_has_none():
    facts = dataclasses.replace(LARGE, device="meta")
    assert table.find_kernel(facts, faster=False) == "there is no integer kernel for meta"


def test_reasons_of_all_kernels(monkeypatch):
    row = table.KERNELS[0]
    rows = (dataclasses.replace(row, explain=lambda _: "one"), dataclasses.replace(row, weigh=lambda _: "two"))
    monkeypatch.setattr(table, "KERNELS", rows)
    assert table.find_kernel(LARGE, faster=True) == "one; two"
    assert table.find_kernel(LARGE, faster=False) is rows[1]


def test_names_are_unique():
    assert len({row.name for row in table.KERNELS}) == len(table.KERNELS)


@pytest.mark.parametrize("kernel", ["", *(row.name for row in table.KERNELS if row.device == "cpu")])
def test_every_way_gives_the_same_sums(kernel):
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((5, 33), (33, 7)))
    assert torch.equal(table.multiply(a, b, kernel).to(torch.int64), a.to(torch.int64) @ b.to(torch.int64))


@pytest.mark.parametrize("kernel", ["", *(row.name for row in table.KERNELS if row.device == "cpu")])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch, kernel):
    """Any memory order, as that of heads that a view has turned."""
    a = torch.randint(-128, 128, (5, batch, 33), dtype=torch.int8).transpose(0, 1)
    b = torch.randint(-128, 128, (batch, 7, 33), dtype=torch.int8).transpose(1, 2)
    assert torch.equal(table.multiply(a, b, kernel).to(torch.int64), a.to(torch.int64) @ b.to(torch.int64))
