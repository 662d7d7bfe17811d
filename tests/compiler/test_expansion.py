"""What Inductor gets from calls that are traced once a kind: tracing the whole graph is the oracle."""

import math
import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Node, map_aggregate
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import qcompiler
from qcompiler.compiler import torch_compat
from qcompiler.compiler.expansion import expand_graph
from qcompiler.passes.ir.edit import list_outputs
from qcompiler.passes.ir.meta import find_value, get_value
from qcompiler.runtime import ops
from qcompiler.runtime.execute.interpret import make_runner

SPEC = "int8:max:b2c4:nearest:pass"
STOCHASTIC = "int8:max:b2c4:stochastic:pass"
KEY = torch.tensor([3, 5], dtype=torch.int32)
#: decompositions of softmax and of its gradient round 16 times, each by half a unit in the last place at most
ROUNDED = 16 * 2.0**-24
aten = torch.ops.aten


class Checkpointed(nn.Module):
    """Regions with dropout, which keep a random state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: nn.functional.dropout(layer(x).relu(), 0.5), x, use_reentrant=False)
        return x


class Conditional(nn.Module):
    """Operators that run graphs of their own: of two conditions with branches of the same names, and of two scores."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.first(x)
        for factor in (2.0, 3.0):
            y = torch.cond(y.sum() > 0, lambda y, f=factor: y.sin() * f, lambda y, f=factor: y.cos() * f, (y,))
        heads = y[None, None]
        for factor in (0.5, 0.25):
            heads = flex_attention(heads, heads, heads, score_mod=lambda s, b, h, i, j, f=factor: s + (i - j) * f)
        return self.last(heads[0, 0])


def trace_whole(module, inputs, mode):
    with mode, torch.no_grad(), inductor_config.patch(fallback_random=True):
        table = {**select_decomp_table(), **ops.DECOMPOSITIONS}
        return fx_graph_cse(make_fx(module, decomposition_table=table, tracing_mode="real")(*inputs).graph)


def describe(graph):
    """The outputs as expressions of the inputs, their forms, and how often each operator is called."""
    texts = {}
    graph.eliminate_dead_code()
    for place, node in enumerate(graph.nodes):
        named = sorted(node.kwargs.items())
        call = map_aggregate((node.args, tuple(named)), lambda leaf: texts[leaf] if isinstance(leaf, Node) else leaf)
        texts[node] = (
            f"input {place}"
            if node.op == "placeholder"
            else hash((str(node.target), repr(call).replace("(", "[").replace(")", "]")))
        )
    outputs = [node for node in list_outputs(graph) if isinstance(node, Node)]
    forms = [(get_value(node).shape, get_value(node).stride(), get_value(node).dtype) for node in outputs]
    kinds = Counter(node.target for node in graph.nodes if node.op == "call_function")
    for target in (operator.getitem, aten.scalar_tensor.default):  # a whole trace reads results that nobody needs
        kinds.pop(target, None)
    return [texts[node] for node in outputs], forms, kinds


@pytest.fixture
def interpreted(monkeypatch):
    """What Inductor gets is run node by node."""
    monkeypatch.setattr(torch_compat, "compile_inductor", lambda module, *args, **options: make_runner(module))


@pytest.fixture
def retraced(monkeypatch, interpreted):
    """Pairs of (graph that Inductor gets, the same by a whole trace)."""
    found, retrace = [], torch_compat.retrace_graph

    def run(module, inputs, mode):
        plain = retrace(module, inputs, mode)
        found.append((plain.graph, trace_whole(module, inputs, mode)))
        return plain

    monkeypatch.setattr(torch_compat, "retrace_graph", run)
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ["hyperblock-int8", "hyperblock-int4", "in-hindsight-w8a8g8", "tensor-int8"])
@pytest.mark.parametrize("name", ["resnet20", "vit", "gpt", "dropout", "checkpointed"])
def test_calls_become_what_a_whole_trace_makes(name, recipe, models, retraced):
    torch.manual_seed(0)
    model = Checkpointed() if name == "checkpointed" else models.CASES[name].build()
    inputs = (torch.randn(6, 12),) if name == "checkpointed" else models.CASES[name].inputs()
    execution = "auto" if recipe == "tensor-int8" else "simulate"
    qmodel = qcompiler.compile(model, recipe, backend="inductor", execution=execution)
    for _ in range(2):  # ranges in hindsight start with steps of their own
        qmodel(*inputs).sin().sum().backward()
    assert len(retraced) >= 2
    for graph, whole in retraced:
        assert describe(graph) == describe(whole)
        assert all(node.name == f"arg{place}_1" for place, node in enumerate(graph.find_nodes(op="placeholder")))


@pytest.mark.parametrize("recipe", ["identity", "tensor-int8"])
@pytest.mark.sample(1)
def test_operators_that_run_graphs(recipe, interpreted):
    torch.manual_seed(0)
    model, x = Conditional(), torch.randn(8, 16)
    compiled = qcompiler.compile(model, recipe, backend="inductor")
    eager = qcompiler.compile(model, recipe, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), eager(x))


class Random(nn.Module):
    """Draws by operators that have decompositions of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        y = F.rrelu(F.dropout(self.first(x), 0.3), training=True)
        y = F.scaled_dot_product_attention(y[None], y[None], y[None], dropout_p=0.2)[0]
        return self.last(F.dropout(F.gumbel_softmax(y), 0.6) + torch.empty_like(y).exponential_())


def test_random_numbers_are_those_of_torch(interpreted):
    """The same numbers for one seed, and the same generator afterwards."""
    found = []
    for recipe in (None, "identity"):
        torch.manual_seed(0)
        model, x = Random(), torch.randn(6, 12)
        step = model if recipe is None else qcompiler.compile(model, recipe, backend="inductor")
        step(x).sin().sum().backward()
        found.append(([parameter.grad for parameter in model.parameters()], torch.get_rng_state()))
    (expected, state), (gradients, own_state) = found
    assert torch.equal(state, own_state)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= ROUNDED * theirs.norm()


class Island(nn.Module):
    """Layers of the type of the caller, and a part in float32."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        y = self.first(x).relu()
        with torch.autocast("cpu", enabled=False):
            return y, self.last(y.float()).softmax(-1), y.float() @ x.t()


@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8"])
def test_a_part_without_autocast(recipe, interpreted):
    torch.manual_seed(0)
    model, x = Island(), torch.randn(6, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        outputs = qcompiler.compile(model, recipe, backend="inductor")(x)
    assert [y.dtype for y in outputs] == [torch.bfloat16, torch.float32, torch.float32]
    if recipe == "identity":
        for ours, theirs in zip(outputs, expected, strict=True):
            assert (ours - theirs).float().norm() <= ROUNDED * theirs.float().norm()
    sum(y.float().sum() for y in outputs).backward()


def expand(compute, *tensors):
    """The graph of a function as Inductor gets it, and by a whole trace."""
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(tensor) for tensor in tensors]
    module = make_fx(compute)(*tensors)
    return torch_compat.retrace_graph(module, fakes, mode), trace_whole(module, fakes, mode)


def quantize(x, key, site):
    scale = ops.SCALE(x, SPEC, "bc")
    return ops.QUANTIZE(x, scale, None, key, STOCHASTIC if key is not None else SPEC, "bc", site)


def add_scaled(x, y, alpha):
    return aten.add.Tensor(x, y, alpha=alpha)


@pytest.mark.parametrize(
    ("target", "compute", "kinds"),
    [
        (aten.gelu.default, lambda x, y: (aten.gelu(x), aten.gelu(y)), 1),
        (aten.gelu.default, lambda x, y: (aten.gelu(x), aten.gelu(y, approximate="tanh")), 2),
        (aten.gelu.default, lambda x, y: (aten.gelu(x), aten.gelu(y.t())), 2),
        (aten.gelu.default, lambda x, y: (aten.gelu(x), aten.gelu(y.double())), 2),
        (aten.gelu.default, lambda x, y: (aten.gelu(x[:, :4]), aten.gelu(y[:, 4:])), 2),
        (aten.mul.Tensor, lambda x, y: (x * x, x * y, y * x, y * y), 2),
        (aten.add.Tensor, lambda x, y: (add_scaled(x, y, 2), add_scaled(x, y, 2.0)), 2),
        (aten.add.Tensor, lambda x, y: (add_scaled(x, y, 0.0), add_scaled(x, y, -0.0), add_scaled(y, x, -0.0)), 2),
        (aten.add.Tensor, lambda x, y: (add_scaled(x, y, math.nan), add_scaled(x, y, math.nan)), 1),
        (aten.cat.default, lambda x, y: (torch.cat([x, y]), torch.cat([y, x]), torch.cat([x, y], 1)), 2),
        (aten.cat.default, lambda x, y: (torch.cat([x, x]), torch.cat([x, y])), 2),
        (aten.var_mean.correction, lambda x, y: [*torch.var_mean(x, 1), *torch.var_mean(y, 1)], 1),
        (aten.split.Tensor, lambda x, y: [*x.split(3), *y.split(3)], 1),
        (ops.QUANTIZE, lambda x, y: (quantize(x, None, "a"), quantize(y, None, "b")), 1),
        (ops.QUANTIZE, lambda x, y: (quantize(x, KEY, "a"), quantize(y, KEY, "b")), 2),
        (ops.QUANTIZE, lambda x, y: (quantize(x, KEY, "a"), quantize(y, KEY, "a")), 1),
    ],
)
def test_kinds_of_calls(target, compute, kinds):
    """A call is of another kind if anything but numbers in tensors differs; the site too, if random bits are drawn."""
    torch.manual_seed(0)
    tensors = torch.randn(8, 8), torch.randn(8, 8), KEY
    mode, traced = FakeTensorMode(), []

    def trace(run, values):
        traced.append(run)
        with mode:
            return make_fx(run, tracing_mode="real")(*[value.detach() for value in values])

    module = make_fx(lambda x, y, key: compute(x, y))(*tensors)
    fakes = [mode.from_tensor(tensor) for tensor in tensors]
    graph, attributes = expand_graph(module, fakes, mode, trace, lambda one: one is not target)
    assert len(traced) == kinds
    expanded = GraphModule(attributes, graph)
    for ours, theirs in zip(expanded(*tensors), compute(*tensors[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    for node in list_outputs(graph):
        assert isinstance(get_value(node), FakeTensor)


def test_without_inputs():
    plain, whole = expand(lambda: (aten.full([2, 3], 1.5), aten.gelu(aten.ones([2, 3]))))
    assert describe(plain.graph) == describe(whole)


def test_values_of_views_share_memory():
    plain, _ = expand(lambda x, y: (aten.t(x), aten.gelu(aten.t(y))), torch.randn(4, 8), torch.randn(4, 8))
    first = plain.graph.find_nodes(op="placeholder")[0]
    (view,) = [node for node in first.users if node.op == "call_function"]
    assert get_value(view).untyped_storage()._cdata == get_value(first).untyped_storage()._cdata
    assert all(find_value(node) is not None for node in plain.graph.nodes if node.op == "call_function")
