"""The order of the passes: the table of contents of the compiler. That over ONNX: qcompiler/exporting/pipeline.py."""

import types
from collections.abc import Mapping

from torch.fx import GraphModule

from qcompiler.compiler import torch_compat
from qcompiler.passes.base import Pipeline
from qcompiler.passes.frozen.calibrate_ranges import Calibrated, CalibrateRanges
from qcompiler.passes.frozen.fold_batch_norms import FoldBatchNorms
from qcompiler.passes.frozen.freeze_biases import FreezeBiases
from qcompiler.passes.frozen.freeze_quantizers import FreezeQuantizers
from qcompiler.passes.frozen.frozen_graph import FrozenGraph, verify_frozen
from qcompiler.passes.frozen.transpose_weights import TransposeWeights
from qcompiler.passes.frozen.unite_blocks import UniteBlocks
from qcompiler.passes.halves.draw_in_forward import DrawInForward
from qcompiler.passes.halves.halves import Halves, check_halves
from qcompiler.passes.halves.lower_integer import Execution, LowerInteger
from qcompiler.passes.halves.order_outputs import OrderOutputs
from qcompiler.passes.halves.partition import Partition
from qcompiler.passes.halves.recompute_floats import RecomputeFloats
from qcompiler.passes.halves.relax_views import RelaxViews
from qcompiler.passes.halves.restore_halves import RestoreHalves
from qcompiler.passes.halves.save_codes import SaveCodes
from qcompiler.passes.halves.start_ranges import StartRanges
from qcompiler.passes.ir.frame import WHOLE, Frame
from qcompiler.passes.ir.verify import finish_and_verify
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.choose_blocks import ChooseBlocks
from qcompiler.passes.joint.dedupe_quantizers import DedupeQuantizers
from qcompiler.passes.joint.hoist_views import HoistViews
from qcompiler.passes.joint.learn_ranges import LearnRanges
from qcompiler.passes.joint.mask_gradients import MaskGradients
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.joint.restore_strides import RestoreStrides
from qcompiler.passes.joint.rotate_operands import RotateOperands
from qcompiler.passes.joint.round_biases import RoundBiases
from qcompiler.passes.joint.save_quantized import SaveQuantized
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward
from qcompiler.passes.joint.thread_ranges import ThreadRanges
from qcompiler.recipes.recipe import Recipe


def joint_pipeline(recipe: Recipe, *, frozen: bool = False, frame: Frame = WHOLE) -> Pipeline[GraphModule]:
    """Return the passes that quantize a captured graph by a recipe.

    Args:
        frozen: for eval mode, in which ranges do not move.
        frame: the place of the graph in its model.
    """
    return Pipeline(
        (
            SplitConvolutionBackward(),  # one product a node
            AnnotateRoles(frame),  # what every operand is, and which axis is summed
            RotateOperands(recipe.rules),  # outliers spread along the summed axis
            PlaceQuantizers(recipe.rules, frame),  # a quantizer in front of every operand
            ChooseBlocks(),  # a legal block for every reader
            MaskGradients(),  # its backward, where it clips
            LearnRanges(),  # the gradients of learned ranges
            HoistViews(),  # up to the tensor that readers share
            DedupeQuantizers(),  # one quantizer a tensor
            ThreadRanges(frozen),  # ranges of the past, in and out
            RoundBiases(active=frozen and recipe.integer_biases),  # as integer engines add them, in eval
            SaveQuantized(),  # codes, scales and bits for backward
            RestoreStrides(),  # as traced, for every operator that is no contraction
        ),
        finish_and_verify,
    )


def halves_pipeline(execution: Execution = Execution.SIMULATE) -> Pipeline[Halves]:
    """Return the passes from a quantized joint graph to the halves that run; a graph without gradients is one half.

    Args:
        execution: which contractions of codes are computed as integers.
    """
    return Pipeline(
        (
            RecomputeFloats(),  # codes, not floats, of what the user checkpoints
            OrderOutputs(),  # states after forward in front of the gradients
            Partition(torch_compat.split_joint),  # what is saved, and what is computed again
            DrawInForward(),  # one random key, so that backward can run twice
            SaveCodes(),  # in place of floats that backward computes with again
            RestoreHalves(),  # strides as traced, in what backward computes anew
            RelaxViews(),  # of tensors whose strides the compiler chooses
            LowerInteger(execution),  # products of codes, without floats in between
        ),
        check_halves,
    )


def start_pipeline(*, first: bool) -> Pipeline[Halves]:
    """Return the passes that make, of a half that runs, the copy for first steps, or for the steps that follow them."""
    return Pipeline((StartRanges(first),), check_halves)


def frozen_pipeline(
    calibrated: Mapping[str, Calibrated] = types.MappingProxyType({}), *, fold_batch_norm: bool = True
) -> Pipeline[FrozenGraph]:
    """Return the passes over an eval graph whose parameters and ranges are known, before the graph is exported.

    Args:
        calibrated: site → a range that was measured on data, in place of the range of the present tensor.
        fold_batch_norm: batch norms become part of the convolution in front, if the codes of its weight stay.
    """
    return Pipeline(
        (
            FreezeBiases(),  # rounded biases are constants
            CalibrateRanges(calibrated),  # ranges that data gave
            UniteBlocks(),  # one block, if all have the same known range
            FreezeQuantizers(),  # weights are codes, known ranges are scales
            TransposeWeights(),  # as the kernels of their contraction read them
            FoldBatchNorms(fold_batch_norm),  # into scales and bias of a convolution
        ),
        verify_frozen,
    )
