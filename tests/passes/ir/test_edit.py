"""The plumbing: names, tags, views, inserted calls, text."""

import glob
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from qcompiler.passes.ir.edit import check_order, finish_graph, insert_call, insert_input, last_placeholder
from qcompiler.passes.ir.facts import Contraction, Input, InputKind, Operand
from qcompiler.passes.ir.inference import fake_mode
from qcompiler.passes.ir.meta import (
    get_contraction,
    get_input,
    get_value,
    has_value,
    is_backward,
    is_pinned_saved,
    iterate_contractions,
    module_path,
    pin_saved,
    pin_to_backward,
    record_operand,
    sequence_number,
    set_fact,
)
from qcompiler.passes.ir.source_names import clean_path
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import aten, is_view, view_root
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


@pytest.fixture
def linear(joint):
    """The joint graph of a linear layer inside a Sequential."""
    return joint(nn.Sequential(nn.Linear(4, 3)), leaf(2, 4)).module


def find(module, name):
    return next(node for node in module.graph.nodes if node.name == name)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['layer1']._modules['0']", "layer1.0"),
        ("L['self']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['self']._buffers['mean']", "mean"),
        ("L['self'].layer1[0].conv", "layer1.0.conv"),
        ("L['self'].blocks[\"a\"]", "blocks.a"),
        ("G['model'].fc", "fc"),
        ("L['self']", ""),
        ("L['x']", ""),
        ("", ""),
        ("d.x]y", "d.x]y"),
        (r"L['self'].d.back\\slash[0].fc", r"d.back\slash.0.fc"),
        (r"L['self']._modules['both\'\"']._parameters['weight']", "both'\".weight"),
        ("getattr(getattr(L['self'].l, \"it's\"), 'x]y').a", "l.it's.x]y.a"),
    ],
)
def test_clean_path(source, path):
    assert clean_path(source) == path


def test_names_are_those_of_named_modules(eager):
    """Whatever the keys are, a plan has the names that rules and state_dicts have."""
    keys = ["it's", 'q"t', "x]y", "[0]", "x[", r"back\slash", "both'\"", "f(a, b)", "d['x']", "sp ace", "{br}", "é"]

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.d = nn.ModuleDict({key: nn.Linear(2, 2) for key in keys})
            for key in keys:
                self.add_module(key, nn.Linear(2, 2))

        def forward(self, x):
            for key in keys:
                x = getattr(self, key)(self.d[key](x))
            return x

    model = Odd()
    rules = tuple(
        Rule(spec=parse_spec("int8:real:tensor:nearest:pass"), module=glob.escape(f"d.{key}"), role=Role.WEIGHT)
        for key in keys
    )
    torch._dynamo.reset()
    qmodel = eager(model, Recipe(name="odd", rules=rules))
    qmodel(torch.randn(2, 2)).sum().backward()
    plan = qmodel.plan()
    assert {site.name for site in plan.sites} == {f"d.{key}/weight" for key in keys}
    assert not [note for note in plan.notes if "matched nothing" in note]
    assert {kept.name.rpartition("/")[0] for kept in plan.kept} >= {*keys}
    torch._dynamo.reset()


def test_placeholders_have_the_names_of_the_user(joint):
    model = nn.Sequential(nn.ModuleDict({"part": nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))})["part"])
    captured = joint(model, leaf(3, 2, 4))
    facts = [get_input(node) for node in captured.module.graph.find_nodes(op="placeholder")]
    assert facts[: len(captured.inputs)] == [*captured.inputs]
    found = {(fact.kind, fact.name) for fact in facts}
    assert found == {
        (InputKind.PARAMETER, "0.0.weight"),
        (InputKind.PARAMETER, "0.0.bias"),
        (InputKind.PARAMETER, "0.1.weight"),
        (InputKind.PARAMETER, "0.1.bias"),
        (InputKind.BUFFER, "0.1.running_mean"),
        (InputKind.BUFFER, "0.1.running_var"),
        (InputKind.BUFFER, "0.1.num_batches_tracked"),
        (InputKind.INPUT, "0"),
        (InputKind.TANGENT, "output 0"),
    }


def test_forward_nodes_know_their_module_and_share_a_number_with_their_gradient(linear):
    product, gradient = find(linear, "addmm"), find(linear, "mm")
    assert (module_path(product), module_path(find(linear, "primals_1"))) == ("0", "")
    assert sequence_number(product) == sequence_number(gradient) is not None


class Halves(torch.autograd.Function):
    """Its backward is traced by Dynamo, not by autograd."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return (grad.exp() * 2).relu()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13, of itself
def test_what_descends_from_a_tangent_is_backward(joint, function):
    captured = joint(function(lambda m, x: Halves.apply(x.tanh())), leaf(2, 2))
    tags = {node.name: is_backward(node) for node in captured.module.graph.nodes if node.op == "call_function"}
    assert tags["tanh"] is tags["mul"] is False
    assert tags["exp"] is tags["mul_1"] is tags["relu"] is tags["tanh_backward"] is True


def test_facts(linear):
    node = find(linear, "addmm")
    operands = tuple(Operand(arg, Role.ACTIVATION, "x", "bc", "c", 4) for arg in (1, 2))
    fact = Contraction("0", "0", "linear", frozenset(), operands)
    assert get_contraction(node) is None
    set_fact(node, fact)
    assert get_contraction(node) is fact
    assert get_input(node) is None
    assert [*iterate_contractions(linear.graph)] == [(node, fact)]
    record_operand(node, 2, kept="why", rule=3)
    first, second = get_contraction(node).operands
    assert (first.kept, first.rule, second.kept, second.rule) == ("", None, "why", 3)


def test_a_placeholder_is_never_a_contraction(linear):
    # the partitioner copies meta to the placeholders of the backward half
    node = last_placeholder(linear.graph)
    set_fact(node, Contraction("0", "0", "linear", frozenset(), ()))
    assert get_contraction(node) is None
    assert [*iterate_contractions(linear.graph)] == []


@pytest.mark.parametrize(
    ("target", "args", "view"),
    [
        (aten.view.default, ([6],), True),
        (aten.reshape.default, ([3, 2],), True),
        (aten._unsafe_view.default, ([6],), True),
        (aten.t.default, (), True),
        (aten.permute.default, ([1, 0],), True),
        (aten.transpose.int, (0, 1), True),
        (aten.unsqueeze.default, (0,), True),
        (aten.clone.default, (), True),
        (aten.detach.default, (), True),
        (aten.expand.default, ([1, 2, 3],), True),
        (aten.expand.default, ([2, 2, 3],), False),  # more elements than before
        (aten.relu.default, (), False),
        (aten.select.int, (0, 1), False),
        (aten._to_copy.default, (), False),  # it may change the type
    ],
)
def test_is_view(target, args, view):
    graph = Graph()
    source = graph.placeholder("x")
    source.meta["val"] = torch.zeros(2, 3)
    node = graph.call_function(target, (source, *args))
    node.meta["val"] = target(torch.zeros(2, 3), *args)
    assert is_view(node) is view
    assert view_root(node) is (source if view else node)
    assert not is_view(source)


def test_view_root_passes_a_chain(joint, function):
    module = joint(function(lambda m, x: x.relu().t().reshape(6).view(3, 2).exp()), leaf(2, 3)).module
    (last,) = module.graph.find_nodes(op="call_function", target=aten.exp.default)
    assert view_root(last.args[0]).target is aten.relu.default
    assert view_root(last) is last


def test_insert_behind_an_input_comes_behind_all_inputs(linear):
    node = insert_call(linear.graph, aten.t.default, (find(linear, "primals_1"),), after=find(linear, "primals_1"))
    assert node.prev is last_placeholder(linear.graph)
    assert (get_value(node).shape, node.meta["partitioner_tag"]) == ((4, 3), "is_forward")


def test_an_inserted_call_belongs_to_the_half_of_its_place_or_arguments(linear):
    product, gradient = find(linear, "addmm"), find(linear, "mm")
    half = {
        "behind forward": insert_call(linear.graph, aten.exp.default, (product,), after=product),
        "before backward": insert_call(linear.graph, aten.exp.default, (product,), before=gradient),
        "of a gradient": insert_call(linear.graph, aten.exp.default, (gradient,), after=gradient),
        "behind backward": insert_call(linear.graph, aten.exp.default, (product,), after=gradient),
    }
    expected = {"behind forward": False, "before backward": True, "of a gradient": True, "behind backward": False}
    assert {name: is_backward(node) for name, node in half.items()} == expected


def test_an_inserted_call_is_a_call_of_its_layer(linear):
    product = find(linear, "addmm")
    node = insert_call(linear.graph, aten.full.default, ([2], 0.5), {"dtype": torch.bfloat16}, before=product)
    assert (node.next, get_value(node).dtype) == (product, torch.bfloat16)
    assert (module_path(node), sequence_number(node)) == ("0", sequence_number(product))


def test_pins(linear):
    node = find(linear, "addmm")
    assert (is_backward(node), is_pinned_saved(node)) == (False, False)
    pin_saved(node)
    pin_to_backward(node)
    assert (is_backward(node), is_pinned_saved(node)) == (True, True)


def test_has_value(linear):
    node = find(linear, "addmm")
    assert has_value(node)
    del node.meta["val"]
    assert not has_value(node)


def test_a_graph_without_values_has_no_mode():
    graph = Graph()
    graph.placeholder("x")
    with pytest.raises(ValueError, match=r"^graph: no node holds a fake tensor; capture it through torch.compile"):
        fake_mode(graph)


def test_finish_drops_what_nothing_reads(linear):
    insert_call(linear.graph, aten.exp.default, (find(linear, "addmm"),), after=find(linear, "addmm"))
    assert "exp" in graph_text(linear)
    finish_graph(linear)
    assert "exp" not in graph_text(linear)
    assert "exp" not in linear.code


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_node_reads_what_stands_above(is_listed):
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.exp, (x,))
    second = graph.call_function(torch.cat, ([x, first],) if is_listed else (first,))
    graph.output((second,))
    check_order(graph)
    second.append(first)
    with pytest.raises(RuntimeError, match="'exp' of Node 'cat' was used before it has been defined"):
        check_order(graph)


def test_a_node_of_another_graph_is_refused():
    graph, other = Graph(), Graph()
    y = other.placeholder("y")
    graph.output((graph.call_function(torch.exp, (graph.placeholder("x"),)),))
    check_order(graph)
    (call,) = [node for node in graph.nodes if node.op == "call_function"]
    call.args = (y,)
    with pytest.raises(RuntimeError, match="Argument 'y' of Node 'exp' does not belong to this Graph"):
        check_order(graph)


def test_text_of_every_kind_of_node():
    graph = Graph()
    named, plain = graph.placeholder("x"), graph.placeholder("y")
    set_fact(named, Input(InputKind.PARAMETER, "fc.weight"))
    call = graph.call_function(aten.le.Scalar, (named, 0.5))
    packed = graph.call_function(torch.ops.qcompiler.pack.default, (call, 1))
    stacked = graph.call_function(aten.cat.default, ([packed, packed],), {"dim": 0})
    attribute = graph.get_attr("table")
    graph.output((stacked, None, attribute))
    for node, tensor in {
        named: torch.zeros(2, 3),
        plain: torch.zeros((), dtype=torch.bfloat16),
        call: torch.zeros(2, 3, dtype=torch.bool),
        packed: torch.zeros(1, dtype=torch.uint8),
        stacked: torch.zeros(2, dtype=torch.int64),
    }.items():
        node.meta["val"] = tensor
    plain.meta["partitioner_tag"] = "is_backward"
    pin_saved(packed)
    pin_to_backward(stacked)
    root = nn.Module()
    root.table = nn.Parameter(torch.zeros(1))
    assert graph_text(GraphModule(root, graph)).splitlines() == [
        "   %x : f32[2,3] = parameter fc.weight",
        "<  %y : bf16[]",
        "   %le_scalar : b1[2,3] = aten.le.Scalar(%x, 0.5)",
        " ! %pack_default : ui8[1] = qcompiler.pack(%le_scalar, 1)",
        "<  %cat_default : i64[2] = aten.cat([%pack_default, %pack_default], dim=0)",
        "   %table = table()",
        "   return [%cat_default, None, %table]",
    ]


def test_text_is_stable(joint):
    models = [nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(2)]
    first, second = (joint(model, leaf(2, 4)).module for model in models)
    assert graph_text(first) == graph_text(second)


def test_the_keys_of_ours(joint, apply):
    captured = joint(nn.Linear(4, 3), leaf(2, 4))
    apply(captured, AnnotateRoles())
    ours = {key for node in captured.module.graph.nodes for key in node.meta if "qcompiler" in str(key)}
    assert ours == {"qcompiler", "qcompiler_strides_read"}


def test_every_golden_file_has_its_test():
    folder = Path(__file__).parents[1]
    tests = "".join(path.read_text() for path in folder.rglob("test_*.py"))
    names = {path.stem for path in (folder / "golden").iterdir()}
    assert names == set(re.findall(r"def (test_golden_\w+)\(", tests))


def test_code_reads_an_input_by_a_name_of_its_own():
    """Of two nodes named one, the call ran first and the input read its result: wrong numbers in compiled code."""
    graph = Graph()
    x = graph.placeholder("x")
    doubled = graph.call_function(torch.mul, (x, 2))
    with graph.inserting_before(doubled):
        mul = insert_input(graph, "mul")
        late = insert_input(graph, "mul_1")
    graph.output((doubled, mul, late))
    assert GraphModule(torch.nn.Module(), graph)(torch.tensor(3), torch.tensor(5), torch.tensor(7)) == (6, 5, 7)
