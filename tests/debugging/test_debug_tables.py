"""The printed report of the debugger: long names and specs are told apart in it."""

import torch
from torch import nn

import qcompiler
from qcompiler import Recipe, Role, Rule, parse_spec

FAULT = parse_spec("int8:real:tensor:stochastic:pass:fixed(-1e-5,1e-5)")


class Layer(nn.Module):
    """A layer whose parts have long names."""

    def __init__(self):
        super().__init__()
        self.attention_projection, self.feed_forward_projection = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.feed_forward_projection(self.attention_projection(x).relu())


def test_the_part_of_a_spec_that_differs_is_in_the_table(eager, fresh):
    model = nn.Module()
    model.transformer_encoder_layers = nn.ModuleList(Layer() for _ in range(2))
    model.forward = lambda x: model.transformer_encoder_layers[1](model.transformer_encoder_layers[0](x))
    rule = Rule(role=Role.GRADIENT, module="*1.attention_projection", spec=FAULT)
    plain = parse_spec("int8:real:tensor:nearest:pass")
    qmodel = eager(model, Recipe(name="bad", rules=(rule, Rule(spec=plain))))
    with qcompiler.debug(qmodel) as d:
        qmodel(torch.randn(8, 8)).sum().backward()
    report = d.report()
    assert {site.spec for site in report.sites} == {FAULT, plain}
    (head, *rest) = str(report).split("Against float")
    lines = [line for line in head.splitlines() if line.startswith("│")]
    text = "".join(line.split("│")[2].strip() for line in lines)
    assert text.count("…:stochastic:…:fixed(-1e-05,1e-05)") == 1  # folded, where there is no room for it
    assert text.count("…:nearest:…") == len(report.sites) - 1
    assert "spec, in every row: int8:real:tensor:…:pass:…" in head
    names = "".join(line.split("│")[1].strip() for line in lines)
    for site in report.sites:
        assert site.name.rpartition(".")[2] in names
    assert rest
