"""Scales and zero points are computed once: a compiler would write them into the loop over the elements."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qcompiler.runtime import ops


@pytest.mark.parametrize("spec", ["affine8:real:tensor:nearest:pass", "affine8:real:c4:nearest:pass"])
def test_a_strided_view_stands_behind_scale_and_zero_point(spec):
    """Inductor stores what it takes a strided view of (`store_once`); what follows reads that."""

    def quantize(x):
        scale = ops.SCALE(x, spec, "bc")
        point = ops.ZERO_POINT(x, scale, spec, "bc")
        return ops.QUANTIZE(x, scale, point, None, spec, "bc", "a/input"), scale, point

    x = torch.randn(6, 8)
    traced = make_fx(quantize, decomposition_table=ops.DECOMPOSITIONS)(x)
    _, scale, point = traced.graph.output_node().args[0]
    assert [node.target for node in (scale, point)] == [torch.ops.aten.as_strided.default] * 2
    assert all(torch.equal(found, whole) for found, whole in zip(traced(x), quantize(x), strict=True))
