"""annotate-roles: what every operand is, which axis is summed, and what is out of reach."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qcompiler.passes.ir.meta import is_backward, iterate_contractions
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward
from qcompiler.passes.rules import Position, Role

ANNOTATE = AnnotateRoles()


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


@pytest.fixture
def lines(joint, apply, facts_text):
    """lines(model, *inputs) → what is known of every contraction: a line each, and one an operand."""

    def of(model, *inputs):
        captured = joint(model, *inputs)
        apply(captured, SplitConvolutionBackward(), ANNOTATE)
        return facts_text(captured).splitlines()

    return of


@pytest.fixture
def operands(lines):
    """operands(model, *inputs) → the lines of the operands alone."""
    return lambda model, *inputs: [line.strip() for line in lines(model, *inputs) if line.startswith("  ")]


def test_golden_roles(joint, settle, golden, facts_text):
    captured = joint(nn.Linear(4, 3), leaf(2, 4))
    before = graph_text(captured.module)
    assert settle(captured, ANNOTATE) == 4
    assert graph_text(captured.module) == before
    golden(before=before, after=facts_text(captured))


def test_does_not_fire_without_a_product(joint, settle, facts_text):
    captured = joint(nn.Sequential(nn.ReLU(), nn.LayerNorm(3), nn.Softmax(-1)), leaf(2, 3))
    before = graph_text(captured.module)
    assert settle(captured, ANNOTATE) == 0
    assert (graph_text(captured.module), facts_text(captured)) == (before, "\n")


def test_the_graph_runs_as_before(joint, settle, run_graph, same_bits):
    captured = joint(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), leaf(2, 2, 3, 3))
    outputs = run_graph(captured)
    assert settle(captured, ANNOTATE) > 0
    assert same_bits(run_graph(captured), outputs)


@pytest.mark.parametrize(
    ("model", "shape", "spaces", "weight", "channels", "outputs"),
    [
        (nn.Conv2d(4, 6, 2), (2, 4, 3, 3), "ss", "oi", 4, 6),
        (nn.Conv1d(4, 6, 2), (2, 4, 3), "s", "oi", 4, 6),
        (nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3), "sss", "oi", 4, 6),
        (nn.Conv2d(4, 6, 2, groups=2), (2, 4, 3, 3), "ss", "oi", 2, 3),
        (nn.Conv2d(4, 4, 2, groups=4), (2, 4, 3, 3), "ss", "oi", 1, 1),
        (nn.ConvTranspose2d(4, 6, 2), (2, 4, 3, 3), "ss", "io", 4, 6),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 3), "ss", "io", 2, 3),
    ],
    ids=["2d", "1d", "3d", "grouped", "depthwise", "transposed", "grouped transposed"],
)
def test_convolutions(model, shape, spaces, weight, channels, outputs, operands):
    batch = shape[0]
    assert operands(model, leaf(*shape)) == [
        f"0 activation input: bc{spaces} over c={channels}",
        f"1 weight weight: {weight}{spaces} over i={channels}",
        f"0 gradient grad: bc{spaces} over b={batch}",
        f"1 activation input: bc{spaces} over b={batch}",
        f"0 gradient grad: bc{spaces} over c={outputs}",
        f"2 weight weight: {weight}{spaces} over o={outputs}",
    ]


def test_linear_of_tokens(operands):
    assert operands(nn.Linear(4, 3), leaf(2, 5, 4)) == [
        "1 activation input: bc over c=4",
        "2 weight weight: io over i=4",
        "0 gradient grad: bc over c=3",
        "1 weight weight: oi over o=3",
        "0 gradient grad: cb over b=10",
        "1 activation input: bc over b=10",
        "0 gradient grad: bc over b=10",
    ]


def test_weight_on_the_left(operands, function):
    assert operands(function(lambda m, x: m.w @ x, w=parameter(3, 4)), leaf(4, 2)) == [
        "0 weight weight: oi over i=4",
        "1 activation input: cb over c=4",
        "0 weight weight: io over o=3",
        "1 gradient grad: cb over c=3",
        "0 gradient grad: cb over b=2",
        "1 activation input: bc over b=2",
    ]


@pytest.mark.parametrize(("batch", "groups"), [((), ""), ((5,), "g"), ((5, 2), "g")])
def test_matmul_of_activations(batch, groups, operands, function):
    assert operands(function(lambda m, x, y: x @ y), leaf(*batch, 2, 4), leaf(*batch, 4, 3)) == [
        f"0 activation left: {groups}bc over c=4",
        f"1 activation right: {groups}cb over c=4",
        f"0 activation left: {groups}cb over b=2",
        f"1 gradient grad: {groups}bc over b=2",
        f"0 gradient grad: {groups}bc over c=3",
        f"1 activation right: {groups}bc over b=3",
    ]


def test_bias_inside_the_product(operands, function):
    lines = operands(function(lambda m, c, x, y: torch.baddbmm(c, x, y)), leaf(5, 2, 3), leaf(5, 2, 4), leaf(5, 4, 3))
    assert lines[:2] == ["1 activation left: gbc over c=4", "2 activation right: gcb over c=4"]


@pytest.mark.parametrize(
    ("product", "gradients"),
    [
        # dL = G·Rᵀ and dR = Lᵀ·G; torch computes (R·Gᵀ)ᵀ, (Gᵀ·L)ᵀ where the operand itself is a transpose
        (lambda m, x: x @ x.t(), [(1, "cb over b=4"), (0, "bc over c=4")]),
        (lambda m, x: x.t() @ x, [(1, "bc over b=4"), (0, "cb over c=4")]),
        (lambda m, x: x @ x, [(1, "bc over b=4"), (0, "bc over c=4")]),
        (lambda m, x: (lambda t: t @ t)(x.t()), [(1, "cb over b=4"), (0, "cb over c=4")]),
    ],
    ids=["x xT", "xT x", "x x", "xT xT"],
)
def test_products_of_one_tensor(product, gradients, joint, apply, function):
    captured = joint(function(product), leaf(4, 4))
    assert apply(captured, ANNOTATE) == [3]
    found = [fact for _, fact in iterate_contractions(captured.module.graph) if fact.gradient_of is not None]
    grads = [next(o for o in fact.operands if o.role is Role.GRADIENT) for fact in found]
    texts = [f"{g.layout} over {g.contracted}={g.extent}" for g in grads]
    assert [*zip([fact.gradient_of for fact in found], texts, strict=True)] == gradients


@pytest.mark.parametrize(
    ("model", "role"),
    [
        (lambda m, x: x @ m.v.t(), Role.WEIGHT),
        (lambda m, x: x @ (m.v * m.b), Role.WEIGHT),  # a masked or normalized weight
        (lambda m, x: x @ (m.v / m.v.norm()), Role.WEIGHT),
        (lambda m, x: x @ m.b, Role.ACTIVATION),  # a buffer alone is not trained
        (lambda m, x: x @ (m.v * x), Role.ACTIVATION),
    ],
    ids=["parameter", "with a buffer", "normalized", "buffer", "with an input"],
)
def test_a_weight_comes_from_parameters_alone(model, role, joint, apply, function):
    captured = joint(function(model, v=parameter(4, 4), b=torch.randn(4, 4)), leaf(4, 4))
    apply(captured, ANNOTATE)
    _, fact = next(iterate_contractions(captured.module.graph))
    assert [o.role for o in fact.operands] == [Role.ACTIVATION, role]
    assert fact.operator == ("linear" if role is Role.WEIGHT else "matmul")


def test_every_reader_of_an_output_gradient_is_a_gradient(joint, apply):
    captured = joint(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), leaf(2, 4))
    apply(captured, ANNOTATE)
    found = [(node, fact) for node, fact in iterate_contractions(captured.module.graph) if is_backward(node)]
    assert len(found) == 6
    assert all(sum(o.role is Role.GRADIENT for o in fact.operands) == 1 for _, fact in found)


def test_a_sum_that_is_no_bias_gradient_is_left_alone(operands, function):
    # the gradient of the scale of LayerNorm sums over tokens too, but of no output gradient of a product
    lines = operands(function(lambda m, x: m.n(x).tanh(), n=nn.LayerNorm(4)), leaf(2, 4))
    assert lines == []


def test_names_and_positions(joint, apply, function):
    def forward(m, x):
        x = m.fc(m.fc(x).relu())
        return m.head(x @ x.t() @ x)

    captured = joint(function(forward, fc=nn.Linear(4, 4), head=nn.Linear(4, 2)), leaf(3, 4))
    apply(captured, ANNOTATE)
    facts = [f for n, f in iterate_contractions(captured.module.graph) if f.gradient_of is None and not f.is_bias]
    assert [(f.module, f.site, *f.positions) for f in facts] == [
        ("fc", "fc", Position.FIRST),
        ("fc", "fc#2", Position.INNER),
        ("", "(root)/matmul", Position.INNER),
        ("", "(root)/matmul#2", Position.INNER),
        ("head", "head", Position.LAST),
    ]


def test_a_gradient_has_the_name_and_positions_of_its_product(joint, apply):
    captured = joint(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), leaf(3, 4))
    apply(captured, ANNOTATE)
    names = {(f.site, f.positions) for _, f in iterate_contractions(captured.module.graph)}
    assert names == {("0", frozenset({Position.FIRST})), ("2", frozenset({Position.LAST}))}


def test_a_weight_of_a_submodule_names_the_product(joint, apply, function):
    model = function(lambda m, x: F.linear(x, m.part.weight), part=nn.Linear(4, 3))
    captured = joint(model, leaf(2, 4))
    apply(captured, ANNOTATE)
    assert {fact.module for _, fact in iterate_contractions(captured.module.graph)} == {"part"}


def test_the_only_product_is_first_and_last(lines):
    assert lines(nn.Linear(4, 3), leaf(2, 4))[0] == "addmm: linear (root) (-) first+last forward"


@pytest.mark.parametrize(
    ("call", "shapes", "reason"),
    [
        (lambda m, x: F.scaled_dot_product_attention(x, x, x), [(1, 2, 3, 4)], "fused attention: its two products"),
        (lambda m, x, y: torch.dot(x, y), [(4,), (4,)], "vector product"),
        (lambda m, x, y: x @ y, [(3, 4), (4,)], "matrix-vector product"),
        (lambda m, x, y: F.bilinear(x, y, m.w), [(2, 3), (2, 3)], "trilinear product"),
    ],
    ids=["attention", "dot", "mv", "bilinear"],
)
def test_what_is_out_of_reach_says_why(call, shapes, reason, joint, apply, function):
    captured = joint(function(call, w=parameter(2, 3, 3)), *(leaf(*shape) for shape in shapes))
    (count,) = apply(captured, ANNOTATE)
    facts = [fact for _, fact in iterate_contractions(captured.module.graph)]
    assert len(facts) == count > 0
    assert all(fact.kept.startswith(reason) and not fact.operands for fact in facts)


@pytest.mark.parametrize(
    ("call", "shapes", "reason"),
    [
        (torch.addbmm, [(2, 3), (4, 2, 5), (4, 5, 3)], "sum of products in one kernel"),
        (torch.addr, [(2, 3), (2,), (3,)], "vector product"),
        (torch.vdot, [(3,), (3,)], "vector product"),
        (torch.conv_tbc, [(5, 2, 3), (2, 3, 4), (4,)], "convolution with channels last, of a kernel of its own"),
        (torch.cdist, [(30, 3), (30, 3)], "distance kernel"),
    ],
    ids=["addbmm", "addr", "vdot", "tbc", "distance"],
)
def test_rare_products_say_why(call, shapes, reason, joint, apply):
    captured = joint(lambda *inputs: call(*inputs), *(leaf(*shape) for shape in shapes))
    apply(captured, ANNOTATE)
    facts = [fact for node, fact in iterate_contractions(captured.module.graph) if not is_backward(node)]
    assert [(fact.kept, fact.operands) for fact in facts] == [(reason, ())]


class Odd(torch.autograd.Function):
    """Its backward multiplies two gradients, and a gradient with a tensor that no forward product has read."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return grad @ grad, grad @ w


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13, of itself
def test_gradients_of_no_product_say_so(joint, apply, function):
    captured = joint(function(lambda m, x: Odd.apply(x, m.w), w=parameter(4, 4)), leaf(4, 4))
    assert apply(captured, ANNOTATE) == [2]
    assert [fact.kept for _, fact in iterate_contractions(captured.module.graph)] == [
        "not the gradient of a product: it multiplies two gradients, or none",
        "no forward product belongs to this gradient",
    ]


class ByHand(torch.autograd.Function):
    """x @ w with the gradients of it; torch gives these the sequence number of the operator behind."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13, of itself
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.layer(ByHand.apply(x, m.w)),  # another weight behind
        lambda m, x: m.layer(ByHand.apply(x, m.layer.weight)),  # the same weight behind
        lambda m, x: ByHand.apply(ByHand.apply(x, m.w).relu(), m.w),
        lambda m, x: ByHand.apply(x, m.layer(x)),
        lambda m, x: ByHand.apply(m.layer(x), m.layer(x)),
    ],
    ids=["other", "same", "twice", "activations", "two layers"],
)
def test_gradients_by_hand_belong_to_their_contraction(call, joint, apply, function):
    """Every forward contraction has both of its gradients, each once."""
    captured = joint(function(call, w=parameter(4, 4), layer=nn.Linear(4, 4)), leaf(4, 4))
    apply(captured, ANNOTATE)
    facts = [fact for _, fact in iterate_contractions(captured.module.graph) if not fact.is_bias]
    forward = [fact.site for fact in facts if fact.gradient_of is None]
    assert {fact.kept for fact in facts} == {""}
    assert len({*forward}) == len(forward) >= 2
    gradients = [(fact.site, fact.gradient_of) for fact in facts if fact.gradient_of is not None]
    assert sorted(gradients) == sorted((site, side) for site in forward for side in (0, 1))


def test_a_layer_without_outputs(operands, function):
    model = function(lambda m, x: F.linear(x, m.w, m.b), w=parameter(0, 4), b=parameter(0))
    assert "0 gradient grad: bc over b=2" in operands(model, leaf(2, 4))


def test_a_graph_without_gradients_has_forward_products_only(joint, apply):
    captured = joint(nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4))
    assert not captured.is_joint
    assert apply(captured, ANNOTATE) == [1]
