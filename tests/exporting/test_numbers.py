"""What onnxruntime's optimizations make of an exported file: sums that do not saturate, no quantizer of its own, ranges
fixed on data."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.exporting import run
from qcompiler.exporting.inputs import as_example
from qcompiler.exporting.report import list_approximate
from qcompiler.runtime.spec import parse_spec


def exported(model, recipe, x, path, **options):
    """(module after a step, report)."""
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    qmodel(x).float().square().sum().backward()
    return qmodel, qcompiler.export_onnx(qmodel, path, (x,), **options)


def eight_bits():
    """`deploy-int8` with 8 bits for weights."""
    seven, *others = qcompiler.RECIPES["deploy-int8"].rules
    eight = dataclasses.replace(seven, spec=parse_spec("int8:real:i*s*:nearest:pass"))
    return dataclasses.replace(qcompiler.RECIPES["deploy-int8"], name="eight", rules=(eight, *others))


@pytest.fixture(scope="module", params=["7 bits, int8", "8 bits, uint8"])
def extreme(request, tmp_path_factory):
    """(module, file, input) of a convolution all of whose codes are large: two products of 8 bits pass 2¹⁵."""
    torch.manual_seed(0)
    recipe = "deploy-int8" if request.param.startswith("7") else eight_bits()
    model = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.weight, 0.1)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    x = torch.rand(4, 16, 6, 6) * 0.2 + 0.8
    path = tmp_path_factory.mktemp("numbers") / "model.onnx"
    qmodel, report = exported(model, recipe, x, path)
    assert report.integer_kernels["QLinearConv"] == 1
    return qmodel, path, x


def test_sums_of_integer_kernels_do_not_saturate(extreme):
    """A code differs by one at most, and only beside the middle of two codes: by roundings of float32 alone."""
    _, path, x = extreme
    site = run.read_sites(path)["0/output"]
    plain, fused = (
        run.run_inner(path, site["values"][-1:], (x,), {}, optimize=flag)[site["values"][-1]].astype(int)
        for flag in (False, True)
    )
    held = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}
    step = held["0/output/scale"]
    real = run.run_inner(path, site["values"][:1], (x,), {})[site["values"][0]].astype(np.float64) / step
    beside = np.abs(real - np.floor(real) - 0.5)
    assert plain.max() > 200
    assert np.abs(plain - fused).max() <= 1
    # sums of 144 products and a bias, up to 255 steps in size: off by 145·2⁻²⁴·255 of a step
    assert (beside[plain != fused] <= 145 * 2.0**-24 * 255).all()


def test_weights_keep_their_codes_whatever_their_type(extreme, tmp_path):
    qmodel, path, x = extreme
    signed = tmp_path / "signed.onnx"
    notes = qcompiler.export_onnx(qmodel, signed, (x,), signed_weights=True).notes
    name = "0/weight/codes"
    one, other = (
        next(onnx.numpy_helper.to_array(t) for t in onnx.load(str(p)).graph.initializer if t.name == name)
        for p in (path, signed)
    )
    shift = 0 if qmodel.recipe.name == "deploy-int8" else 128
    assert (one.dtype, other.dtype) == (np.uint8 if shift else np.int8, np.int8)
    assert other.max() == (127 if shift else 63)
    assert sum("codes of 2 weights are int8, as asked" in note for note in notes) == bool(shift)
    np.testing.assert_array_equal(one.astype(int) - shift, other)
    assert all(qcompiler.verify_onnx(qmodel, p, (x,)).exact for p in (path, signed))


class Tied(nn.Module):
    """An embedding whose weight is the output projection's."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(32, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.middle(self.embedding(ids)).relu())


@pytest.mark.parametrize("recipe", ["channelwise-int8", "channelwise-int4", "current-w8a8g8", "tensor-int4"])
def test_no_quantizer_of_onnxruntimes_own(recipe, tmp_path):
    """Codes times floats stay a float product: MatMulNBits would round the floats to 8 bits once more."""
    torch.manual_seed(0)
    ids, path = torch.randint(0, 32, (8, 6)), tmp_path / "model.onnx"
    qmodel, report = exported(Tied(), recipe, ids, path)
    assert report.integer_kernels == {}
    assert report.difference <= 1e-5
    assert qcompiler.verify_onnx(qmodel, path, (ids,)).close


@pytest.mark.parametrize("bias", [True, False])
def test_nor_for_a_weight_without_a_transposition(bias, tmp_path):
    """A rotated weight has none; it is stored transposed, and its codes are those of training."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=bias) for _ in range(4)))
    x, path = torch.randn(8, 32), tmp_path / "model.onnx"
    qmodel, report = exported(model, "int4-hadamard", x, path)
    assert report.exported["weight"] == 2
    assert report.integer_kernels == {}
    assert not any("MatMulNBits" in note for note in report.notes)
    found = qcompiler.verify_onnx(qmodel, path, (x,))
    assert found.exact
    assert found.close
    assert [one["order"] for one in run.read_sites(path).values() if one["kind"] == "weight"] == [[1, 0]] * 2


def test_a_product_in_fewer_bits_is_noted():
    assert list(list_approximate({"QGemm": 1}, run.APPROXIMATE)) == []
    assert list(list_approximate({"MatMulNBits": 2}, run.APPROXIMATE)) == [
        "onnxruntime makes 2 operators MatMulNBits, which rounds floats to 8 bits"
    ]


def normed(layer, rank):
    """A layer and a batch norm with statistics of its own, in front of another layer."""
    torch.manual_seed(0)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d)[rank - 1](16)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.normal_(norm.bias)
    convolution = (nn.Conv1d, nn.Conv2d)[rank - 1]
    return nn.Sequential(layer, norm, nn.ReLU(), convolution(16, 4, 1))


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d])
def test_a_batch_norm_is_not_folded_into_decoded_weights(layer, tmp_path):
    """Optimized or not, each code is the same: of weights that onnxruntime decodes early nothing else is made."""
    torch.manual_seed(2)  # a draw in which no code flips
    rank = 1 if layer is nn.Conv1d else 2
    x, path = torch.randn(64, 8, *[12] * rank), tmp_path / "model.onnx"
    qmodel, _ = exported(normed(layer(8, 16, 3), rank), "hfp8", x, path)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(str(path)).graph.node}
    found = qcompiler.verify_onnx(qmodel, path, (x,))
    assert found.exact
    assert [site.optimized for site in found.sites] == [site.flipped for site in found.sites]
    assert found.optimized == found.plain <= 1e-3  # hfp8 has 3 bits: one flip of 64·144·16 would be above


@pytest.mark.parametrize(("recipe", "options"), [("in-hindsight-w8a8g8", {"fold_batch_norm": False}), ("identity", {})])
def test_a_batch_norm_behind_other_weights_stays_one(recipe, options, tmp_path):
    """Nothing decodes weights of DequantizeLinear early; float weights have no codes, and take the norm in."""
    x, path = torch.randn(8, 8, 12, 12), tmp_path / "model.onnx"
    exported(normed(nn.Conv2d(8, 16, 3), 2), recipe, x, path, **options)
    found = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert ("BatchNormalization" in found, "Neg" in found) == (recipe != "identity", False)


# ---------------------------------------------------------------------------------------------------- calibration


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_ranges_are_those_of_the_data(tmp_path):
    """From the smallest to the largest value of all examples, and the codes are those of that range."""
    path, x = tmp_path / "model.onnx", torch.randn(5, 6)
    data = [(torch.randn(n, 6),) for n in (4, 1, 7)]
    qmodel, report = exported(net(), "current-w8a8g8", x, path, calibration=iter(data))
    joined = torch.cat([one for (one,) in data])
    assert report.exported["dynamic"] == 0
    assert report.calibrated["0/input"] == (joined.min().item(), joined.max().item())
    held = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}
    low, high = min(joined.min().item(), 0), max(joined.max().item(), 0)
    assert held["0/input/scale"] == pytest.approx((high - low) / 255, rel=1e-6)
    assert held["0/input/zero_point"] == round(-low / (high - low) * 255)
    assert "calibrated" in str(report)
    assert qcompiler.verify_onnx(qmodel, path, (torch.randn(3, 6),)).exact


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        ("current-w8a8g8", [], "no example has numbers for 0/input"),
        ("current-w8a8g8", [torch.ones(2, 6)], "example 0: got Tensor; valid: a tuple of positional inputs, such as"),
        ("current-w8a8g8", [(torch.ones(2, 6), 1)], "example 0: too many positional"),
        (
            "current-w8a8g8",
            [(torch.ones(2, 5),)],
            r"example 0: the model does not run on input \(float32 2×5\): .*; valid: the sizes of example_inputs, but",
        ),
        (
            "current-w8a8g8",
            [(torch.ones(2, 6).double(),)],
            r"input \(float64 2×6\); valid: input \(float32 \d×6\), but",
        ),
        ("current-w8a8g8", [(torch.ones(2, 6),), {"x": torch.ones(2, 6)}], "example 1: missing a required .*'input'"),
        ("current-w8a8g8", [(torch.full((2, 6), torch.nan),)], "0/input reads what is not finite"),
        ("hyperblock-int8", [(torch.ones(2, 6),)], "0/input has a range for each block"),
        ("deploy-int8", [(torch.ones(2, 6),)], "no activation has the range of the present tensor"),
    ],
)
def test_data_that_does_not_fit(recipe, data, message, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(qcompiler.ExportError, match=message):
        exported(net(), recipe, torch.ones(2, 6), path, calibration=data)
    assert not path.exists()


class Weighted(nn.Module):
    """Two inputs, which may come by position or by name, and one that may be left out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x, w, scale=None):
        y = self.first(x) - self.second(w)
        return y if scale is None else y * scale


def test_examples_by_position_and_by_name(tmp_path):
    """Inputs find their places, whatever the order of the names; what an example leaves out is that of the call."""
    path, (x, w, s) = tmp_path / "model.onnx", [torch.randn(2, 6) for _ in range(2)] + [torch.ones(2, 4)]
    qmodel = qcompiler.compile(Weighted(), "current-w8a8g8", backend="eager")
    full = torch.full_like
    data = [{"scale": s, "w": full(w, 7), "x": full(x, -5)}, ((full(x, 3),), {"w": full(w, -9)}), (full(x, 4),)]
    report = qcompiler.export_onnx(qmodel, path, (x,), example_kwargs={"scale": s, "w": w}, opset=24, calibration=data)
    assert report.calibrated["first/input"] == (-5, 4)
    assert report.calibrated["second/input"] == (-9, 7)
    assert [one.version for one in onnx.load(str(path)).opset_import if not one.domain] == [24]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, 2, 3, 4), "too many positional"),
        ({"x": 1, "y": 2}, "'y'"),
        (((1,), {"x": 2}), "multiple values for argument 'x'"),
        ({"w": 2}, "missing a required argument: 'x'"),
        ({"x": 1, "w": 2, "scale": 3}, "got w, x, scale; valid: the inputs of the example, x, w"),
        (None, r"got NoneType; valid: a tuple of .* \(x,\), a mapping of keyword inputs, or a pair of both"),
    ],
)
def test_examples_that_are_no_call(given, message):
    with pytest.raises(TypeError, match=message):
        as_example(Weighted(), given, (0,), {"w": 0})


class Pinned(nn.Module):
    """Names float32 itself: in its input, inside, and for a constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        y = self.conv(x.to(torch.float32)).float().relu().mean((2, 3))
        return self.head(y.to(torch.float32) + torch.full((8,), 0.1, dtype=torch.float32))


def test_models_that_name_their_type_have_a_twin_in_float64(tmp_path):
    """The spread is what float32 does, so it is neither 0 nor more than some of its steps (2⁻²³, over 27 products)."""
    torch.manual_seed(0)
    qmodel, _ = exported(Pinned(), "deploy-int8", torch.randn(6, 3, 8, 8), tmp_path / "model.onnx")
    found = qcompiler.verify_onnx(qmodel, tmp_path / "model.onnx", (torch.randn(16, 3, 8, 8),))
    assert found.exact
    assert not any(site.own for site in found.sites)
    assert 0 < found.spread < 2**-18


class Heads(nn.Module):
    """Products of attention, whose operands are quantized in front of a view."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in self.parts)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("recipe", ["int8-large-gradients", "int5-large-gradients"])
def test_quantizers_move_over_views(recipe, tmp_path):
    """onnxruntime refused the file where it had moved a quantizer of int8 over a view."""
    torch.manual_seed(0)
    qmodel, report = exported(Heads(), recipe, torch.randn(2, 5, 8), tmp_path / "model.onnx")
    kept = [one["shift"] for one in run.read_sites(tmp_path / "model.onnx").values() if one["kind"] == "static"]
    assert kept == [128] * 3  # an input that two layers share, two of a product; the first and last are in float
    assert len(kept) == report.exported["static"]
    assert qcompiler.verify_onnx(qmodel, tmp_path / "model.onnx", (torch.randn(7, 5, 8),)).exact


def test_linear_layers_are_integer_kernels_too(tmp_path):
    """A layer between codes is a QGemm; the last one gives floats, and stays a Gemm of floats."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    qmodel, report = exported(model, "deploy-int8", torch.randn(8, 16), tmp_path / "model.onnx")
    assert report.integer_kernels == {"QGemm": 2}
    assert qcompiler.verify_onnx(qmodel, tmp_path / "model.onnx", (torch.randn(33, 16),)).exact


def test_a_file_of_another_module_is_told(tmp_path):
    """Biases and norms have no codes, so that no quantizer shows that they changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    qmodel, _ = exported(model, "deploy-int8", torch.randn(4, 3, 8, 8), tmp_path / "model.onnx")
    x = torch.randn(5, 3, 8, 8)
    assert qcompiler.verify_onnx(qmodel, tmp_path / "model.onnx", (x,)).changed == ()
    model[4].bias.data[1] += 1e-6
    model[1].running_mean[3] += 0.1
    found = qcompiler.verify_onnx(qmodel, tmp_path / "model.onnx", (x,))
    assert found.changed == ("4.bias", "1.running_mean")
    assert not found.exact
    assert not any(site.wrong for site in found.sites)
    assert "the file was made of another 4.bias, 1.running_mean" in str(found)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0),
        ([float("inf"), 2.0], [float("inf"), 2.5], 0.2),
        ([1.0, 2.0], [float("nan"), 2.0], float("inf")),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([float("inf")], [float("-inf")], float("inf")),
        ([3], [4], 0.25),
        ([True], [False], 1),
        ([], [], 0),
    ],
)
def test_differences_of_outputs(found, expected, difference):
    """No NaN is close to a number, and an index that differs counts."""
    assert run.measure_difference([np.array(found)], [np.array(expected)]) == difference


class Pair(nn.Module):
    """Two inputs by keyword that cannot be taken for each other."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, a, b):
        return self.layer(x) * a - b


def test_inputs_by_keyword_in_any_order(tmp_path):
    torch.manual_seed(0)
    x, a, b = torch.randn(3, 3, 4)
    qmodel = qcompiler.compile(Pair(), "hyperblock-int8", backend="eager")
    qcompiler.export_onnx(qmodel, tmp_path / "model.onnx", (x,), example_kwargs={"b": b, "a": a})
    for given in ({"a": a, "b": b}, {"b": b, "a": a}):
        assert qcompiler.verify_onnx(qmodel, tmp_path / "model.onnx", (x,), kwargs=given).close
