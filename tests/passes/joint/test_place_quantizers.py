"""place-quantizers: one quantizer an operand, by the first rule that matches; refusals keep their reason."""

import pytest
import torch
from torch import nn

from qcompiler.passes.ir.meta import is_backward, is_pinned_saved, iterate_contractions
from qcompiler.passes.ir.quantizer import list_dequantizers, list_quantizers
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward
from qcompiler.passes.rules import Position, Product, Role, Rule
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

PLAIN = "int8:real:tensor:nearest:pass"
STOCHASTIC = "int8:fit:tensor:stochastic:pass"
PREPARE = (SplitConvolutionBackward(), AnnotateRoles())


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


def kept(captured):
    """The reasons why operands stay in float, in graph order."""
    return [operand.kept for _, fact in iterate_contractions(captured.module.graph) for operand in fact.operands]


def quantized(x):
    """What `PLAIN` makes of a tensor, written anew: the nearest of 255 levels up to the largest magnitude."""
    step = x.abs().max() / 127
    return torch.round(x / step).clamp(-127, 127) * step


def by_rows(x):
    """The same with a step for each row, as a block c* makes it of the layout bc."""
    return torch.stack([quantized(row) for row in x])


def test_golden_place(joint, apply, settle, golden, rules):
    captured = joint(nn.Linear(4, 3, bias=False), torch.randn(2, 4))
    apply(captured, *PREPARE)
    before = graph_text(captured.module)
    assert settle(captured, PlaceQuantizers(rules(PLAIN))) == 4
    golden(before=before, after=graph_text(captured.module))


def test_every_operand_gets_one(joint, apply, settle, rules):
    captured = joint(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), leaf(2, 2, 3, 3))
    apply(captured, *PREPARE)
    assert settle(captured, PlaceQuantizers(rules(PLAIN))) == 13  # 2 products × 3 contractions × 2 operands, and a bias
    graph = captured.module.graph
    assert (
        len([one.codes for one in list_quantizers(graph)])
        == len([one.floats for one in list_dequantizers(graph)])
        == 13
    )
    for node, fact in iterate_contractions(graph):
        assert all(node.args[operand.arg].target is ops.DEQUANTIZE for operand in fact.operands)


def test_linear_equals_its_formula(joint, apply, settle, rules, run_graph, same_bits):
    model, x = nn.Linear(4, 3), leaf(5, 4)
    captured = joint(model, x)
    apply(captured, *PREPARE)
    settle(captured, PlaceQuantizers(rules(PLAIN)))
    w, b, x = (t.detach() for t in (model.weight, model.bias, x))
    torch.manual_seed(1)
    g = torch.randn(5, 3)
    qw, qx, qg = quantized(w), quantized(x), quantized(g)
    expected = [torch.addmm(b, qx, qw.t()), (qg.t() @ qx), qg.sum(0), qg @ qw]
    assert same_bits(run_graph(captured, seed=1), expected)


def test_a_block_of_the_spec_is_used(joint, apply, settle, rules, run_graph, same_bits):
    model, x = nn.Linear(4, 3, bias=False), torch.randn(5, 4)
    captured = joint(model, x)
    apply(captured, *PREPARE)
    assert settle(captured, PlaceQuantizers(rules(activation="int8:real:c*:nearest:pass"))) == 2
    torch.manual_seed(1)
    g = torch.randn(5, 3)
    expected = [by_rows(x) @ model.weight.detach().t(), g.t() @ by_rows(x), None]
    assert same_bits(run_graph(captured, seed=1), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_equals_its_formula(transposed, joint, apply, settle, rules, run_graph, same_bits):
    model = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, padding=1, groups=2)
    x = leaf(2, 4, 5, 5)
    captured = joint(model, x)
    apply(captured, *PREPARE)
    assert settle(captured, PlaceQuantizers(rules(PLAIN))) == 6
    w, b, x = (t.detach() for t in (model.weight, model.bias, x))
    torch.manual_seed(1)
    g = torch.randn(2, 6, 5, 5)
    how = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], 2)
    output = aten.convolution(quantized(x), quantized(w), b, *how)
    grads = aten.convolution_backward(quantized(g), quantized(x), quantized(w), [6], *how, [True, True, True])
    assert same_bits(run_graph(captured, seed=1), [output, grads[1], grads[2], grads[0]])


def test_a_backward_dequantize_is_pinned_there(placed):
    captured = placed(PLAIN, nn.Linear(4, 3), leaf(2, 4))
    for node, fact in iterate_contractions(captured.module.graph):
        for operand in fact.operands:
            floats = node.args[operand.arg]
            assert floats.meta["partitioner_tag"] == ("must_be_in_backward" if is_backward(node) else "is_forward")
            assert is_backward(floats.args[0]) or operand.role is not Role.GRADIENT


def test_zero_points_are_placed_where_the_format_has_them(placed):
    captured = placed("affine8:real:tensor:nearest:pass", nn.Linear(4, 3, bias=False), torch.randn(2, 4))
    for codes in [one.codes for one in list_quantizers(captured.module.graph)]:
        tensor, scale, point = codes.args[:3]
        assert point.target is ops.ZERO_POINT
        assert point.args[:2] == (tensor, scale)


def test_one_key_is_drawn_a_step_and_saved(placed, run_graph, same_bits):
    captured = placed(STOCHASTIC, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), leaf(2, 4))
    (key,) = captured.module.graph.find_nodes(op="call_function", target=ops.DRAW_KEY)
    assert is_pinned_saved(key)
    assert {codes.args[3] for codes in [one.codes for one in list_quantizers(captured.module.graph)]} == {key}
    assert same_bits(run_graph(captured, seed=1), run_graph(captured, seed=1))
    assert not same_bits(run_graph(captured, seed=1)[:1], run_graph(captured, seed=2)[:1])


def test_nearest_rounding_draws_nothing(placed):
    captured = placed(PLAIN, nn.Linear(4, 3), leaf(2, 4))
    assert not captured.module.graph.find_nodes(op="call_function", target=ops.DRAW_KEY)


def test_sites_name_layer_and_operand(placed):
    captured = placed(PLAIN, nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    names = [codes.args[-1] for codes in [one.codes for one in list_quantizers(captured.module.graph)]]
    assert sorted(names) == ["0/grad", "0/grad", "0/input", "0/input", "0/weight"]


def test_a_rule_decides_by_role_operator_module_and_position(joint, apply, settle):
    spec = parse_spec(PLAIN)
    rules = (
        Rule(role=Role.WEIGHT, spec=parse_spec("int4:fit:tensor:nearest:pass")),
        Rule(module="0", spec=None, reason="measured"),
        Rule(operator="matmul", spec=spec),
        Rule(operator="linear", position=Position.LAST, spec=spec),
    )
    captured = joint(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4))
    apply(captured, *PREPARE)
    assert settle(captured, PlaceQuantizers(rules)) == 8
    decided = {
        (fact.site, str(operand.role)): (operand.rule, operand.kept)
        for _, fact in iterate_contractions(captured.module.graph)
        for operand in fact.operands
    }
    keep = f"rule 2: {rules[1]}"
    assert decided == {
        ("0", "weight"): (0, ""),
        ("0", "activation"): (1, keep),
        ("0", "gradient"): (1, keep),
        ("2", "weight"): (0, ""),
        ("2", "activation"): (3, ""),
        ("2", "gradient"): (3, ""),
    }
    formats = {
        codes.args[-1]: codes.args[4].partition(":")[0]
        for codes in [one.codes for one in list_quantizers(captured.module.graph)]
    }
    assert formats == {"0/weight": "int4", "2/weight": "int4", "2/input": "int8", "2/grad": "int8"}


def test_does_not_fire_without_a_rule(joint, apply, settle, rules):
    captured = joint(nn.Linear(4, 3), torch.randn(2, 4))
    apply(captured, *PREPARE)
    before = graph_text(captured.module)
    assert settle(captured, PlaceQuantizers()) == 0
    assert settle(captured, PlaceQuantizers(rules(PLAIN))) == 0  # what is refused once stays refused
    assert graph_text(captured.module) == before
    assert kept(captured) == ["no rule of the recipe matches"] * 5


def test_does_not_fire_on_integers(joint, apply, settle, rules, function):
    model = function(lambda m, x, y: (x @ x).float() * y)
    captured = joint(model, torch.ones(2, 2, dtype=torch.int32), leaf(2, 2))
    apply(captured, *PREPARE)
    before = graph_text(captured.module)
    assert settle(captured, PlaceQuantizers(rules(PLAIN))) == 0
    assert graph_text(captured.module) == before
    assert kept(captured) == ["nothing to quantize: torch.int32, 4 elements"] * 2


def test_an_empty_batch_keeps_what_is_empty(joint, apply, settle, rules):
    captured = joint(nn.Linear(4, 3), leaf(0, 4))
    apply(captured, *PREPARE)
    assert settle(captured, PlaceQuantizers(rules(PLAIN))) == 2
    assert {codes.args[-1] for codes in [one.codes for one in list_quantizers(captured.module.graph)]} == {
        "(root)/weight"
    }
    assert set(kept(captured)) == {"", "nothing to quantize: torch.float32, 0 elements"}


class Quantized(torch.autograd.Function):
    """`quantized`, with the gradient passed on: what a rule for an output asks for."""

    @staticmethod
    def forward(ctx, y):
        return quantized(y)

    @staticmethod
    def backward(ctx, grad):
        return grad


#: model, shape of its input, contractions of forward
OUTPUTS = {
    "linear": (lambda f: nn.Linear(4, 3), (5, 4), 1),
    "tokens": (lambda f: nn.Linear(4, 3), (2, 5, 4), 1),
    "convolution": (lambda f: nn.Conv2d(2, 3, 3, bias=False), (2, 2, 5, 5), 1),
    "batch norm": (lambda f: nn.Sequential(nn.Conv2d(2, 3, 2), norm(3), nn.Conv2d(3, 2, 2)), (3, 2, 5, 5), 2),
    "layer norm of tokens": (lambda f: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), (2, 5, 4), 1),
    "residual": (lambda f: f(lambda m, x: x + m.b(m.a(x)) * m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), (3, 4), 3),
    "directly": (lambda f: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), (5, 4), 2),
    "directly, tokens": (lambda f: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), (2, 5, 4), 2),
    "flattened": (lambda f: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)), (2, 2, 3, 3), 2),
    "returned twice": (lambda f: f(lambda m, x: (y := m.a(x)) * y.relu(), a=nn.Linear(4, 4)), (3, 4), 1),
}


def norm(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


def reference(captured, model, x):
    """Output and gradients of the model itself, each layer's output quantized by a hook."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [m.register_forward_hook(lambda m, args, y: Quantized.apply(y)) for m in layers]
    y = model(x)
    torch.manual_seed(1)
    grads = torch.autograd.grad(y, captured.module.meta["inputs"], torch.randn(y.shape))
    for handle in handles:
        handle.remove()
    return [y.detach(), *grads]


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_quantized_for_all_their_readers(name, joint, apply, settle, rules, run_graph, same_bits, function):
    build, shape, count = OUTPUTS[name]
    model, x = build(function), leaf(*shape)
    captured = joint(model, x)
    apply(captured, *PREPARE)
    plain = run_graph(captured)
    assert settle(captured, PlaceQuantizers(rules(output=PLAIN))) == count
    assert same_bits(run_graph(captured), reference(captured, model, x))
    assert not same_bits(run_graph(captured)[:1], plain[:1])
    for floats in [one.floats for one in list_dequantizers(captured.module.graph)]:
        assert [is_backward(user) for user in floats.users] == [is_backward(floats)] * len(floats.users)
    assert {
        codes.args[-1].rpartition("/")[2] for codes in [one.codes for one in list_quantizers(captured.module.graph)]
    } == {"output"}


def test_the_output_of_a_product_of_activations(joint, apply, settle, rules, run_graph, same_bits, function):
    left, right = leaf(2, 3, 4), leaf(2, 4, 5)
    captured = joint(function(lambda m, a, b: torch.bmm(a, b).sin()), left, right)
    apply(captured, *PREPARE)
    assert settle(captured, PlaceQuantizers(rules(output=PLAIN))) == 1
    y = Quantized.apply(torch.bmm(left, right)).sin()
    torch.manual_seed(1)
    expected = [y.detach(), *torch.autograd.grad(y, captured.module.meta["inputs"], torch.randn(y.shape))]
    assert same_bits(run_graph(captured), expected)


def test_whoever_reads_an_output_has_its_codes_already(joint, apply, settle, rules, run_graph, same_bits):
    """With a rule for everything the second layer's input gets no quantizer of its own, in backward neither."""
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)), torch.randn(2, 5, 4)
    captured = joint(model, x)
    apply(captured, *PREPARE)
    settle(captured, PlaceQuantizers(rules(PLAIN, output=PLAIN)))
    names = {codes.args[-1] for codes in [one.codes for one in list_quantizers(captured.module.graph)]}
    assert names == {"0/input", "0/weight", "0/output", "0/grad", "1/weight", "1/output", "1/grad"}
    first, second = (quantized(layer.weight.detach()) for layer in model)
    torch.manual_seed(1)
    g = quantized(torch.randn(2, 5, 2)).view(10, 2)
    x = quantized(x).view(10, 4)
    hidden = quantized(x @ first.t())
    back = quantized(g @ second)
    expected = [quantized(hidden @ second.t()).view(2, 5, 2), (x.t() @ back).t(), (hidden.t() @ g).t(), None]
    by_name = dict(zip(["y", *(fact.name for fact in captured.inputs)], run_graph(captured), strict=True))
    assert same_bits([by_name[name] for name in ("y", "0.weight", "1.weight")], [expected[0], *expected[1:3]])


def test_outputs_are_left_alone_without_a_rule_of_their_own(joint, apply, settle, rules):
    model = nn.Linear(4, 3)
    captured = joint(model, leaf(5, 4))
    apply(captured, *PREPARE)
    before = graph_text(captured.module)
    for given in (
        (Rule(role=Role.OUTPUT, spec=None), Rule(role=Role.OUTPUT, spec=parse_spec(PLAIN))),
        rules(output=PLAIN)[:0],
        (Rule(role=Role.OUTPUT, operator="convolution", spec=parse_spec(PLAIN)),),
    ):
        assert settle(captured, PlaceQuantizers(given)) == 0
    assert graph_text(captured.module) == before
    # a rule for everything is one for all operands, and no more
    settle(captured, PlaceQuantizers(rules(PLAIN)))
    assert "output" not in {
        codes.args[-1].rpartition("/")[2] for codes in [one.codes for one in list_quantizers(captured.module.graph)]
    }


def test_an_empty_output_is_left_alone(joint, apply, settle, rules):
    captured = joint(nn.Linear(4, 3), leaf(0, 4))
    apply(captured, *PREPARE)
    assert settle(captured, PlaceQuantizers(rules(output=PLAIN))) == 0


def test_rules_by_product_round_with_bits_of_their_own(joint, apply):
    captured = joint(nn.Linear(4, 3, bias=False), leaf(2, 4))
    own = Rule(role=Role.GRADIENT, product=Product.WEIGHT_GRADIENT, spec=parse_spec(STOCHASTIC))
    other = Rule(role=Role.GRADIENT, spec=parse_spec(STOCHASTIC.replace("tensor", "c*")))
    apply(captured, *PREPARE, PlaceQuantizers((own, other)))
    sites = sorted(codes.args[6] for codes in [one.codes for one in list_quantizers(captured.module.graph)])
    assert sites == ["(root)/grad", "(root)/grad.weight-gradient"]
