"""explain(): rows and totals against the plan, other recipes, plain float training, and the figures of the paper."""

import json
import math

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.drawing.explanation import compute_traffic

pytestmark = pytest.mark.usefixtures("fresh")


def trained(case, recipe, eager):
    torch.manual_seed(0)
    qmodel = eager(case.build(), recipe)
    case.loss(qmodel(*case.inputs())).backward()
    return qmodel


@pytest.mark.parametrize("name", ["cnn", "vit", "twice", "frozen"])
def test_rows_and_totals(models, eager, name):
    case = models.CASES[name]
    qmodel = trained(case, "hyperblock-int4", eager)
    made, plan = qcompiler.explain(qmodel), qmodel.plan()
    assert {row.name: sorted(row.consumers) for row in made.quantizers} == {
        site.name: sorted(site.consumers) for site in plan.sites
    }
    assert sum(row.placed for row in made.quantizers) == made.totals.placed == plan.placed
    assert made.totals.quantizers == len(plan.sites)
    assert (made.totals.saved_bytes, made.totals.saved_code_bytes) == (plan.saved_bytes, plan.saved_code_bytes)
    assert sum(row.saved_bytes for row in made.quantizers) <= plan.saved_code_bytes
    assert made.notes == plan.notes
    kept = {how for row in made.contractions for how in row.operands.values() if how.startswith("float: ")}
    assert kept == {f"float: {kept.reason}" for kept in plan.kept}
    names = {row.name for row in made.quantizers}
    read = {how for row in made.contractions for how in row.operands.values()} - kept
    assert read == names  # every quantizer is read, and nothing else is
    assert made.totals.in_float == sum(any(how in kept for how in row.operands.values()) for row in made.contractions)


@pytest.mark.parametrize("name", ["cnn", "vit", pytest.param("resnet20", marks=pytest.mark.full)])
def test_what_a_one_dimensional_scheme_needs(models, eager, name):
    """The number counted on the graph of one scheme is that of quantizers which the other scheme really has."""
    case = models.CASES[name]
    blocks, lines = (trained(case, f"{scheme}-int8", eager) for scheme in ("hyperblock", "channelwise"))
    assert qcompiler.explain(blocks).totals.one_dimensional == len(lines.plan().sites)
    assert qcompiler.explain(lines).totals.one_dimensional == len(lines.plan().sites)


def test_bytes_saved_in_float_are_those_of_plain_training(models, eager):
    case = models.CASES["cnn"]
    plain = trained(case, "identity", eager)
    assert (
        qcompiler.explain(trained(case, "hyperblock-int4", eager)).totals.saved_bytes_in_float
        == plain.plan().saved_bytes
    )


@pytest.mark.parametrize(
    ("weights", "inputs", "outputs", "static", "dynamic"),
    [
        (64 * 64 * 9, 64 * 56**2, 64 * 56**2, 428, 1996),  # ResNet-18, the layer that the paper gives
        (256 * 256 * 9, 256 * 14**2, 256 * 14**2, 674, 1066),
        (16 * 96, 16 * 112**2, 96 * 112**2, 1374, 10782),  # MobileNetV2, likewise
        (96 * 9, 96 * 112**2, 96 * 112**2, 2353, 11761),
        (96 * 24, 96 * 56**2, 24 * 56**2, 370, 958),
    ],
)
def test_traffic_of_the_paper(weights, inputs, outputs, static, dynamic):
    """KiB at 8 bits, batch 1: Fournarakis & Nagel 2021, and the same formula for other layers."""
    sides = [(inputs, 8, "activation"), (weights, 8, "weight")]
    found = compute_traffic(sides, outputs, is_parameter=False)
    assert [round(size / 1024) for size in found] == [static, dynamic]


def test_traffic_of_a_model(eager):
    """By hand: forward and weight gradient of one layer; its input needs no gradient."""
    batch, wide, out = 8, 32, 16
    qmodel = eager(nn.Linear(wide, out, bias=False), "hyperblock-int8")
    qmodel(torch.randn(batch, wide)).sum().backward()
    totals = qcompiler.explain(qmodel).totals
    forward = batch * wide + wide * out + batch * out
    weight_gradient = batch * out + batch * wide + 4 * wide * out
    assert totals.traffic_static == forward + weight_gradient
    assert totals.traffic_dynamic == totals.traffic_static + 2 * 4 * batch * out


def test_a_product_of_two_floats_has_no_range(eager):
    qmodel = eager(nn.Linear(8, 8), "identity")
    qmodel(torch.randn(4, 8)).sum().backward()
    made = qcompiler.explain(qmodel)
    assert made.totals.traffic_static == made.totals.traffic_dynamic
    assert (made.totals.quantizers, made.totals.one_dimensional, made.quantizers) == (0, 0, ())
    assert made.totals.in_float == made.totals.contractions - 1  # the sum of the bias gradient multiplies nothing


def test_formats(models, eager):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a|b<script>", nn.Linear(8, 4))

        def forward(self, x):
            return self._modules["a|b<script>"](x)

    qmodel = eager(Odd(), "hyperblock-int8")
    qmodel(torch.randn(4, 8)).sum().backward()
    made = qcompiler.explain(qmodel)
    assert json.loads(made.to_json())["totals"]["quantizers"] == len(made.quantizers) == 3
    assert "a|b<script>/weight" in str(made)
    assert "\x1b[" not in str(made)
    assert "\x1b[" in made.to_text(color=True)
    cells = [line.replace("\\|", "").count("|") for line in made.to_markdown().splitlines() if line.startswith("| ")]
    assert set(cells) == {3, 4, 8}
    assert "<script>" not in made.to_markdown()


def test_eval_has_no_backward(models, eager):
    qmodel = eager(models.mlp(), "hyperblock-int8").eval()
    with torch.no_grad():
        qmodel(torch.randn(3, 12))
    totals = qcompiler.explain(qmodel, training=False).totals
    assert (totals.saved_bytes, totals.saved_bytes_in_float, totals.contractions) == (0, 0, 2)
    assert math.isclose(totals.placed, totals.quantizers)
    with pytest.raises(qcompiler.CompileError, match="nothing is captured yet"):
        qcompiler.explain(qmodel)
