"""Batch norms become scales and bias of a convolution, whose codes stay."""

import dataclasses

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.passes.frozen.fold_batch_norms import FoldBatchNorms
from qcompiler.passes.frozen.freeze_biases import FreezeBiases
from qcompiler.passes.frozen.freeze_quantizers import FreezeQuantizers
from qcompiler.passes.ir.layers import BATCH_NORMS

FLOAT_BIASES = dataclasses.replace(qcompiler.RECIPES["deploy-int8"], name="float-biases", integer_biases=False)


def make_norm(layer):
    """A layer of 3 channels and a batch norm behind, one of whose factors is negative, another 0."""
    model = nn.Sequential(layer, nn.BatchNorm2d(3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
        model[1].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    return model


def frozen(eval_graph, apply_frozen, recipe, model):
    subject = eval_graph(recipe, model, torch.randn(2, 2, 4, 4))
    apply_frozen(subject, FreezeBiases(), FreezeQuantizers())
    return subject


def list_norms(subject):
    return [node for target in BATCH_NORMS for node in subject.graph.find_nodes(op="call_function", target=target)]


def test_golden_fold_batch_norms(eval_graph, apply_frozen, frozen_text, golden):
    subject = frozen(eval_graph, apply_frozen, "deploy-int8", make_norm(nn.Conv2d(2, 3, 3, bias=False)))
    before = frozen_text(subject)
    apply_frozen(subject, FoldBatchNorms())
    golden(before=before, after=frozen_text(subject))


def test_codes_are_negated_and_scales_multiplied(eval_graph, apply_frozen, settle_frozen):
    model = make_norm(nn.Conv2d(2, 3, 3))
    subject = frozen(eval_graph, apply_frozen, FLOAT_BIASES, model)
    before = subject.codes["0/weight"]
    held = dict(subject.constants.values())
    assert settle_frozen(subject, FoldBatchNorms()) == 1
    assert list_norms(subject) == []
    assert subject.notes == ()
    assert subject.negated == {"0/weight": (1,)}
    after = dict(subject.constants.values())
    assert torch.equal(
        after["0/weight#codes.folded"], before * torch.tensor([1, -1, 1], dtype=before.dtype).view(3, 1, 1, 1)
    )
    norm, layer = model[1], model[0]
    gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    steps = held["0/weight#scale"].double().flatten() * gain.abs()
    torch.testing.assert_close(after["0/weight#scale.folded"].double().flatten()[:2], steps[:2], rtol=2**-22, atol=0)
    assert after["0/weight#scale.folded"].flatten()[2] == 2.0**-126
    offset = norm.bias.detach().double() + (layer.bias.detach().double() - norm.running_mean.double()) * gain
    torch.testing.assert_close(after["0/weight#bias"].double(), offset, rtol=2**-20, atol=2**-22)


@pytest.mark.parametrize(
    ("recipe", "layer", "reason"),
    [
        ("deploy-int8", lambda: nn.ConvTranspose2d(2, 3, 3), "behind a transposed convolution"),
        ("identity", lambda: nn.Conv2d(2, 3, 3), "the weight is not quantized for this convolution alone"),
        ("hyperblock-int8", lambda: nn.Conv2d(2, 3, 3), "other scales than one for each output channel"),
        ("identity", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), "which is not a convolution that it alone"),
    ],
)
def test_others_stay_and_say_why(recipe, layer, reason, eval_graph, apply_frozen, settle_frozen):
    subject = frozen(eval_graph, apply_frozen, recipe, make_norm(layer()))
    assert settle_frozen(subject, FoldBatchNorms()) == 0
    (note,) = subject.notes
    assert note.startswith("batch norm 1 stays in float: ")
    assert reason in note
    assert len(list_norms(subject)) == 1


def test_only_if_active(eval_graph, apply_frozen, settle_frozen):
    subject = frozen(eval_graph, apply_frozen, "deploy-int8", make_norm(nn.Conv2d(2, 3, 3)))
    assert settle_frozen(subject, FoldBatchNorms(active=False)) == 0
    assert subject.notes == ()
