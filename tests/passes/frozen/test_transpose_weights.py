"""Codes of weights lie as the kernels of their contraction read them."""

import torch
from torch import nn

from qcompiler.passes.frozen.freeze_quantizers import FreezeQuantizers
from qcompiler.passes.frozen.transpose_weights import TransposeWeights
from qcompiler.passes.ir.views import aten


class Right(nn.Module):
    """x @ W, without a transposition."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ self.w


def frozen(eval_graph, apply_frozen, recipe, model):
    subject = eval_graph(recipe, model, torch.randn(2, 4))
    apply_frozen(subject, FreezeQuantizers())
    return subject


def list_transpositions(subject):
    return subject.graph.find_nodes(op="call_function", target=aten.t.default)


def test_golden_transpose_weights(eval_graph, apply_frozen, frozen_text, golden):
    subject = frozen(eval_graph, apply_frozen, "in-hindsight-w8a8g8", nn.Sequential(nn.Linear(4, 3)))
    before = frozen_text(subject)
    apply_frozen(subject, TransposeWeights())
    golden(before=before, after=frozen_text(subject))


def test_two_tensors_of_known_scale_need_no_transposition(eval_graph, apply_frozen, settle_frozen):
    subject = frozen(eval_graph, apply_frozen, "in-hindsight-w8a8g8", nn.Sequential(nn.Linear(4, 3)))
    before = subject.codes["0/weight"]
    assert len(list_transpositions(subject)) == 1
    assert settle_frozen(subject, TransposeWeights()) == 1
    assert list_transpositions(subject) == []
    (codes,) = [held for name, held in subject.constants.values() if name == "0/weight#codes.t"]
    assert torch.equal(codes, before.t())
    assert subject.order == {"0/weight": (1, 0)}


def test_a_right_operand_beside_a_measured_one_gets_a_transposition(eval_graph, apply_frozen, settle_frozen):
    subject = frozen(eval_graph, apply_frozen, "tensor-int8", Right())
    assert list_transpositions(subject) == []
    assert settle_frozen(subject, TransposeWeights()) == 1
    assert len(list_transpositions(subject)) == 1
    assert subject.order == {"w": (1, 0)} or len(subject.order) == 1


def test_other_weights_stay(eval_graph, apply_frozen, settle_frozen):
    linear = frozen(eval_graph, apply_frozen, "tensor-int8", nn.Sequential(nn.Linear(4, 3)))
    right = frozen(eval_graph, apply_frozen, "in-hindsight-w8a8g8", Right())
    for subject in (linear, right):
        assert settle_frozen(subject, TransposeWeights()) == 0
        assert subject.order == {}
