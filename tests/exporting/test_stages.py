"""export_stages(): an export after each step. The last one is the file; a pass without changes has no difference."""

import difflib

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.compiler.pipelines import frozen_pipeline, joint_pipeline
from qcompiler.exporting import stages as subject
from qcompiler.exporting.pipeline import onnx_pipeline
from qcompiler.exporting.text import model_text
from qcompiler.passes.ir.text import graph_text

pytestmark = pytest.mark.usefixtures("fresh")

#: what it changes is no part of the text: what passes know of a contraction
WORDLESS = {"annotate-roles"}


class Images(nn.Module):
    """A convolution with batch norm, a clip, a pool with cut windows, a linear layer on rows, a softmax."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.mix, self.fc = nn.Linear(9, 9), nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu6(self.bn(self.conv(x))), 2, 2, ceil_mode=True)
        return self.fc(F.relu(self.mix(x.flatten(2))).softmax(-1).mean(2))


def trained(recipe, model, x):
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    qmodel(x).square().sum().backward()
    return qmodel


def stages_of(recipe, model, x, **options):
    return subject.export_stages(trained(recipe, model, x), (x,), **options)


def changes_of(stages):
    return {stage.name: stage.changes for stage in stages}


def differences(stages):
    """Name of each stage but the first → the lines that it changed."""
    texts = [stage.text.splitlines() for stage in stages]
    pairs = zip(stages[1:], texts, texts[1:], strict=False)
    return {stage.name: [*difflib.unified_diff(a, b, n=0, lineterm="")][2:] for stage, a, b in pairs}


def test_golden_export_stages(golden):
    """A linear layer as it is traced and translated, and every pass of both pipelines that changes it."""
    stages = stages_of("tensor-int8", nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), dynamic_batch=False)
    whole, later = {"traced", "restore-strides", "translated"}, differences(stages)
    joint = {step.name for step in joint_pipeline(qcompiler.RECIPES["identity"]).passes}
    texts = {stage.name: stage.text for stage in stages if stage.name in whole}
    changed = {stage.name: stage for stage in stages if stage.changes and stage.name not in joint}
    texts |= {f"{name} {stage.changes}": "\n".join([*later[name], ""]) for name, stage in changed.items()}
    golden(**texts)


@pytest.mark.parametrize("recipe", ["deploy-int8", "hyperblock-int4", "lsq-w4a4"])
def test_a_pass_without_changes_has_no_difference_and_every_other_one_has_some(recipe):
    stages = stages_of(recipe, Images(), torch.randn(2, 3, 6, 6))
    changed = differences(stages)
    for stage in stages[1:]:
        if stage.name not in ("translated", *WORDLESS):
            assert bool(changed[stage.name]) == (stage.changes > 0), stage.name
    assert sum(stage.changes > 0 for stage in stages) > 8


def test_every_pass_has_its_stage_in_order():
    stages = stages_of("identity", nn.Linear(4, 3), torch.randn(2, 4))
    joint = [step.name for step in joint_pipeline(qcompiler.RECIPES["identity"]).passes]
    frozen, onnx = ([step.name for step in line.passes] for line in (frozen_pipeline(), onnx_pipeline()))
    assert [stage.name for stage in stages] == ["traced", *joint, *frozen, "translated", *onnx]
    assert subject.list_names() == [stage.name for stage in stages]
    assert [stage.drawn is None for stage in stages].index(True) == 1 + len(joint) + len(frozen)


def test_the_last_stage_is_the_file(tmp_path):
    qmodel, path = trained("deploy-int8", Images(), torch.randn(2, 3, 6, 6)), tmp_path / "m.onnx"
    stages = subject.export_stages(qmodel, (torch.randn(2, 3, 6, 6),))
    assert list(tmp_path.iterdir()) == []
    qcompiler.export_onnx(qmodel, path, (torch.randn(2, 3, 6, 6),))
    assert model_text(ir.load(path)) == stages[-1].text


def test_graphs_are_copies():
    """What the passes change later changes no stage before."""
    stages = stages_of("deploy-int8", Images(), torch.randn(2, 3, 6, 6))
    graphs = [stage for stage in stages if stage.drawn is not None]
    assert [graph_text(stage.drawn.graph) for stage in graphs] == [stage.text for stage in graphs]


def test_looking_changes_nothing():
    x = torch.randn(2, 3, 6, 6)
    qmodel = trained("in-hindsight-w8a8g8", Images(), x)
    before = [*map(torch.clone, qmodel.state_dict().values())]
    first, second = (subject.export_stages(qmodel, (x,)) for _ in range(2))
    assert [stage.text for stage in first] == [stage.text for stage in second]
    assert all(map(torch.equal, before, qmodel.state_dict().values()))
    assert qmodel.training
    with pytest.raises(qcompiler.CompileError, match="nothing is captured yet"):
        qmodel.stages(training=False)


def find_lines(wanted):
    """The first line with a text in the last stage of each export."""
    return [next(line for line in one[-1].text.splitlines() if part in line) for one, part in wanted]


def test_ranges_of_data_and_fixed_shapes():
    x = torch.randn(2, 3, 6, 6)
    qmodel = trained("current-w8a8g8", Images(), x)
    measured = subject.export_stages(qmodel, (x,))
    fixed = subject.export_stages(qmodel, (x,), calibration=[(x,)], dynamic_batch=False)
    quantizers = next(stage.text for stage in fixed if stage.name == "save-quantized").count("= qcompiler.quantize(")
    weights = 3
    counts = [changes_of(stages)["calibrate-ranges"] for stages in (measured, fixed)]
    assert counts == [0, quantizers - weights]
    assert find_lines([(measured, "= input"), (fixed, "= input")]) == [
        "%x : FLOAT[batch,3,6,6] = input",
        "%x : FLOAT[2,3,6,6] = input",
    ]


def test_options_of_the_file():
    x = torch.randn(2, 3, 6, 6)
    qmodel = trained("deploy-int8", Images(), x)
    folded, kept = (subject.export_stages(qmodel, (x,), fold_batch_norm=fold) for fold in (True, False))
    assert [changes_of(stages)["fold-batch-norms"] for stages in (folded, kept)] == [1, 0]
    assert [stages[-1].text.count("BatchNormalization(") for stages in (folded, kept)] == [0, 1]
    named = subject.export_stages(qmodel, (), example_kwargs={"x": x}, dynamic_shapes={"x": {0: "n"}}, opset=22)
    assert named[-1].text.startswith("%x : FLOAT[n,3,6,6] = input\n")


def test_signed_weights():
    x = torch.randn(2, 4)
    qmodel = trained("tensor-int8", nn.Linear(4, 3), x)
    plain, signed = (subject.export_stages(qmodel, (x,), signed_weights=signed) for signed in (False, True))
    lines = find_lines([(plain, "weight/codes :"), (signed, "weight/codes :")])
    assert [line.split()[2] for line in lines] == ["UINT8[3,4]", "INT8[3,4]"]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (
            (),
            {},
            r"^export: inputs: missing a required argument: 'input'; got \(\); valid: .* of forward\(input\)$",
        ),
        (
            (torch.ones(2, 4), 3),
            {},
            r"too many positional arguments; got \(float32 2×4, int\); valid: the arguments of forward\(input\)$",
        ),
        (
            (torch.ones(2, 4),),
            {"example_kwargs": {"input": 3}},
            r"multiple values for argument 'input'; got \(float32 2×4, input=int\); valid: .* of forward\(input",
        ),
        (
            (torch.ones(2, 4),),
            {"example_kwargs": "x"},
            r"^export: example_kwargs: got 'x'; valid: a mapping of the names",
        ),
        (
            (torch.ones(2, 4),),
            {"example_kwargs": ""},
            r"^export: example_kwargs: got ''; valid: a mapping of the names",
        ),
        (
            (torch.ones(2, 4),),
            {"example_kwargs": {1: 2}},
            r"^export: example_kwargs: got {1: 2}; valid: a mapping of the",
        ),
        ((torch.ones(2, 4),), {"fold_batch_norm": "no"}, r"^export: fold_batch_norm: got 'no'; valid: True, False$"),
        ((torch.ones(2, 4),), {"signed_weights": 1}, r"^export: signed_weights: got 1; valid: True, False$"),
        ((torch.ones(2, 4),), {"dynamic_batch": None}, r"^export: dynamic_batch: got None; valid: True, False$"),
        (None, {}, r"^export: inputs: got NoneType; valid: a tuple, such as \(x,\)$"),
        (torch.ones(2, 4), {}, r"^export: inputs: got Tensor; valid: a tuple, such as \(x,\)$"),
        ((torch.ones(2, 5),), {}, r"^export: the model does not run on the inputs input \(float32 2×5\)"),
        ((torch.ones(2, 4),), {"opset": 20}, r"^export: opset: got 20; valid: whole numbers from 21"),
        ((torch.ones(2, 4),), {"calibration": 3}, r"^export: calibration: got int; valid: an iterable"),
    ],
)
def test_wrong_calls(inputs, options, message):
    qmodel = qcompiler.compile(nn.Linear(4, 3), "tensor-int8", backend="eager")
    with pytest.raises(qcompiler.ExportError, match=message):
        qcompiler.export_stages(qmodel, inputs, **options)


def test_a_module_that_is_not_compiled_and_ranges_without_a_value():
    with pytest.raises(qcompiler.ExportError, match=r"^export_stages: got Linear; valid: what qcompiler\.compile"):
        qcompiler.export_stages(nn.Linear(4, 3), (torch.ones(2, 4),))
    qmodel = qcompiler.compile(nn.Linear(4, 3), "deploy-int8", backend="eager")
    with pytest.raises(qcompiler.ExportError, match=r"^export: no range yet for \(root\)/input; train the model"):
        qcompiler.export_stages(qmodel, (torch.ones(2, 4),))


@pytest.mark.parametrize("name", ["freeze-quantizers", "lower-quantizers", "translated"])
def test_stages_of_training_say_who_has_those_of_an_export(name):
    qmodel = trained("tensor-int8", nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(qcompiler.StageError, match=r"an export has others: qcompiler\.export_stages, or show --export"):
        qmodel.to_networkx(stage=name)
    with pytest.raises(qcompiler.StageError, match=r"^(?!.*did you mean)"):
        qmodel.to_networkx(stage=name)
    with pytest.raises(qcompiler.StageError, match=r"did you mean 'place-quantizers'\?"):
        qmodel.to_networkx(stage="place-quantizer")
    with pytest.raises(qcompiler.StageError, match=r"^stage: got 'lowered'; valid: traced, split-convolution-backward"):
        subject.check_stage("lowered")
    subject.check_stage(name)
