"""The choice of a kernel, and why there is none."""

import dataclasses

import pytest
import torch

from qcompiler.runtime import ops  # noqa: F401 (defines the operator of batches)
from qcompiler.runtime.kernels import convolutions, cpu, table, whole
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.numbers.formats import parse_format

FORMATS = (parse_format("int8"), parse_format("int8"))
LARGE = Facts(device="cpu", formats=FORMATS, rows=512, length=512, columns=512)


@pytest.mark.usefixtures("fast_integers")
def test_the_kernel_of_the_device():
    assert table.find_kernel(LARGE, faster=True) is table.find_kernel(LARGE, faster=False)
    assert table.find_kernel(LARGE, faster=True).device == "cpu"


def test_another_device_has_none():
    facts = dataclasses.replace(LARGE, device="meta")
    assert table.find_kernel(facts, faster=False) == "there is no integer kernel for meta"


def test_reasons_of_all_kernels(fast_integers, monkeypatch):
    row = table.KERNELS[0]
    rows = (dataclasses.replace(row, explain=lambda _: "one"), dataclasses.replace(row, weigh=lambda _: "two"))
    monkeypatch.setattr(table, "KERNELS", rows)
    monkeypatch.setattr(table, "WHOLE_KERNELS", ())
    assert table.find_kernel(LARGE, faster=True) == "one; two"
    assert table.find_kernel(LARGE, faster=False) is rows[1]


@pytest.mark.parametrize(
    ("formats", "others", "name"),
    [
        (("int8", "int8"), {}, "whole"),
        (("affine8", "int8"), {}, "whole"),
        (("affine8", "affine8"), {}, "whole"),
        (("int8", "affine8"), {}, "whole"),
        (("int8", "uint4"), {}, "whole"),
        (("int8", "int8"), {"is_batch": True}, "int-mm"),
        (("affine8", "int8"), {"is_batch": True}, "int-mm"),
        (("affine8", "int8"), {"reuse": 128}, "int-mm"),
    ],
)
def test_whole_sums_have_a_kernel_that_scales_them(formats, others, name, fast_integers, wide_vectors, monkeypatch):
    """On a processor that has all kernels, without AMX."""
    monkeypatch.setattr(table, "has_tiles", lambda: False)
    monkeypatch.setattr(whole, "explain_vectors", lambda: "")
    facts = dataclasses.replace(LARGE, formats=tuple(map(parse_format, formats)), **others)
    for faster in (True, False):
        assert table.find_kernel(facts, faster=faster).name == name
    small = dataclasses.replace(facts, rows=4, columns=4)
    assert isinstance(table.find_kernel(small, faster=True), str)
    assert not isinstance(table.find_kernel(small, faster=False), str)


@pytest.mark.parametrize(("left", "name"), [("int8", "int-mm"), ("int4", "int-mm"), ("uint8", "whole")])
def test_tiles_of_the_processor_multiply_signed_codes(left, name, fast_integers, wide_vectors, monkeypatch):
    """With AMX; zero points still need a kernel."""
    monkeypatch.setattr(whole, "explain_vectors", lambda: "")
    monkeypatch.setattr(table, "has_tiles", lambda: True)
    facts = dataclasses.replace(LARGE, formats=(parse_format(left), FORMATS[1]))
    assert table.find_kernel(facts, faster=True).name == name


@pytest.mark.parametrize(("is_batch", "name"), [(False, "whole"), (True, "")])
def test_signed_codes_too_if_torch_has_no_fast_kernel(is_batch, name, wide_vectors, monkeypatch):
    """What that kernel does not compute stays in float, or goes to the slow one if it must."""
    monkeypatch.setattr(whole, "explain_vectors", lambda: "")
    monkeypatch.setattr(cpu, "is_fast", lambda: False)
    facts = dataclasses.replace(LARGE, is_batch=is_batch)
    assert table.find_kernel(facts, faster=False).name == (name or "int-mm")
    found = table.find_kernel(facts, faster=True)
    assert found.name == name if name else found.startswith("float is faster on this processor")
    small = dataclasses.replace(facts, rows=4, columns=4)
    assert table.find_kernel(small, faster=False).name == "int-mm"
    reason = "float is as fast for 8192 products; valid: 524288 or more" if name else found
    assert table.find_kernel(small, faster=True) == reason


@pytest.mark.usefixtures("fast_integers")
def test_one_row_and_long_sums_have_a_kernel_if_somebody_asks(monkeypatch):
    monkeypatch.setattr(whole, "explain_vectors", lambda: "")
    for sizes in ({"rows": 1}, {"rows": 1, "length": 2**20}):
        facts = dataclasses.replace(LARGE, **sizes)
        assert table.find_kernel(facts, faster=False).name == "whole"
        assert isinstance(table.find_kernel(facts, faster=True), str)


def test_a_missing_compiler_is_the_reason(monkeypatch):
    """And not the slow product of torch, which nobody would ask on this processor with a compiler."""
    monkeypatch.setattr(whole, "explain_vectors", lambda: "no compiler")
    monkeypatch.setattr(table, "explain_compiler", lambda: "no compiler")
    monkeypatch.setattr(cpu, "is_fast", lambda: False)
    assert table.find_kernel(LARGE, faster=True) == "no compiler"
    assert table.find_kernel(LARGE, faster=False).name == "int-mm"


def test_names_are_unique():
    rows = (*table.KERNELS, *table.RUN_KERNELS, *table.WHOLE_KERNELS, *table.CONVOLUTIONS)
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("left", ["int8", "affine8"])
def test_sums_that_leave_32_bits(left, monkeypatch):
    """Of products of a batch by the formats; kernels with wider sums compute them."""
    formats = (parse_format(left), FORMATS[1])
    length = 66312 if left == "affine8" else 133145
    monkeypatch.setattr(table, "WHOLE_KERNELS", ())
    for most, reason in ((length - 1, ""), (length, f"a sum of {length} products can leave 32 bits")):
        found = table.find_kernel(dataclasses.replace(LARGE, is_batch=True, formats=formats, length=most), faster=False)
        assert (found if reason else "") == reason
    rows = (dataclasses.replace(table.KERNELS[0], explain=lambda _: "", has_wide_sums=True),)
    monkeypatch.setattr(table, "KERNELS", rows)
    assert (
        table.find_kernel(dataclasses.replace(LARGE, is_batch=True, formats=formats, length=length), faster=False)
        is rows[0]
    )


@pytest.mark.usefixtures("wide_vectors")
def test_each_image_has_its_kernel_and_its_reasons():
    """No reason of a kernel that computes another contraction."""
    for image, row in zip(("left", "right"), table.CONVOLUTIONS, strict=True):
        facts = dataclasses.replace(LARGE, image=image)
        reason = row.explain(facts)
        assert table.find_kernel(facts, faster=True) == (reason or row)
        small = dataclasses.replace(facts, rows=1, columns=1)
        wanted = reason or "float is as fast for 512 products; valid: 524288 or more"
        assert table.find_kernel(small, faster=True) == wanted


def test_weights_with_a_zero_point_are_refused():
    formats = (FORMATS[0], parse_format("affine8"))
    facts = dataclasses.replace(LARGE, image="left", formats=formats)
    assert table.find_kernel(facts, faster=False) == "the kernel of convolutions takes signed weights, got affine8"


def test_positions_whose_codes_leave_32_bits_are_refused():
    facts = dataclasses.replace(LARGE, image="right", length=2**23 + 1)
    wanted = "the kernel of weight gradients takes 8388608 positions at most, got 8388609"
    assert table.find_kernel(facts, faster=False) == wanted


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("row", table.CONVOLUTIONS)
def test_small_convolutions_are_as_fast_in_float(row, is_wide, monkeypatch):
    """Each run is a call of its own."""
    monkeypatch.setattr(convolutions, "has_wide_vectors", lambda: is_wide)
    least = 2**19 if is_wide else 2**22
    for run, kind in ((0, "products"), (least // 16, "products of a run")):
        sizes = {"rows": 2, "columns": 8, "length": least // (1 if run else 16)}
        facts = dataclasses.replace(LARGE, **sizes, run=run, image=row.image)
        assert row.weigh(facts) == ""
        less = dataclasses.replace(facts, length=facts.length - (not run), run=run and run - 1)
        assert row.weigh(less) == f"float is as fast for {least - 16} {kind}; valid: {least} or more"


@pytest.mark.usefixtures("wide_vectors")
def test_the_longest_sums(monkeypatch):
    monkeypatch.setattr(whole, "explain_vectors", lambda: "")
    (row,) = table.WHOLE_KERNELS
    facts = dataclasses.replace(LARGE, formats=(parse_format("affine8"), FORMATS[1]), length=2**23)
    assert table.find_kernel(facts, faster=True) is row
    longer = row.explain(dataclasses.replace(facts, length=2**23 + 1))
    assert longer == "the kernel of whole sums takes 8388608 products of a sum at most, got 8388609"


@pytest.mark.parametrize("is_wide", [False, True])
def test_small_products_are_as_fast_in_float(is_wide, monkeypatch):
    monkeypatch.setattr(whole, "has_wide_vectors", lambda: is_wide)
    (row,) = table.WHOLE_KERNELS
    least = whole.LEAST_PRODUCTS[is_wide]
    facts = dataclasses.replace(LARGE, rows=4, columns=8, length=least // 32)
    assert row.weigh(facts) == ""
    less = dataclasses.replace(facts, length=facts.length - 1)
    assert row.weigh(less) == f"float is as fast for {least - 32} products; valid: {least} or more"
    few = dataclasses.replace(facts, rows=3, length=least)
    assert row.weigh(few) == "float is as fast for 3 rows or columns; valid: 4 or more"


def test_without_a_compiler_no_kernel_reads_images(monkeypatch):
    monkeypatch.setattr(convolutions, "explain_vectors", lambda: "no compiler")
    for image in ("left", "right"):
        assert "no compiler" in table.find_kernel(dataclasses.replace(LARGE, image=image), faster=False)


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
