"""Wrong calls: each says what was given, what would be valid, and does so in an exception of ours."""

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.errors import CaptureError
from qcompiler.passes.base import PassError
from qcompiler.passes.ir.verify import VerifyError
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops, references
from qcompiler.runtime.numbers.blocks import Block, parse_block, view_blocks
from qcompiler.runtime.numbers.formats import IntFormat, parse_format
from qcompiler.runtime.spec import QuantSpec, parse_spec

pytestmark = pytest.mark.usefixtures("fresh")

INT8 = "int8:fit:tensor:nearest:pass"
NOISY = "int8:fit:tensor:stochastic:pass"
X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((torch.relu,), {}, r"^compile: got builtin_function_or_method; valid: a torch\.nn\.Module$"),
        ((nn.Linear,), {}, r"^compile: got type; valid: a torch\.nn\.Module$"),
        ((None,), {}, r"^compile: got NoneType; valid"),
        ((nn.ReLU(),), {"backend": "inducter"}, r"^compile: unknown backend 'inducter'; .* you mean 'inductor'\?$"),
        ((nn.ReLU(),), {"backend": "onnx"}, r"^compile: unknown backend 'onnx'; valid: eager, inductor or None"),
        ((nn.ReLU(),), {"backend": 8}, r"^compile: unknown backend 8; valid: eager, inductor or None$"),
    ],
)  # fmt: skip
def test_compile(args, options, message):
    with pytest.raises(qcompiler.CompileError, match=message):
        qcompiler.compile(*args, **options)


def test_compile_of_a_compiled_model(models):
    compiled = qcompiler.compile(models.mlp(), "hyperblock-int4")
    with pytest.raises(
        qcompiler.CompileError, match=r"compiled already, by recipe 'hyperblock-int4'; compile the model"
    ):
        qcompiler.compile(compiled)
    with pytest.raises(
        qcompiler.CompileError, match=r"^compile: got what torch\.compile returned; .* model\._orig_mod$"
    ):
        qcompiler.compile(torch.compile(models.mlp(), backend="eager"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("hyperblok-int4", r"^recipe: got 'hyperblok-int4'; valid: a name .*; did you mean 'hyperblock-int4'\?$"),
        ("zzz", r"^recipe: got 'zzz'; valid: a name .*, or the path of a \.yaml file$"),
        (8, r"^recipe: got 8 \(int\); valid: a name, a path, or a Recipe$"),
    ],
)
def test_recipe(models, recipe, message):
    with pytest.raises(qcompiler.RecipeError, match=message):
        qcompiler.compile(models.mlp(), recipe)


def test_recipe_file(models, tmp_path):
    path = tmp_path / "mine.yaml"
    with pytest.raises(FileNotFoundError, match=r"mine\.yaml"):
        qcompiler.compile(models.mlp(), str(path))
    path.write_text("name: mine\nrules:\n- {format: int8, blok: tensor}")
    message = r"mine\.yaml, rule 1: unknown key 'blok'; valid keys: .*; did you mean 'block'\?$"
    with pytest.raises(qcompiler.RecipeError, match=message):
        qcompiler.compile(models.mlp(), str(path))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_spec("int8"), r"^spec: got 'int8'; valid: format:scale:block:rounding:vjp and a range, "),
        (lambda: parse_spec("int8:fit:tensor:nearest"), r"^spec: got 'int8:fit:tensor:nearest'; valid"),
        (lambda: parse_spec("int8:fitt:tensor:nearest:pass"), r"^scale: got 'fitt'; valid: max, fit, real, ceil, "),
        (lambda: parse_spec("int8:fit:tensor:up:pass"), r"^rounding: got 'up'; valid: nearest, stochastic"),
        (lambda: parse_spec("int8:fit:tensor:nearest:ste"), r"^vjp: got 'ste'; valid: pass, clip, or ewgs"),
        (lambda: parse_spec("int8:fit:tensor:nearest:ewgs"), r"^vjp: got 'ewgs'; valid: pass, clip"),
        (lambda: parse_spec("int8:fit:tensor:nearest:ewgs(1e)"), r"^vjp: got 'ewgs\(1e\)'; valid: pass"),
        (lambda: parse_spec("int8:fit:tensor:nearest:ewgs(-1)"), r"^vjp: got 'ewgs\(-1\)'; valid: pass"),
        (lambda: parse_spec("int8:fit:b2:nearest:ewgs(1)"), r"^spec: vjp ewgs\(1\) .* got b2, nearest, int8$"),
        (lambda: parse_spec("e4m3:fit:tensor:nearest:ewgs(1)"), r"^spec: vjp .* got tensor, nearest, e4m3$"),
        (lambda: parse_spec("int8:fit:tensor:stochastic:ewgs(1)"), r"^spec: vjp .* got tensor, stochastic, int8$"),
        (lambda: parse_format("float8"), r"^number format: got 'float8'; valid: int, uint or affine followed by"),
        (lambda: IntFormat(9), r"^integer format: 9 bits are not supported; valid: 2, 3, "),
        (lambda: IntFormat(1), r"^integer format: 1 bits are not supported"),
        (lambda: QuantSpec(format=parse_format("affine8")), r"^spec: affine8 has a zero point and needs scale 'real'"),
        (lambda: parse_block("q4"), r"^block: got 'q4'; valid: 'tensor', 'each', or each axis once with its edge"),
        (lambda: parse_block("c4c8"), r"^block: got 'c4c8'; valid"),
        (lambda: parse_block(""), r"^block: got ''; valid"),
        (lambda: Block(batch=-1), r"^block: edge batch=-1 is not valid"),
        (lambda: view_blocks((4, 6), "bcs", Block()), r"^layout: got 'bcs' for 2 dimensions; valid"),
        (lambda: view_blocks((4, 6, 2), "bcb", Block()), r"^layout: got 'bcb' for 3 dimensions; .* side by side$"),
        (lambda: view_blocks((4, 6), "bz", Block()), r"^layout: got 'bz' for 2 dimensions; valid: one letter of"),
        (lambda: Rule(spec=None, operator="conv"), r"^operator: got 'conv'; valid: .* did you mean 'convolution'\?$"),
        (lambda: Rule(spec="int8"), r"^spec: got 'int8' \(str\); valid: a QuantSpec or None$"),
        (lambda: Rule(spec=None, role="weight"), r"^role: got 'weight' \(str\); valid: a Role or None$"),
        (lambda: Recipe(name="", rules=()), r"^recipe: name: got ''; valid: text that is not empty$"),
        (lambda: Recipe(name="x", rules=[]), r"^recipe 'x': rules: got \[\]; valid: a tuple of Rule$"),
        (lambda: references.scale(X, "int8:fit", "bc"), r"^spec: got 'int8:fit'; valid"),
        (lambda: ops.SCALE(X, INT8, "bcs"), r"^layout: got 'bcs' for 2 dimensions"),
        (lambda: references.quantize(X, references.scale(X, NOISY, "bc"), None, None, NOISY, "bc", "fc/x"),
         r"^quantize: fc/x: spec int8:fit:tensor:stochastic:pass rounds stochastically and needs a key$"),
    ],
)  # fmt: skip
def test_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_plan_before_the_call(models, eager):
    compiled = eager(models.mlp())
    with pytest.raises(
        qcompiler.CompileError, match=r"^plan: nothing is captured yet; call the model once in train\(\) mode$"
    ):
        compiled.plan()
    compiled(torch.randn(6, 12))
    assert compiled.plan().sites == ()
    with pytest.raises(
        qcompiler.CompileError, match=r"once in eval\(\) mode; plan\(training=True\) shows train\(\) mode$"
    ):
        compiled.plan(training=False)


def test_second_derivative(models, eager):
    x = torch.randn(6, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^create_graph=True: a quantized step has no second derivative; leave"):
        torch.autograd.grad(eager(models.mlp())(x).sum(), x, create_graph=True)


def test_options_of_torch_compile(models):
    for options, message in [
        (
            {"recip": "identity"},
            r"CompileError: options: unknown option 'recip'; valid: recipe, .*; did you mean 'recipe'\?",
        ),
        ({"backend": "eagre"}, r"CompileError: compile: unknown backend 'eagre'; .*did you mean 'eager'\?"),
        ({"recipe": "identiti"}, r"RecipeError: recipe: got 'identiti'; valid: .*; did you mean 'identity'\?"),
    ]:
        compiled = torch.compile(models.mlp(), backend="qcompiler", options=options)
        with pytest.raises(RuntimeError, match=message):  # torch.compile is the user's call, so its wrapper stays
            compiled(torch.randn(6, 12))


def test_data_of_another_shape(models, eager):
    """Also in the middle of training, behind a call that was right and in front of another."""

    def forward(self, x, cut):
        if cut:
            self.layer.weight.data = self.layer.weight.data[:2]
        return self.layer(x)

    compiled, x = eager(models.Function(forward, layer=nn.Linear(4, 4, bias=False))), torch.ones(2, 4)
    compiled(x, False)
    if torch.__version__ >= "2.15":  # Dynamo breaks the graph there, and the shape changes as in eager
        assert compiled(x, True).shape == compiled(x, False).shape == (2, 2)
        return
    with pytest.raises(CaptureError, match=r"^layer.weight.data: got the shape \[2, 4\]; valid: \[4, 4\], as before$"):
        compiled(x, True)
    assert compiled(x, False).shape == (2, 4)


def test_error_of_a_pass(models, eager, monkeypatch):
    """The user sees our exception, chained to the cause, and no wrapper of Dynamo's."""

    def fail(self, module):
        raise VerifyError("node_7: is not legal")

    monkeypatch.setattr(PlaceQuantizers, "__call__", fail)
    with pytest.raises(PassError, match=r"^pass place-quantizers failed .*: node_7: is not legal$") as caught:
        eager(models.mlp(), "hyperblock-int8")(torch.randn(6, 12))
    assert type(caught.value) is PassError
    assert type(caught.value.__cause__) is VerifyError


def test_strict_error_comes_without_the_wrapper(models, eager):
    rule = Rule(spec=parse_spec(INT8), role=Role.WEIGHT)
    compiled = eager(models.mlp(), Recipe(name="weights", rules=(rule,)), strict=True)
    with pytest.raises(
        qcompiler.CompileError, match=r"^strict: left in float: 0/input in 0 forward: no rule"
    ) as caught:
        compiled(torch.randn(6, 12))
    assert type(caught.value) is qcompiler.CompileError


def test_errors_of_the_model_are_its_own(models, eager):
    """What the model itself raises, and a wrong number of inputs, reach the user as in eager."""

    def refuse(self, x):
        if len(x) > 2:
            raise ValueError(f"at most 2 samples, got {len(x)}")
        return self.layer(x)

    compiled = eager(models.Function(refuse, layer=nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="at most 2 samples, got 3"):
        compiled(torch.randn(3, 4))
    assert compiled(torch.randn(2, 4)).shape == (2, 4)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        eager(models.mlp())()


def test_wrong_state(models, eager):
    compiled = eager(models.mlp())
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        compiled.load_state_dict({**compiled.state_dict(), "0.weight": torch.zeros(1)})
    with pytest.raises(AttributeError, match="has no attribute 'weights'"):
        _ = compiled.weights
