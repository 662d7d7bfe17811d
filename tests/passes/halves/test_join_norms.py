"""Forward gets the results of its batch norms back."""

import torch
from torch import nn

from qcompiler.passes.halves.join_norms import JoinNorms
from qcompiler.passes.halves.partition import Partition
from qcompiler.runtime import ops


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def norms(graph):
    return list(graph.find_nodes(op="call_function", target=ops.NORM_AGAIN))


def test_golden_join_norms(in_front_of, settle_halves, text, golden):
    halves = in_front_of(JoinNorms, "identity", nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()), leaf())
    before = text(halves)
    assert settle_halves(halves, JoinNorms()) == 1
    assert not norms(halves.forward.graph)
    assert len(norms(halves.backward.graph)) == 1
    golden(before=before, after=text(halves))


def test_does_not_fire_without_norms(in_front_of, settle_halves, text):
    halves = in_front_of(JoinNorms, "identity", nn.Sequential(nn.Linear(4, 4), nn.SiLU()), leaf())
    before = text(halves)
    assert settle_halves(halves, JoinNorms()) == 0
    assert text(halves) == before


def test_does_not_fire_on_a_joint_graph(in_front_of, text):
    halves = in_front_of(Partition, "identity", nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()), leaf())
    before = text(halves)
    assert JoinNorms()(halves) == 0
    assert text(halves) == before
    assert len(norms(halves.joint.graph)) == 1
