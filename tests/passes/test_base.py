"""Pipeline: the order, what is done after each pass, and the errors."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.passes.base import PassError, Pipeline
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.verify import VerifyError, finish_and_verify
from qcompiler.passes.ir.views import aten
from qcompiler.recipes.block_floating import HYPERBLOCK_INT8


@dataclasses.dataclass(frozen=True)
class Negate:
    """Negates the first output; `loose` leaves the new node without a reader, `broken` without a value."""

    name: ClassVar[str] = "negate"
    loose: bool = False
    broken: bool = False

    def __call__(self, module):
        output = module.graph.output_node()
        first, *rest = output.args[0]
        node = insert_call(module.graph, aten.neg.default, (first,), before=output)
        if not self.loose:
            output.args = ((node, *rest),)
        if self.broken:
            del node.meta["val"]
        return 1


@dataclasses.dataclass(frozen=True)
class Fail:
    """Raises."""

    name: ClassVar[str] = "fail"

    def __call__(self, module):
        raise KeyError("lost")


@pytest.fixture
def captured(joint):
    return joint(nn.Linear(4, 3), torch.randn(2, 4))


def negations(module):
    return len(module.graph.find_nodes(op="call_function", target=aten.neg.default))


def test_passes_run_in_order_and_are_observed(captured):
    seen = []
    passes = (Negate(), Negate(loose=True), Negate())
    Pipeline(passes, finish_and_verify)(
        captured.module, lambda name, changes, module: seen.append((name, changes, negations(module)))
    )
    assert seen == [("negate", 1, 1), ("negate", 1, 1), ("negate", 1, 2)]


def test_the_graph_is_recompiled(captured, run_graph):
    (before, *_), inputs = run_graph(captured), captured.module.meta["inputs"]
    Pipeline((Negate(),), finish_and_verify)(captured.module)
    assert torch.equal(run_graph(captured)[0], -before)
    assert torch.equal(captured.module([*inputs], [torch.zeros_like(before)])[0][0], -before)


def test_no_passes_change_nothing(captured, run_graph, same_bits):
    outputs = run_graph(captured)
    Pipeline((), finish_and_verify)(captured.module)
    assert same_bits(run_graph(captured), outputs)


def test_a_pass_that_raises_is_named(captured):
    seen = []
    with pytest.raises(PassError, match=r"^pass fail failed \(ran before it: negate, negate\): 'lost'$") as error:
        Pipeline((Negate(), Negate(), Fail(), Negate()), finish_and_verify)(
            captured.module, lambda name, *_: seen.append(name)
        )
    assert isinstance(error.value.__cause__, KeyError)
    assert seen == ["negate", "negate"]


def test_a_pass_that_leaves_an_illegal_graph_is_named(captured):
    message = r"^pass negate failed \(ran before it: none\): neg: no value inferred for aten.neg.default$"
    with pytest.raises(PassError, match=message) as error:
        Pipeline((Negate(broken=True),), finish_and_verify)(captured.module)
    assert isinstance(error.value.__cause__, VerifyError)


PASSES = joint_pipeline(HYPERBLOCK_INT8).passes


@pytest.mark.parametrize("step", PASSES, ids=[step.name for step in PASSES])
def test_a_pass_is_a_frozen_value_named_after_its_file(step):
    kind = type(step)
    assert kind.__dataclass_params__.frozen
    assert step == dataclasses.replace(step)
    words = re.findall("[A-Z][a-z]+", kind.__name__)
    assert step.name == "-".join(words).lower()
    assert Path(inspect.getfile(kind)).stem == step.name.replace("-", "_")


def test_pass_names_are_distinct():
    assert len({step.name for step in PASSES}) == len(PASSES)
