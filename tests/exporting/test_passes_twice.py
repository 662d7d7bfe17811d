"""Every pass of the frozen and of the ONNX pipeline, run twice on whole models: the second time it changes nothing."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.compiler.pipelines import frozen_pipeline
from qcompiler.exporting import build
from qcompiler.exporting.exported_model import ExportedModel, verify_structure
from qcompiler.exporting.freeze import find_known_inputs, rebuild_program
from qcompiler.exporting.pipeline import onnx_pipeline
from qcompiler.exporting.trace import trace_model
from qcompiler.passes.base import Pipeline
from qcompiler.passes.frozen.frozen_graph import FrozenGraph


class Images(nn.Module):
    """Convolutions with batch norm, one of them transposed, a clip, pools with cut windows, a softmax."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.bn3 = nn.ConvTranspose2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mix, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu6(self.bn(self.conv(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.inner(x)) + x), 2, 3, 1, ceil_mode=True)
        x = F.avg_pool2d(self.bn3(self.up(x)), 2, 2, ceil_mode=True)
        return self.fc(F.relu(self.mix(x.flatten(2).transpose(1, 2))).softmax(-1).mean(1))


class Tokens(nn.Module):
    """A factor of 1 between layers, attention, a weight that is computed of others, a matrix on the right."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.w, self.a, self.b = (nn.Parameter(torch.randn(shape) / 4) for shape in ((8, 8), (2, 8), (8, 2)))

    def forward(self, x):
        x = self.v(F.relu(self.k(x)) * 1.0)
        a = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)
        return F.linear(a, self.w + self.b @ self.a) @ self.w


MODELS = {"images": (Images, (4, 3, 8, 8)), "tokens": (Tokens, (2, 3, 8))}
RECIPES = ("deploy-int8", "in-hindsight-w8a8g8", "hfp8", "hyperblock-int8", "lsq-w4a4")
#: what the models above do not need: a range that was measured on data, and blocks of one range
SELDOM = {"calibrate-ranges", "unite-blocks", "rename-dimensions"}


def run_twice(pipeline, subject):
    """Name of each pass → what it returned; fails if it returns anything but 0 when run again."""
    counts = {}
    for step in pipeline.passes:
        Pipeline((step,), pipeline.verify)(subject, lambda name, changes, subject: counts.update({name: changes}))
        again = step(subject)
        pipeline.verify(subject)
        assert again == 0, step.name
    return counts


@functools.cache
def count_changes(name, recipe):
    """Name of each pass of both pipelines → the number of places it changed in a trained model."""
    make, shape = MODELS[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    qmodel, x = qcompiler.compile(make(), recipe, backend="eager"), torch.randn(shape)
    qmodel(x).square().mean().backward()
    traced = trace_model(qmodel, (x,), {}, None, frozen=False)
    program = traced.frozen.program
    graph = FrozenGraph(program.graph_module, find_known_inputs(program, qmodel.ranges()))
    counts = run_twice(frozen_pipeline(), graph)
    frozen = dataclasses.replace(traced.frozen, program=rebuild_program(program, graph))
    subject = ExportedModel(build.translate_program(dataclasses.replace(traced, frozen=frozen), 21))
    verify_structure(subject)
    return counts | run_twice(onnx_pipeline(), subject)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_run_again_each_pass_changes_nothing(name, recipe):
    counts = count_changes(name, recipe)
    assert counts["freeze-quantizers"] > 0
    assert counts["lower-quantizers"] > 0


@pytest.mark.full
def test_every_pass_has_work_somewhere():
    counts = [count_changes(name, recipe) for name in MODELS for recipe in RECIPES]
    idle = {name for name in counts[0] if all(one[name] == 0 for one in counts)}
    assert idle <= SELDOM
