"""Fixtures of the passes over frozen graphs: an eval graph whose weights and ranges are known, and its text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.exporting.freeze import find_known_inputs
from qcompiler.exporting.trace import trace_model
from qcompiler.passes.base import Pipeline
from qcompiler.passes.frozen.frozen_graph import FrozenGraph, verify_frozen
from qcompiler.passes.ir.text import graph_text


@pytest.fixture(scope="session")
def eval_graph() -> Callable[..., FrozenGraph]:
    """eval_graph(recipe, model, *inputs) → the quantized eval graph after one step of training, not frozen yet."""

    def make(recipe: Any, model: torch.nn.Module, *inputs: torch.Tensor) -> FrozenGraph:
        torch._dynamo.reset()
        qmodel = qcompiler.compile(model, recipe, backend="eager")
        qmodel(*inputs).sum().backward()
        program = trace_model(qmodel, inputs, {}, None, frozen=False).frozen.program
        return FrozenGraph(program.graph_module, find_known_inputs(program, qmodel.ranges()))

    return make


@pytest.fixture(scope="session")
def apply_frozen() -> Callable[..., list[int]]:
    """apply_frozen(subject, *passes) → what each pass returned; the graph is cleaned and verified after each."""

    def run(subject: FrozenGraph, *passes: Any) -> list[int]:
        counts: list[int] = []
        Pipeline(passes, verify_frozen)(subject, lambda name, changes, subject: counts.append(changes))
        return counts

    return run


@pytest.fixture(scope="session")
def frozen_text() -> Callable[[FrozenGraph], str]:
    """The graph as text."""
    return lambda subject: graph_text(subject.graph)


@pytest.fixture(scope="session")
def settle_frozen(apply_frozen: Any, frozen_text: Any) -> Callable[[FrozenGraph, Any], int]:
    """settle_frozen(subject, pass) → what the pass returned; run again it returns 0 and leaves the text as it is."""

    def run(subject: FrozenGraph, step: Any) -> int:
        (changes,) = apply_frozen(subject, step)
        text = frozen_text(subject)
        assert apply_frozen(subject, step) == [0]
        assert frozen_text(subject) == text
        return int(changes)

    return run
