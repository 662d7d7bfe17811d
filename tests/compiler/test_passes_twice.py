"""Every pass of the joint and of the halves pipeline, run twice on every model: the second time it changes nothing."""

import dataclasses

import pytest

from qcompiler import recipes
from qcompiler.compiler.pipelines import halves_pipeline, joint_pipeline
from qcompiler.compiler.rewrite import split_halves
from qcompiler.passes.base import Pipeline
from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.edit import copy_graph

pytestmark = pytest.mark.usefixtures("fresh")

#: ranges of the past, learned ranges, outputs; packed codes, turned blocks, keys; rotations; clip masks
RECIPES = ("in-hindsight-w8a8g8", "lsq-w4a4", "channelwise-int4", "int4-hadamard", "ewgs-w4a4")


@dataclasses.dataclass(frozen=True)
class Twice:
    """A pass, run again at once."""

    step: object

    @property
    def name(self):
        return self.step.name

    def __call__(self, subject):
        changes = self.step(subject)
        again = self.step(subject)
        assert again == 0, f"{self.name}: {again} changes in its second run"
        return changes


def doubled(line):
    return Pipeline(tuple(map(Twice, line.passes)), line.verify)


@pytest.mark.sample(1)
def test_every_pass_is_done_after_one_run(case, eager):
    qmodel = eager(case.build())
    case.loss(qmodel(*case.inputs())).backward()
    captures = list(qmodel._session.get_compiler(True).captures.values())
    assert captures
    changed = set()
    nodes = sum(len(captured.module.graph.nodes) for captured in captures)
    chosen = RECIPES if nodes < 400 else RECIPES[:2]  # large graphs take seconds a recipe
    for recipe, captured in ((recipe, captured) for recipe in chosen for captured in captures):
        module = copy_graph(captured.module)
        doubled(joint_pipeline(recipes.get(recipe), frame=captured.frame))(
            module, lambda name, changes, _: changed.add(name) if changes else None
        )
        halves = Halves.of_joint(module, captured.forward_outputs, captured.static_inputs)
        doubled(halves_pipeline())(halves, lambda name, changes, _: changed.add(name) if changes else None)
    assert {"annotate-roles", "place-quantizers", "thread-ranges", "save-quantized", "partition"} <= changed


def test_evaluation_too(eager, models):
    case = models.CASES["cnn"]
    qmodel = eager(case.build()).eval()
    qmodel(*case.inputs())
    (captured,) = qmodel._session.get_compiler(False).captures.values()
    module = copy_graph(captured.module)
    recipe = recipes.get("deploy-int8").for_eval()
    doubled(joint_pipeline(recipe, frozen=True, frame=captured.frame))(module)
    assert split_halves(dataclasses.replace(captured, module=module)).graphs
