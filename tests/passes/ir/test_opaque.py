"""Kernels that multiply inside: every operator of torch that is known to count multiplications is known here."""

import operator

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from qcompiler.passes.ir.opaque import explain_call, explain_name, is_reached

aten = torch.ops.aten


def is_opaque(target):
    return bool(explain_name(target))


def overloads(packet):
    """Every overload of an operator that makes a new tensor; higher-order operators are their own."""
    if not hasattr(packet, "overloads"):
        return [packet]
    found = [getattr(packet, name) for name in packet.overloads()]
    return [one for one in found if not any(argument.is_out for argument in one._schema.arguments)]


@pytest.mark.parametrize("packet", flop_registry, ids=str)
def test_every_operator_with_a_count_of_multiplications_is_reached_or_opaque(packet):
    assert overloads(packet)
    for one in overloads(packet):
        assert is_reached(one) != is_opaque(one), one


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("_scaled_dot_product_flash_attention_for_cpu_backward", "fused attention"),
        ("_cudnn_attention_forward", "fused attention"),
        ("_native_multi_head_attention", "fused inference kernel of multi-head"),
        ("_transformer_encoder_layer_fwd", "fused inference kernel of a whole"),
        ("mkldnn_rnn_layer_backward", "fused recurrent"),
        ("_thnn_fused_lstm_cell_backward_impl", "fused recurrent"),
        ("miopen_rnn", "fused recurrent"),
        ("mkldnn_convolution", "convolution of a kernel of its own"),
        ("_conv_depthwise2d", "convolution of a kernel of its own"),
        ("conv_tbc", "convolution with channels last"),
        ("mkldnn_linear_backward_weights", "fused kernel of products"),
        ("_addmm_activation", "fused kernel of products"),
        ("_sparse_semi_structured_linear", "product of a sparse matrix"),
        ("_weight_int8pack_mm", "already an integer product"),
        ("_scaled_grouped_mm", "grouped product"),
        ("linalg_matrix_exp", "product of matrices"),
        ("affine_grid_generator", "grid"),
        ("addbmm", "sum of products"),
    ],
)
def test_reasons(name, reason):
    assert explain_name(getattr(aten, name).default).startswith(reason)


@pytest.mark.parametrize(
    "name",
    [
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_trilinear3d",
        "upsample_trilinear3d_backward",
        "_cudnn_rnn_flatten_weight",
        "_convert_weight_to_int4pack",
        "mkldnn_reorder_conv2d_weight",
        "linalg_vector_norm",
        "elu_backward",
        "grid_sampler_2d",
        "linalg_inv_ex",
        "mul",
    ],
)
def test_names_that_only_look_so(name):
    overload = getattr(aten, name).overloads()[0]
    assert explain_name(getattr(getattr(aten, name), overload)) == ""


def test_a_result_of_another_type_is_no_contraction_of_ours():
    assert not is_opaque(aten.mm.default)
    assert explain_name(aten.mm.dtype) == "product of another type than its operands"


@pytest.fixture(scope="module")
def foreign():
    """foreign(name) → an operator that another library defines."""
    library = torch.library.Library("opaque_tests", "DEF")

    def define(name):
        library.define(f"{name}(Tensor x) -> Tensor")
        return getattr(torch.ops.opaque_tests, name).default

    yield define
    library._destroy()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("deform_conv2d", True), ("flash_attn_fwd", True), ("fast_mm", True), ("convert", False), ("rnnt_loss", False)],
)
def test_operators_of_other_libraries_are_known_by_their_names(name, expected, foreign):
    assert is_opaque(foreign(name)) == expected


def test_functions_in_graphs_that_are_not_taken_apart():
    assert all(map(is_opaque, (F.linear, torch.matmul, torch.conv2d, F.scaled_dot_product_attention)))
    assert not any(map(is_opaque, (F.relu, torch.add, operator.getitem)))


@pytest.mark.parametrize(
    ("given", "returned", "suspected"),
    [
        (((2, 3), (4, 3)), torch.float32, True),
        (((2, 3), (4, 3)), torch.complex64, True),
        (((2, 3), (4, 3)), torch.int64, False),  # boxes to keep, for one
        (((2, 3), (3,)), torch.float32, False),
        (((2, 3),), torch.float32, False),
    ],
)
def test_an_operator_of_a_neutral_name_that_may_multiply(given, returned, suspected, foreign):
    target = foreign(f"project{len(given)}{returned}{given[-1]}".translate({ord(c): "_" for c in ".(), "}))
    tensors = [torch.empty(shape) for shape in given]
    result = torch.empty(2, dtype=returned)
    for results in (result, (None, result)):
        assert explain_call(target, [*tensors, None, 2], results).startswith("operator of") == suspected
    assert explain_call(aten.add.Tensor, tensors, result) == ""
