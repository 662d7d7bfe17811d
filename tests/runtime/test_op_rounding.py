"""Stochastic rounding of the operators, refusals, compiled code and fake tensors."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from operator_calls import KEY, SITE, run
from torch.fx.experimental.proxy_tensor import make_fx

from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

INF, NAN = math.inf, math.nan


def test_stochastic_rounding_needs_a_key() -> None:
    x, scale, spec = torch.ones(2), torch.tensor([127, 127], dtype=torch.uint8), "int8:fit:each:stochastic:pass"
    with pytest.raises(ValueError, match=rf"^quantize: a.b: spec {spec} rounds stochastically and needs a key$"):
        ops.QUANTIZE(x, scale, None, None, spec, "c", "a.b")


@pytest.mark.parametrize("call", [ops.SCALE, lambda x, *rest: ops.QUANTIZE(x, torch.ones(1), None, None, *rest, SITE)])
def test_bad_texts_are_refused(call: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^layout: got 'bc' for 1 dimensions"):
        call(torch.ones(3), "int8:real:each:nearest:pass", "bc")
    with pytest.raises(ValueError, match=r"^spec: got 'int8'; valid: format:scale:block:rounding:vjp"):
        call(torch.ones(3), "int8", "c")


def codes_of(x: torch.Tensor, key: torch.Tensor, site: str = SITE, block: str = "tensor") -> torch.Tensor:
    """int8 codes of a [B, C, H, W] tensor, stochastically rounded at the step 2^−6."""
    spec, scale = f"int8:fit:{block}:stochastic:pass", torch.tensor(121, dtype=torch.uint8)
    scale = scale.expand(ops.SCALE(x, spec, "bcss").shape)
    return ops.QUANTIZE(x, scale, None, key, spec, "bcss", site)


def test_stochastic_rounding_follows_the_seed_the_step_and_the_site() -> None:
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    torch.manual_seed(5)
    first, second = ops.DRAW_KEY(cpu), ops.DRAW_KEY(cpu)
    torch.manual_seed(5)
    again = ops.DRAW_KEY(cpu)
    assert (first.dtype, first.shape) == (torch.int32, (2,))
    assert torch.equal(first, again)
    assert torch.equal(codes_of(x, first), codes_of(x, again))
    assert not torch.equal(first, second)
    assert not torch.equal(codes_of(x, first), codes_of(x, second))
    assert not torch.equal(codes_of(x, first), codes_of(x, first, "another site"))


def test_stochastic_rounding_depends_on_neither_memory_layout_nor_block() -> None:
    x = torch.rand(3, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    key = torch.tensor(KEY, dtype=torch.int32)
    expected = codes_of(x, key)
    padded = torch.zeros(3, 4, 7, 9)
    padded[:, :, 1:6, 2:4] = x
    variants = [x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, padded[:, :, 1:6, 2:4]]
    for variant in variants:
        assert variant.stride() != x.stride()
        assert torch.equal(codes_of(variant, key), expected)
    # where no block is partial the codes lie in memory as the values do
    assert codes_of(variants[0], key, block="b3c2s*").stride() == variants[0].stride()
    for block in ("each", "b2c3s2", "c*", "b7"):
        assert torch.equal(codes_of(x, key, block=block), expected)


def test_dequantized_values_are_unbiased() -> None:
    steps, x = 1024, torch.tensor([0.013, -0.37, 0.9, 1.0 / 3]).reshape(1, 4, 1, 1)
    keys = torch.randint(-(2**31), 2**31, (steps, 2), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    mean = torch.stack([codes_of(x, key) for key in keys]).double().mean(0)
    real = x.double() * 64
    fraction = real - real.floor()
    # z-test of the mean over steps, fixed keys: |z| > 5 has p = 5.7e-7 for each of the 4 elements
    assert torch.all((mean - real).abs() <= 5 * (fraction * (1 - fraction) / steps).sqrt())


#: name → (shape, spec, layout, type); no extent is a multiple of a vector; few, as Inductor takes seconds for each
COMPILED = {
    "subnormal": ((7, 37), "int8:fit:b2c5:nearest:pass", "bc", torch.float32),
    "all exponents": ((1031,), "int2:max:each:nearest:pass", "c", torch.float32),
    "channels last": ((3, 5, 7, 2), "uint4:max:b2c3s*:stochastic:clip", "bcss", torch.bfloat16),
    "zero point": ((3, 41), "affine16:real:c7:stochastic:pass", "bc", torch.float16),
    # edges above 8 and a last, smaller block: Inductor's loop split would drop it
    "partial": ((6, 37), "uint4:fit:c16:nearest:clip", "bc", torch.float32),
    "partial rows": ((8, 40), "int8:ceil:o24i24:nearest:pass", "oi", torch.float32),
    "float": ((5, 43), "e4m3nan:max:b2c5:nearest:clip", "bc", torch.bfloat16),
    "two-level": ((6, 37), "e2m1:two-level:c16:stochastic:clip", "bc", torch.float32),
    "radix 4": ((1031,), "e3m0r4:fit:c8:stochastic:pass", "c", torch.float32),
}


def compiled_input(name: str) -> torch.Tensor:
    """Random values with a NaN and a −0; in a style that goes with the name."""
    shape, _, _, dtype = COMPILED[name]
    random = torch.Generator().manual_seed(2)
    if name == "all exponents":
        return torch.randint(-(2**31), 2**31, shape, generator=random).to(torch.int32).view(torch.float32)
    x = torch.randn(shape, generator=random).to(dtype)
    if name == "subnormal":
        x[:4] *= 2.0**-130
        assert (x[:4].abs() < 2.0**-126).all()
    x[(0,) * x.dim()], x[(-1,) * x.dim()] = NAN, -0.0
    return x.to(memory_format=torch.channels_last) if name == "channels last" else x


def run_all(*inputs: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """For each case of COMPILED everything that the operators make of the input, with a key drawn for it."""
    results = []
    for x, (_, text, layout, dtype) in zip(inputs, COMPILED.values(), strict=True):
        spec, made = parse_spec(text), {"key": ops.DRAW_KEY(x.device), "scale": ops.SCALE(x, text, layout)}
        if spec.has_zero_point:
            made["zero"] = ops.ZERO_POINT(x, made["scale"], text, layout)
        zero = made.get("zero")
        made["codes"] = ops.QUANTIZE(x, made["scale"], zero, made["key"], text, layout, SITE)
        made["values"] = ops.DEQUANTIZE(made["codes"], made["scale"], zero, text, layout, dtype)
        if spec.vjp == "clip":
            made["in_range"] = ops.IN_RANGE(x, made["scale"], text, layout)
            made["packed"] = ops.PACK(made["codes"], spec.format.bits)
            made["unpacked"] = ops.UNPACK(made["packed"], list(x.shape), spec.format.bits, False)
            made["again"] = ops.DEQUANTIZE(made["unpacked"], made["scale"], zero, text, layout, dtype)
        results.append(made)
    return results


@pytest.fixture(scope="module")
def eager_and_compiled() -> list[dict[str, dict[str, torch.Tensor]]]:
    """The results of run_all by the operators, and by Inductor from their decompositions, from the same seed."""
    inputs = [compiled_input(name) for name in COMPILED]
    graph = make_fx(run_all, decomposition_table=ops.DECOMPOSITIONS, tracing_mode="fake")(*inputs)
    left = {str(node.target) for node in graph.graph.nodes if str(node.target).startswith("qcompiler")}
    assert left == {"qcompiler.draw_key.default"}
    results = []
    for function in (run_all, torch.compile(graph, fullgraph=True)):
        torch.manual_seed(17)
        results.append(dict(zip(COMPILED, function(*inputs), strict=True)))
    return results


@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.sample(3)
def test_compiled_code_gives_the_same_bits(
    oracle: ModuleType, array: Callable, case: str, eager_and_compiled: list[dict[str, dict[str, torch.Tensor]]]
) -> None:
    eager, compiled = (results[case] for results in eager_and_compiled)
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        assert oracle.same(array(compiled[name]), array(value)), name


@pytest.mark.parametrize("pair", ["int4:fit", "uint16:real", "affine8:real", "e4m3:fit", "e2m1:two-level", "e5m10:one"])
def test_fake_tensors_have_the_types_and_shapes_of_real_ones(pair: str) -> None:
    x, spec = torch.randn(5, 6), f"{pair}:b2c4:stochastic:pass"
    scale, zero, codes, _ = run(x, spec, "bc", torch.float32)
    key = torch.tensor(KEY, dtype=torch.int32)
    calls: list[tuple[Any, tuple]] = [
        (ops.SCALE, (x, spec, "bc")),
        (ops.QUANTIZE, (x, scale, zero, key, spec, "bc", SITE)),
        (ops.DEQUANTIZE, (codes, scale, zero, spec, "bc", torch.bfloat16)),
        (ops.IN_RANGE, (x, scale, spec, "bc")),
        (ops.PACK, (torch.ones(5, 6, dtype=torch.int8), 4)),
        (ops.UNPACK, (torch.ones(5, 3, dtype=torch.uint8), [5, 6], 4, True)),
    ]
    if zero is not None:
        calls.append((ops.ZERO_POINT, (x, scale, spec, "bc")))
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.DRAW_KEY, (x.device,), test_utils=("test_faketensor",))
