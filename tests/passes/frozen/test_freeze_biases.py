"""Rounded biases become constants."""

import dataclasses

import torch
from torch import nn

import qcompiler
from qcompiler.passes.frozen.freeze_biases import FreezeBiases

DEPLOY = qcompiler.RECIPES["deploy-int8"]


def layers():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_golden_freeze_biases(eval_graph, apply_frozen, frozen_text, golden):
    subject = eval_graph(DEPLOY, layers(), torch.randn(2, 4))
    apply_frozen(subject)
    before = frozen_text(subject)
    apply_frozen(subject, FreezeBiases())
    golden(before=before, after=frozen_text(subject))


def test_biases_are_whole_multiples_of_their_unit(eval_graph, settle_frozen):
    subject = eval_graph(DEPLOY, layers(), torch.randn(2, 4))
    nodes = subject.graph.find_nodes(op="call_function", target=torch.ops.qcompiler.integer_bias.default)
    units = [subject.get_value(node.args[1]).double() * subject.get_value(node.args[2]).double() for node in nodes]
    assert settle_frozen(subject, FreezeBiases()) == 2
    for (_, bias), unit in zip(subject.constants.values(), units, strict=True):
        counts = bias.double() / unit.flatten()
        assert counts.abs().max() > 1
        torch.testing.assert_close(counts, counts.round(), rtol=2**-23, atol=0)


def test_float_biases_stay(eval_graph, settle_frozen):
    recipe = dataclasses.replace(DEPLOY, name="float-biases", integer_biases=False)
    subject = eval_graph(recipe, layers(), torch.randn(2, 4))
    assert settle_frozen(subject, FreezeBiases()) == 0
    assert subject.constants == {}
