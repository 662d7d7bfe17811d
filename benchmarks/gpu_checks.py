"""Checks of benchmarks/gpu.py: what is promised bit for bit, on the device against the CPU."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from gpu_section import Row, Setting, Task
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import qcompiler
from qcompiler.compiler.torch_compat import compile_inductor, retrace_graph
from qcompiler.runtime import ops, references
from qcompiler.runtime.kernels.kernel import Facts, Kernel
from qcompiler.runtime.kernels.runs import sum_runs
from qcompiler.runtime.kernels.table import KERNELS, RUN_KERNELS
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.spec import parse_spec

#: rows, length, columns: blocks on their edges, and rests on every axis
_SHAPES: Final = ((64, 128, 72), (130, 520, 200))
_RUNS: Final = ((64, 128, 72, 32), (70, 300, 90, 48), (33, 1000, 65, 128))
#: quantizers in one pass
_BLOCKS: Final = (
    "int8:max:b2c8o4i4:nearest:pass",
    "int4:fit:b2c8o4i4:stochastic:pass",
    "int8:real:b1c16:stochastic:pass",
)
#: quantizers in plain torch code, each kind of format and scale
_FORMATS: Final = (
    *_BLOCKS,
    "affine8:real:tensor:stochastic:pass",
    "int8:two-level:c16:nearest:pass",
    "e4m3:max:b1c32:nearest:pass",
    "e2m1:fit:b1c16:stochastic:pass",
)
_KEY: Final = torch.tensor([123456789, -987654321], dtype=torch.int32)
_NUMBERS: Final = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 2.0**-126, 3.4e38, 0.5, 1.5, -2.5])


def list_checks(setting: Setting) -> list[Task]:
    """Return every check; the first ones are those of single kernels."""
    products = [
        Task(f"sums of {one.name}", functools.partial(_check_sums, one))
        for one in KERNELS
        if one.device == setting.device
    ]
    runs = [
        Task(f"sums of {one.name}", functools.partial(_check_runs, one))
        for one in RUN_KERNELS
        if one.device == setting.device
    ]
    quantizers = [Task(f"one pass: {spec}", functools.partial(_check_quantizer, spec)) for spec in _BLOCKS]
    plain = [Task(f"plain code: {spec}", functools.partial(_check_references, spec)) for spec in _FORMATS]
    steps = [
        Task("step of tensor-int8", functools.partial(_check_step, "tensor-int8", ("simulate", "integer"), True)),
        Task("step of hyperblock-int8", functools.partial(_check_step, "hyperblock-int8", ("simulate",), False)),
        Task(
            "step of in-hindsight-w8a8g8", functools.partial(_check_step, "in-hindsight-w8a8g8", ("simulate",), False)
        ),
    ]
    return [*products, *runs, *quantizers, *plain, *(steps[:1] if setting.tiny else steps)]


def _report(different: Iterable[str]) -> Row:
    names = list(different)
    return {"passed": not names, "detail": f"different: {', '.join(names)}" if names else "all bits are equal"}


def find_reason(kernel: Kernel[Any], run: int) -> str:
    """Return why a kernel cannot compute a product on this machine; empty: it can."""
    form = parse_format("int8")
    return kernel.explain(Facts(device=kernel.device, formats=(form, form), rows=64, length=128, columns=64, run=run))


def _draw_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def _turn(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.t().contiguous().t() if turned else matrix


def _check_sums(kernel: Kernel[Any], setting: Setting) -> Row:
    """Both memory orders of both operands against exact sums."""
    if reason := find_reason(kernel, 0):
        return {"passed": None, "detail": reason}
    different = []
    for (rows, length, columns), *turned in itertools.product(_SHAPES, (False, True), (False, True)):
        a, b = _draw_codes(rows, length), _draw_codes(length, columns)
        exact = (a.to(torch.int64) @ b.to(torch.int64)).to(torch.int32)
        left, right = (_turn(one.to(setting.device), order) for one, order in zip((a, b), turned, strict=True))
        if not torch.equal(kernel.call(left, right).cpu(), exact):
            different.append(f"{rows}×{length}×{columns}, turned {turned}")
    return _report(different)


def _check_runs(kernel: Kernel[Any], setting: Setting) -> Row:
    """Ragged shapes and edges, both memory orders, against the reference on the CPU."""
    if reason := find_reason(kernel, 32):
        return {"passed": None, "detail": reason}
    different = []
    for (rows, length, columns, run), *turned in itertools.product(_RUNS, (False, True), (False, True)):
        a, b = _draw_codes(rows, length), _draw_codes(length, columns)
        generator = torch.Generator().manual_seed(run)
        factors = [torch.rand(-(-n // 32), -(-length // run), generator=generator) for n in (rows, columns)]
        left, right = (_turn(one.to(setting.device), order) for one, order in zip((a, b), turned, strict=True))
        of_rows, of_columns = (one.to(setting.device) for one in factors)
        found = kernel.call(left, of_rows, 32, right, of_columns, 32, run).cpu()
        if not torch.equal(found, sum_runs(a, factors[0], 32, b, factors[1], 32, run)):
            different.append(f"{rows}×{length}×{columns} in runs of {run}, turned {turned}")
    return _report(different)


def _draw_image(setting: Setting) -> Tensor:
    """Return numbers of very different sizes, and special ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 19, 6, 7) if setting.tiny else (33, 70, 14, 15)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-4, 4, shape, generator=generator)
    x.view(-1)[torch.randint(x.numel(), (len(_NUMBERS),), generator=generator)] = _NUMBERS
    return x


def _are_same(found: Tensor, expected: Tensor) -> bool:
    """Return True for equal bits; a NaN is a NaN."""
    found = found.cpu()
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    found, expected = (torch.where(one.isnan(), torch.nan, one).contiguous() for one in (found, expected))
    return torch.equal(found.view(torch.int32), expected.view(torch.int32))


def quantize_plainly(spec: str, x: Tensor, key: Tensor | None) -> dict[str, Tensor]:
    """Return what the references compute on the device of the tensor."""
    scale = references.scale(x, spec, "bcss")
    zero = references.zero_point(x, scale, spec, "bcss") if parse_spec(spec).has_zero_point else None
    codes = references.quantize(x, scale, zero, key, spec, "bcss", "site")
    floats = references.dequantize(codes, scale, zero, spec, "bcss", torch.float32)
    return {"scale": scale, "codes": codes, "floats": floats}


def trace_plainly(spec: str, x: Tensor, key: Tensor) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Return the same as a function of [x, key], as Inductor compiles it within a step."""
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(one, static_shapes=True) for one in (x, key)]

    def compute(x: Tensor, own_key: Tensor) -> tuple[Tensor, ...]:
        return tuple(quantize_plainly(spec, x, own_key if "stochastic" in spec else None).values())

    graph = retrace_graph(make_fx(compute, tracing_mode="fake")(x, key), fakes, mode)
    options: dict[str, Any] = {"is_backward": False, "is_inference": True, "static_inputs": (), "fixed_outputs": None}
    return compile_inductor(graph, fakes, **options)


def _quantize_compiled(spec: str, x: Tensor, key: Tensor | None) -> dict[str, Tensor]:
    given = torch.zeros_like(_KEY, device=x.device) if key is None else key
    return dict(zip(("scale", "codes", "floats"), trace_plainly(spec, x, given)([x, given]), strict=True))


def _list_different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name, value in expected.items() if not _are_same(found[name], value)]


def _check_quantizer(spec: str, setting: Setting) -> Row:
    """The operator that kernels compute, in both memory orders, against the references on the CPU."""
    x, key = _draw_image(setting), _KEY if "stochastic" in spec else None
    expected, different = quantize_plainly(spec, x, key), []
    for order in (torch.contiguous_format, torch.channels_last):
        given = x.to(setting.device, memory_format=order)
        own_key = None if key is None else key.to(setting.device)
        codes, floats, scale = ops.QUANTIZE_BLOCKS(given, own_key, spec, "bcss", "site", True, True)
        found = {"scale": scale, "codes": codes, "floats": floats}
        known = ops.QUANTIZE_BY(given, scale.contiguous(), None, own_key, spec, "bcss", "site", True, True, False)
        different += [f"{name}, {order}" for name in _list_different(found, expected)]
        again = dict(zip(("codes", "floats"), known, strict=True))
        different += [
            f"{name} by a known scale, {order}" for name in again if not _are_same(again[name], expected[name])
        ]
    return _report(different)


def _check_references(spec: str, setting: Setting) -> Row:
    """Plain torch code on the device, node by node and (but for tests) compiled, against the CPU."""
    x, key = _draw_image(setting), _KEY if "stochastic" in spec else None
    expected, different = quantize_plainly(spec, x, key), []
    own_key = None if key is None else key.to(setting.device)
    ways: dict[str, Any] = {"node by node": quantize_plainly}
    if not setting.tiny:
        ways["compiled"] = _quantize_compiled
    for name, way in ways.items():
        found = way(spec, x.to(setting.device), own_key)
        different += [f"{what}, {name}" for what in _list_different(found, expected)]
    return _report(different)


def _run_steps(recipe: str, device: str, backend: str, execution: str) -> dict[str, Tensor]:
    """Return the results and gradients of two steps."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = ((64, 64), (64, 128), (128, 64))
    model = nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(*size, bias=False), nn.ReLU())))
    x = torch.randn(32, 64).to(device).requires_grad_()
    compiled = qcompiler.compile(model.to(device), recipe, backend=backend, execution=execution)
    found: dict[str, Tensor] = {}
    for step in range(2):
        output = compiled(x)
        output.square().sum().backward()
        found |= {f"result {step}": output.detach(), f"gradient of the input {step}": x.grad.clone()}
        found |= {f"gradient of {name} {step}": one.grad.clone() for name, one in compiled.named_parameters()}
    return {name: value.cpu() for name, value in found.items()}


def _check_step(recipe: str, executions: tuple[str, ...], is_exact: bool, setting: Setting) -> Row:
    """Eager against Inductor; and against the CPU, if float32 holds every sum of the recipe, in any order.

    Of other recipes a difference is no failure: two kernels of floats may sum in two orders.
    """
    first = _run_steps(recipe, "cpu" if is_exact else setting.device, "eager", "simulate")
    different = []
    for backend, execution in itertools.product(("eager", "inductor"), executions):
        found = _run_steps(recipe, setting.device, backend, execution)
        different += [f"{name}, {backend}, {execution}" for name in _list_different(found, first)]
    row = _report(different)
    return row if is_exact or row["passed"] else {**row, "passed": None}
