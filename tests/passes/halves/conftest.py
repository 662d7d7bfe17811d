"""Fixtures of the passes over halves: a graph after the joint passes, brought in front of one pass."""

import pytest
import torch
from torch.fx import Interpreter

import qcompiler
from qcompiler import recipes
from qcompiler.compiler import rewrite
from qcompiler.compiler.pipelines import halves_pipeline, joint_pipeline
from qcompiler.passes.base import Pipeline
from qcompiler.passes.halves.halves import Halves, check_halves, clean_halves
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.text import graph_text


@pytest.fixture
def text():
    """text(halves) → the text of every graph that there is."""
    return lambda halves: "\n".join(map(graph_text, halves.graphs))


@pytest.fixture
def in_front_of(joint):
    """in_front_of(pass class, recipe, model, *inputs, prepare=None) → the halves as that pass finds them.

    `prepare` changes the joint graph in front of the passes over halves.
    """

    def make(step, recipe, model, *inputs, prepare=None):
        captured = joint(model, *inputs)
        chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
        joint_pipeline(chosen)(captured.module)
        if prepare is not None:
            prepare(captured.module.graph)
        halves = Halves.of_joint(captured.module, captured.forward_outputs, captured.static_inputs)
        line = halves_pipeline(chosen.rules)
        index = [type(one) for one in line.passes].index(step)
        Pipeline(line.passes[:index], line.verify)(halves)
        return halves

    return make


def make_settle(text, check):
    """A function that runs a pass twice, with the check of its pipeline behind each run."""

    def run(halves, step):
        changes = step(halves)
        check(halves)
        after = text(halves)
        assert step(halves) == 0
        check(halves)
        assert text(halves) == after
        return changes

    return run


@pytest.fixture
def settle_halves(text):
    """settle_halves(halves, pass) → what the pass returned; run again it returns 0 and changes no text."""

    return make_settle(text, check_halves)


@pytest.fixture
def compiled_halves(joint):
    """compiled_halves(recipe, model, *inputs) → the halves as a compiler gets them, in front of the last passes."""

    def make(recipe, model, *inputs):
        captured = joint(model, *inputs)
        chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
        joint_pipeline(chosen)(captured.module)
        return rewrite.split_halves(captured, rules=chosen.rules)

    return make


@pytest.fixture
def settle_compiled(text):
    """settle_compiled(halves, pass) → what the pass returned; run again it returns 0 and changes no text."""

    return make_settle(text, clean_halves)


def draw_like(node):
    """Return random numbers of the shape, the strides and the type of a node."""
    value = get_value(node)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(torch.randn(tuple(value.shape)))


@pytest.fixture
def run_halves():
    """run_halves(halves) → all outputs of both halves, for inputs and tangents of one seed."""

    def run(halves):
        torch.manual_seed(5)
        inputs = [draw_like(node) for node in halves.forward.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            outputs = list(Interpreter(halves.forward).run(*inputs, enable_io_processing=False))
            saved = outputs[halves.outputs :]
            tangents = [draw_like(node) for node in halves.backward.graph.find_nodes(op="placeholder")[len(saved) :]]
            return outputs + list(Interpreter(halves.backward).run(*saved, *tangents, enable_io_processing=False))

    return run


def step_bits(build, recipe, inputs):
    """Return the results, gradients and buffers of one step of a model, with all random numbers from one seed."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = qcompiler.compile(build(), recipe, backend="eager")
    given = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    output = model(*given)
    output.sin().sum().backward()
    gradients = [x.grad for x in (*given, *model.parameters())]
    return [output, *gradients, *(buffer.clone() for buffer in model.buffers())], model


@pytest.fixture
def changes_no_bit(monkeypatch, same_bits):
    """changes_no_bit(build, recipe, inputs, *pass classes) → the places that the passes changed.

    One step has the same results, gradients and buffers, bit for bit, in a pipeline without these passes.
    """

    def check(build, recipe, inputs, *steps):
        found, model = step_bits(build, recipe, inputs)
        names = {step.name for step in steps}
        changes = sum(stage.changes for line in model.stages() for stage in line if stage.name in names)

        def without(*options):
            line = halves_pipeline(*options)
            return Pipeline(tuple(one for one in line.passes if type(one) not in steps), line.verify)

        with monkeypatch.context() as patch:
            patch.setattr(rewrite, "halves_pipeline", without)
            expected, _ = step_bits(build, recipe, inputs)
        assert same_bits(found, expected)
        return changes

    return check
