"""Evaluation has two front ends: Dynamo's capture, which runs, and torch.export, which becomes a file. Both graphs have
the same contractions, sites and specs, or there is a reason, which stands here."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.compiler.stages import QUANTIZED, find_stage
from qcompiler.exporting.assemble import prepare_call
from qcompiler.exporting.trace import trace_model
from qcompiler.passes.ir.meta import iterate_contractions

pytestmark = pytest.mark.usefixtures("fresh")

#: blocks along every axis; outputs, residual sums and kept ranges; rotations, and both ends left in float
RECIPES = ("hyperblock-int8", "deploy-int8", "int4-hadamard")
#: models that are not exported with a free batch → the reason, a part of the error
FIXED = {"vit": "The model takes the size of a free dimension for a number"}  # len(x) in its forward


def capture_eval(qmodel, inputs):
    """(plan, contractions) of the graph that eval mode runs."""
    qmodel.eval()
    with torch.no_grad():
        qmodel(*inputs)
    (stages,) = qmodel.stages(training=False)
    return qmodel.plan(training=False), list_facts(find_stage(stages, QUANTIZED).graph)


def trace_eval(qmodel, inputs, free):
    """The same of the graph that an export starts from."""
    call = prepare_call(qmodel, inputs, {}, None, free)
    traced = trace_model(qmodel, call.args, call.kwargs, call.shapes, frozen=False)
    return traced.plan, list_facts(traced.frozen.program.graph)


def list_facts(graph):
    return [fact for _, fact in iterate_contractions(graph)]


def list_rows(plan, free=False):
    """Every quantizer of a plan by its name; with a free batch without shapes, which have a symbol then."""
    hidden = {"shape": ()} if free else {}
    return {site.name: dataclasses.replace(site, **hidden) for site in plan.sites}


def list_kept(plan):
    return sorted(plan.kept, key=str)


def assert_equal(captured, traced, free):
    (plan, facts), (other, others) = captured, traced
    assert list_rows(other, free) == list_rows(plan, free)
    assert list_kept(other) == list_kept(plan)
    assert (other.placed, other.matched) == (plan.placed, plan.matched)
    assert others == facts


@pytest.mark.sample(4)
@pytest.mark.parametrize("recipe", [RECIPES[0], *(pytest.param(name, marks=pytest.mark.full) for name in RECIPES[1:])])
def test_both_front_ends_give_one_plan(case, recipe, request):
    name = request.node.callspec.params["case"]
    inputs = case.inputs()
    qmodel = qcompiler.compile(case.build(), recipe, backend="eager")
    case.loss(qmodel(*inputs)).backward()
    captured = capture_eval(qmodel, inputs)
    assert captured[1]
    for free in (False, True):
        if free and name in FIXED:
            with pytest.raises(qcompiler.ExportError, match=FIXED[name]):
                trace_eval(qmodel, inputs, free)
        else:
            assert_equal(captured, trace_eval(qmodel, inputs, free), free)


def test_ranges_of_attention_that_training_takes_apart(models):
    """The one other reason: in training dropout takes attention apart, so eval mode reads tensors without a range."""
    case = models.CASES["vit"]
    inputs = case.inputs()
    qmodel = qcompiler.compile(case.build(), "in-hindsight-w8a8g8", backend="eager")
    case.loss(qmodel(*inputs)).backward()
    with pytest.raises(qcompiler.ExportError, match="Attention is fused in eval"):
        trace_eval(qmodel, inputs, free=False)
    assert any("no range from training" in note for note in capture_eval(qmodel, inputs)[0].notes)


class Rows(nn.Module):
    """A matrix product of rows that are not contiguous, as the function says; the weight trains or does not."""

    def __init__(self, function, trains):
        super().__init__()
        self.function = function
        self.linear, self.bare = nn.Linear(10, 8), nn.Linear(10, 8, bias=False)
        self.weight = nn.Parameter(torch.randn(10, 8))
        self.register_buffer("buffer", torch.randn(10, 8))
        self.requires_grad_(trains)

    def forward(self, x):
        return self.function(self, x.transpose(1, 2))


FUNCTIONS = {
    "linear": lambda self, x: self.linear(x),
    "without-bias": lambda self, x: self.bare(x),
    "four-dimensions": lambda self, x: self.linear(x.unsqueeze(1).expand(-1, 2, -1, -1)),
    "two-dimensions": lambda self, x: self.linear(x[0]),
    "a-matrix": lambda self, x: x @ self.weight,
    "a-vector": lambda self, x: x @ self.weight[:, 0],
    "on-the-left": lambda self, x: self.weight.t() @ x.transpose(1, 2),
    "a-buffer": lambda self, x: x @ self.buffer,
    "computed": lambda self, x: F.linear(x, self.weight.t() * 2),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_that_are_not_contiguous(name, trains):
    """Torch makes one matrix of them or a batch of matrices, by what trains; both front ends decide alike."""
    model, x = Rows(FUNCTIONS[name], trains), torch.randn(4, 10, 6)
    qmodel = qcompiler.compile(model, "hyperblock-int8", backend="eager")
    captured = capture_eval(qmodel, (x,))
    for free in (False, True):
        assert_equal(captured, trace_eval(qmodel, (x,), free), free)


@pytest.mark.parametrize("name", ["linear", "without-bias", "four-dimensions"])
def test_a_weight_that_trains_is_no_batch_of_matrices(name):
    """Of a batch as large as that of the input the codes would be no constants."""
    qmodel = qcompiler.compile(Rows(FUNCTIONS[name], True), "hyperblock-int8", backend="eager")
    stages = qcompiler.export_stages(qmodel, (torch.randn(4, 10, 6),))
    assert any(line.startswith(f"%{name_of(name)}/weight/codes : ") for line in stages[-1].text.splitlines())


def name_of(function):
    return "bare" if function == "without-bias" else "linear"
