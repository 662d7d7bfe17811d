"""The local functions of ONNX files beside our runtime, bit by bit, in onnxruntime with and without optimizations."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from qcompiler.exporting.activations import _list_exponent_rule
from qcompiler.exporting.functions import DOMAIN, FUNCTIONS
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.spec import parse_spec

LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


def run(nodes, outputs, level, **inputs):
    """What a graph of calls of our functions returns."""
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in inputs.items()
    ]
    made = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(nodes, "calls", given, made)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    functions = [function.to_function_proto() for function in FUNCTIONS.values()]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, inputs)


def call(name, inputs, outputs, **attributes):
    return helper.make_node(name, inputs, outputs, domain=DOMAIN, **attributes)


def edges():
    """Every power of two of float32 and its two neighbors, zeros, infinities and NaN, in rows of two."""
    powers = np.ldexp(1.0, np.arange(-149, 128)).astype(np.float32)
    beside = [powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))]
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38], np.float32)
    first = np.concatenate([*beside, special])
    return np.stack([first, np.zeros_like(first)], 1)


def anything():
    """Random bits, read as floats: every exponent is as likely, and some are NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, (20_000, 4), dtype=np.uint64).astype(np.uint32)
    return bits.view(np.float32)


def same(found, expected):
    """Equal, NaN beside NaN."""
    return bool(((found == expected) | (np.isnan(found) & np.isnan(expected))).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "text", ["int4:max", "int8:fit", "uint4:fit", "int8:ceil", "int5:round", "int2:max", "uint8:round"]
)
def test_hyperblocks(text, level):
    spec = parse_spec(f"{text}:c*:nearest:pass")
    form = spec.format
    to = 3 if form.dtype is torch.int8 else 2
    nodes = [
        call("SharedExponent", ["x", "axes"], ["exponent"], **_list_exponent_rule(spec)),
        call("HyperblockQuantize", ["x", "exponent"], ["codes"], lowest=form.lowest, largest=form.largest, to=to),
        call("HyperblockDequantize", ["codes", "exponent"], ["values"]),
    ]
    for x in (edges(), anything()):
        names = ("exponent", "codes", "values")
        exponent, codes, values = run(nodes, names, level, x=x, axes=np.array([1]))
        given = torch.from_numpy(x)
        scale = ops.SCALE(given, str(spec), "bc")
        expected = ops.QUANTIZE(given, scale, None, None, str(spec), "bc", "site")
        assert np.array_equal(exponent, scale.numpy())
        assert np.array_equal(codes, expected.numpy())
        assert same(values, ops.DEQUANTIZE(expected, scale, None, str(spec), "bc", torch.float32).numpy())


@pytest.mark.parametrize("text", ["int8:real", "uint8:real", "affine8:real", "affine4:real"])
def test_real_scales(text):
    spec = parse_spec(f"{text}:c*:nearest:pass")
    form = spec.format
    negative = 0.0 if text.startswith("uint") else -1.0
    scale = (
        call("AffineScale", ["x", "axes"], ["scale", "point"], largest=form.largest)
        if spec.has_zero_point
        else call("RangeScale", ["x", "axes"], ["scale"], largest=form.largest, negative=negative)
    )
    point = [] if spec.has_zero_point else [helper.make_node("Constant", [], ["point"], value_float=0.0)]
    ends = {"lowest": form.lowest, "largest": form.largest, "to": 3 if form.dtype is torch.int8 else 2}
    nodes = [
        scale,
        *point,
        call("RangeQuantize", ["x", "scale", "point"], ["codes"], **ends),
        call("RangeDequantize", ["codes", "scale", "point"], ["values"]),
    ]
    for x, level in itertools.product((edges(), anything()), LEVELS):
        found, codes, values = run(nodes, ("scale", "codes", "values"), level, x=x, axes=np.array([1]))
        given = torch.from_numpy(x)
        expected = ops.SCALE(given, str(spec), "bc")
        zero = ops.ZERO_POINT(given, expected, str(spec), "bc") if spec.has_zero_point else None
        whole = ops.QUANTIZE(given, expected, zero, None, str(spec), "bc", "site")
        assert same(found, expected.numpy())
        assert np.array_equal(codes, whole.numpy())
        assert same(values, ops.DEQUANTIZE(whole, expected, zero, str(spec), "bc", torch.float32).numpy())


@pytest.mark.parametrize("text", ["int4:real", "uint4:real", "int2:real", "int5:real"])
def test_scales_of_means(text):
    """Numbers of all sizes: with float32 sums in another order, one row in a hundred is a bit off."""
    spec = parse_spec(f"{text}:c*:nearest:pass:sawb")
    root, mean = spec.range.coefficients(spec.format.bits)
    node = call("SawbScale", ["x", "axes"], ["scale"], root_factor=root, mean_factor=mean, largest=spec.format.largest)
    random = np.random.default_rng(0)
    many = random.standard_normal((2000, 301)) * np.exp2(random.integers(-60, 60, (2000, 1)))
    for x, level in itertools.product((edges(), anything(), many.astype(np.float32)), LEVELS):
        (found,) = run([node], ["scale"], level, x=x, axes=np.array([1]))
        assert same(found, ops.SCALE(torch.from_numpy(x), str(spec), "bc").numpy())


def test_two_level_scales():
    x = anything()[:, :4]
    x = np.where(np.abs(x) < 1e30, x, np.float32(1))
    x[0, 0] = np.nan
    (found,) = run(
        [call("TwoLevelScale", ["x", "axes"], ["scale"], reach=6.0)], ["scale"], LEVELS[1], x=x, axes=np.array([1])
    )
    assert same(found, ops.SCALE(torch.from_numpy(x), "e2m1:two-level:c*:nearest:pass", "bc").numpy())


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3b11", "e3m0"])
def test_levels_of_small_floats(name):
    form = parse_format(name)
    levels = form.decode(torch.arange(2**form.bits)).unique()
    middles = (levels[1:] + levels[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(side)) for side in (torch.inf, -torch.inf)]
    x = torch.cat(
        [levels, middles, *beside, torch.from_numpy(anything()).flatten(), torch.tensor([torch.inf, torch.nan])]
    )
    rule = {"mantissa_bits": form.mantissa_bits, "first_exponent": form.first_exponent, "largest": form.largest}
    (found,) = run([call("MinifloatRound", ["x"], ["level"], **rule)], ["level"], LEVELS[1], x=x.numpy())
    expected = form.decode(form.encode(x, None))
    expected[x.isnan()] = torch.nan  # without a code for it our runtime shows NaN by the scale
    assert same(found, expected.numpy())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented_standard_operators(name):
    proto = FUNCTIONS[name].to_function_proto()
    assert proto.doc_string
    assert {node.domain for node in proto.node} == {""}
    assert all(onnx.defs.has(node.op_type) for node in proto.node)
