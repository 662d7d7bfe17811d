"""Fixtures of the passes: captured graphs, their execution, golden texts."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter

from qcompiler.compiler.capture import Captured, capture
from qcompiler.passes.base import Pass, Pipeline
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import get_input, get_value, iterate_contractions
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.verify import finish_and_verify
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward
from qcompiler.passes.rules import Role, Rule
from qcompiler.runtime.spec import parse_spec


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights and inputs are the same in every run and every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def joint() -> Callable[..., Captured]:
    """joint(model, *inputs) → the captured joint graph, with real names; `run_graph` runs it on these inputs."""

    def make(model: nn.Module | Callable[..., Any], *inputs: Any) -> Captured:
        torch._dynamo.reset()
        kept: list[Captured] = []

        def backend(module: torch.fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
            kept.append(capture(module, given))

            def run(*args: Any) -> Any:
                kept[0].module.meta["inputs"] = args
                return module(*args)

            return run

        torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(*inputs)
        return kept[0]

    return make


class Function(nn.Module):
    """forward(*inputs) = function(self, *inputs); parts are its parameters, buffers (plain tensors) and submodules."""

    def __init__(self, function: Callable[..., Any], **parts: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


@pytest.fixture(scope="session")
def function() -> type[Function]:
    """function(f, **parts) → a module whose forward is f(self, *inputs)."""
    return Function


@pytest.fixture(scope="session")
def arguments() -> Callable[..., tuple[list[Any], list[Tensor]]]:
    """arguments(captured) → its real inputs, and random tangents of one seed with the strides they were traced with."""

    def make(captured: Captured, seed: int = 1) -> tuple[list[Any], list[Tensor]]:
        torch.manual_seed(seed)
        inputs, tangents = [*captured.module.meta["inputs"]], []
        for node in captured.module.graph.find_nodes(op="placeholder")[len(inputs) :]:
            assert get_input(node).kind is InputKind.TANGENT
            traced = get_value(node)
            tangent = torch.empty_strided(traced.shape, traced.stride(), dtype=traced.dtype)
            tangents.append(tangent.copy_(torch.randn(traced.shape)))
        return inputs, tangents

    return make


@pytest.fixture(scope="session")
def run_graph(arguments: Callable[..., tuple[list[Any], list[Tensor]]]) -> Callable[..., list[Any]]:
    """run_graph(captured) → the outputs of the graph, node by node, for its inputs and the tangents of one seed."""

    def run(captured: Captured, seed: int = 1) -> list[Any]:
        inputs, tangents = arguments(captured, seed)
        with torch.no_grad():
            return [*Interpreter(captured.module).run(*inputs, *tangents, enable_io_processing=False)]

    return run


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Sequence[Any], Sequence[Any]], bool]:
    """True where both hold the same tensors, bit for bit (−0 is not 0), and None at the same places."""

    def equal(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return x is None and y is None
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return False
        left, right = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
        return torch.equal(left, right)

    return lambda left, right: len(left) == len(right) and all(map(equal, left, right))


@pytest.fixture(scope="session")
def apply() -> Callable[..., list[int]]:
    """apply(captured, *passes) → what each pass returned; the graph is cleaned and verified after each."""

    def run(captured: Captured, *passes: Pass) -> list[int]:
        counts: list[int] = []
        Pipeline(passes, finish_and_verify)(captured.module, lambda name, changes, module: counts.append(changes))
        return counts

    return run


@pytest.fixture(scope="session")
def settle(apply: Callable[..., list[int]]) -> Callable[[Captured, Pass], int]:
    """settle(captured, pass) → what the pass returned; run again it must return 0 and leave the text as it is."""

    def run(captured: Captured, step: Pass) -> int:
        (changes,) = apply(captured, step)
        text = graph_text(captured.module)
        assert apply(captured, step) == [0]
        assert graph_text(captured.module) == text
        return changes

    return run


@pytest.fixture(scope="session")
def rules() -> Callable[..., tuple[Rule, ...]]:
    """rules(spec) → one rule for every operand; rules(weight=spec, …) → one a role, the others stay in float."""

    def make(spec: str = "", **roles: str) -> tuple[Rule, ...]:
        named = tuple(Rule(role=Role(role), spec=parse_spec(text)) for role, text in roles.items())
        return (*named, Rule(spec=parse_spec(spec))) if spec else named

    return make


@pytest.fixture(scope="session")
def placed(joint: Any, apply: Any, rules: Any) -> Callable[..., Captured]:
    """placed(spec, model, *inputs) → its joint graph with a quantizer of that spec in front of every operand."""

    def make(spec: str, model: nn.Module, *inputs: Tensor, **roles: str) -> Captured:
        captured = joint(model, *inputs)
        apply(captured, SplitConvolutionBackward(), AnnotateRoles(), PlaceQuantizers(rules(spec, **roles)))
        return captured

    return make


@pytest.fixture(scope="session")
def facts_text() -> Callable[[Captured], str]:
    """What annotate-roles and later passes know, one operand a line."""

    def text(captured: Captured) -> str:
        lines = []
        for node, fact in iterate_contractions(captured.module.graph):
            half = "bias" if fact.is_bias else "forward"
            half = half if fact.gradient_of is None else f"gradient of {fact.gradient_of}"
            positions = "+".join(sorted(fact.positions))
            head = f"{node.name}: {fact.operator} {fact.site} ({fact.module or '-'}) {positions} {half}"
            lines.append(f"{head} {fact.kept}".rstrip())
            lines += [
                f"  {o.arg} {o.role} {o.name}: {o.layout} over {o.contracted}={o.extent} {o.kept}".rstrip()
                for o in fact.operands
            ]
        return "\n".join(lines) + "\n"

    return text
