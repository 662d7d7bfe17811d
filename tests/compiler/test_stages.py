"""Stages of captured graphs: made anew outside of Dynamo, also of what only Dynamo's tracing knows."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qcompiler.compiler.stages import count_changes, stage_text
from qcompiler.passes.ir.meta import iterate_contractions
from qcompiler.passes.ir.text import graph_text

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Checkpointed(nn.Module):
    """A region with dropout that is computed again: backward gets the state of the generator."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(lambda y: self.second(torch.dropout(self.first(y).relu(), 0.5, True)), x, use_reentrant=False)


def test_a_checkpointed_region_with_dropout(eager):
    qmodel = eager(Checkpointed(), "hyperblock-int8")
    qmodel(torch.randn(4, 8, requires_grad=True)).sum().backward()
    (stages,) = qmodel.stages()
    assert "run_with_rng_state" in graph_text(stages[-1].backward)
    graph = qmodel.to_networkx()
    assert sum(data["saved_bytes"] for _, data in graph.nodes(data=True)) == qmodel.plan().saved_bytes


def test_changes_are_those_of_all_graphs(eager):
    class Broken(nn.Module):
        """Two graphs."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    qmodel = eager(Broken(), "hyperblock-int8")
    qmodel(torch.randn(4, 8)).sum().backward()
    frames = qmodel.stages()
    changes = count_changes(frames)
    assert len(frames) == 2
    assert list(changes) == [stage.name for stage in frames[0]]
    quantizers = stage_text(frames, "place-quantizers").count("= qcompiler.quantize(")
    assert changes["place-quantizers"] == quantizers > frames[0][5].changes > 0


def test_a_pass_that_only_says_why_has_a_stage(eager):
    """Nothing is quantized, and nothing changes; what place-quantizers has found out is there."""
    qmodel = eager(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), "int4-hadamard")
    qmodel(torch.randn(4, 8)).sum().backward()
    (stages,) = qmodel.stages()
    assert count_changes([stages])["place-quantizers"] == 0
    reasons = {
        stage.name: {one.kept for _, fact in iterate_contractions(stage.graph) for one in fact.operands}
        for stage in stages
    }
    assert reasons["rotate-operands"] == {""}
    assert all("keep in float" in reason for reason in reasons["place-quantizers"])
    assert reasons["save-quantized"] == reasons["place-quantizers"]
