"""Fixtures of the passes over halves: a graph after the joint passes, brought in front of one pass."""

import pytest

from qcompiler import recipes
from qcompiler.compiler.pipelines import halves_pipeline, joint_pipeline
from qcompiler.passes.base import Pipeline
from qcompiler.passes.halves.halves import Halves, check_halves
from qcompiler.passes.ir.text import graph_text


@pytest.fixture
def text():
    """text(halves) → the text of every graph that there is."""
    return lambda halves: "\n".join(map(graph_text, halves.graphs))


@pytest.fixture
def in_front_of(joint):
    """in_front_of(pass class, recipe, model, *inputs) → the halves as that pass finds them."""

    def make(step, recipe, model, *inputs):
        captured = joint(model, *inputs)
        chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
        joint_pipeline(chosen)(captured.module)
        halves = Halves.of_joint(captured.module, captured.forward_outputs, captured.static_inputs)
        line = halves_pipeline()
        index = [type(one) for one in line.passes].index(step)
        Pipeline(line.passes[:index], line.verify)(halves)
        return halves

    return make


@pytest.fixture
def settle_halves(text):
    """settle_halves(halves, pass) → what the pass returned; run again it returns 0 and changes no text."""

    def run(halves, step):
        changes = step(halves)
        check_halves(halves)
        after = text(halves)
        assert step(halves) == 0
        check_halves(halves)
        assert text(halves) == after
        return changes

    return run
