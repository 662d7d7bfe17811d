"""Ranges of the past through Inductor: how often a tensor is read, and first steps whose halves are not compiled."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import qcompiler
from qcompiler.compiler import torch_compat
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.spec import parse_spec

pytestmark = pytest.mark.usefixtures("fresh")


def quantizer(text, layout):
    """What the passes write for one tensor: f(x, state) → codes, scale, and with a state the one after it."""
    estimator = parse_spec(text).range

    def run(x, state):
        if not estimator.has_state:
            scale = ops.SCALE(x, text, layout)
            return ops.QUANTIZE(x, scale, None, None, text, layout, "x"), scale
        scale = ops.SCALE(x, text, layout, state, False)
        codes = ops.QUANTIZE(x, scale, None, None, text, layout, "x")
        return codes, ops.CHECKED(scale, x, text, layout), ops.UPDATE(x, state, text, layout, False)

    return run


def compiled_code(text, layout, *shape):
    """The C++ that Inductor writes for `quantizer`."""
    spec = parse_spec(text)
    x = torch.randn(shape)
    state = torch.ones(spec.range.state_shape(view_blocks(shape, layout, spec.block).counts) or (1,))
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x), mode.from_tensor(state)]
    plain = torch_compat.retrace_graph(make_fx(quantizer(text, layout))(x, state), fakes, mode)
    half = torch_compat.compile_inductor
    result, (code,) = run_and_get_code(
        lambda: half(plain, fakes, is_backward=False, is_inference=True, static_inputs=(), fixed_outputs=0)([x, state])
    )
    for got, expected in zip(result, quantizer(text, layout)(x, state), strict=True):
        assert torch.equal(got, expected)
    return code


def readers(code, argument="arg0_1"):
    """How many loop nests, over all kernels, read one argument: the blocks in braces of a kernel that name it."""
    kernels = dict(re.findall(r"(cpp_fused\w*) = async_compile\.cpp_pybinding\(.*?r'''(.*?)'''", code, re.DOTALL))
    count = 0
    for name, given in re.findall(r"^\s*(cpp_fused\w*)\((.*)\)", code[code.index("def call") :], re.MULTILINE):
        signature = re.search(r"void\s+\w+\((.*?)\)\s*\{", kernels[name], re.DOTALL)
        names = [parameter.split()[-1].lstrip("*") for parameter in signature[1].split(",")]
        pointers = [mine for mine, theirs in zip(names, given.split(", "), strict=True) if theirs == argument]
        depth, block = 0, ""
        for letter in kernels[name][signature.end() :]:
            depth += (letter == "{") - (letter == "}")
            block += letter
            if letter == "}" and depth == 0:
                count += any(re.search(rf"\b{pointer}\b", block) for pointer in pointers)
                block = ""
    return count


@pytest.mark.parametrize(
    ("estimator", "block", "loops"),
    [
        ("hindsight(0.9,0.01)", "tensor", 1),
        ("history(16,3,2)", "tensor", 1),
        ("large(0.001,0.001,0.9)", "tensor", 1),
        # what is searched in the tensor itself must be known before its first code
        ("running(0.9)", "tensor", 2),
        ("current", "tensor", 2),
        # the maxima of channels and the codes go through memory in two orders, which the C++ backend does not fuse
        ("hindsight(0.9,0.01)", "b*s*g*", 2),
    ],
)
@pytest.mark.sample(2)
def test_a_range_of_the_past_takes_one_pass_over_the_tensor(estimator, block, loops):
    text = str(parse_spec(f"int8:fit:{block}:nearest:pass:{estimator}"))
    assert readers(compiled_code(text, "bcss", 4, 32, 8, 8)) == loops


def test_a_first_step_may_return_other_strides():
    """Inductor makes convolutions channels-last; the halves of a first step, which are not compiled, do not.

    Ranges of activations only: backward has no first step of its own. The cosine seeks its range anew in each third
    step, so that compiled and interpreted forwards alternate. Sums of codes times a power of two are exact in float32.
    """
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False))
    x = torch.randn(2, 3, 8, 8)
    recipe = Recipe(
        name="exact",
        rules=(
            Rule(role=Role.ACTIVATION, spec=parse_spec("int4:fit:tensor:nearest:pass:cosine(3,20)")),
            Rule(spec=parse_spec("int4:fit:tensor:nearest:pass")),
        ),
    )
    runs = []
    for backend in ("eager", "inductor"):
        compiled = qcompiler.compile(model, recipe, backend=backend)
        results = []
        for step in range(5):
            model.zero_grad()
            y = compiled((1 + step) * x)
            y.backward(torch.arange(y.numel()).view(y.shape) % 7 - 3.0)
            results += [y, *(p.grad.clone() for p in model.parameters()), *compiled.ranges().values()]
        assert compiled.plan().notes == ()
        runs.append(results)
    assert all(map(torch.equal, *runs))
