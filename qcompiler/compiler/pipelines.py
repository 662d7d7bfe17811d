"""The order of the passes: the table of contents of the compiler. That over ONNX: qcompiler/exporting/pipeline.py."""

import functools
import types
from collections.abc import Mapping, Sequence

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
from qcompiler.passes.halves.call_kernels import CallKernels, Tally
from qcompiler.passes.halves.draw_in_forward import DrawInForward
from qcompiler.passes.halves.drop_packing import DropPacking
from qcompiler.passes.halves.halves import Halves, check_halves, clean_halves
from qcompiler.passes.halves.join_gradients import JoinGradients
from qcompiler.passes.halves.join_norms import JoinNorms
from qcompiler.passes.halves.lower_convolutions import LowerConvolutions
from qcompiler.passes.halves.lower_integer import Execution, LowerInteger
from qcompiler.passes.halves.order_outputs import OrderOutputs
from qcompiler.passes.halves.pack_saved import PackSaved
from qcompiler.passes.halves.partition import Partition
from qcompiler.passes.halves.quantize_again import QuantizeAgain
from qcompiler.passes.halves.recompute_floats import RecomputeFloats
from qcompiler.passes.halves.relax_views import RelaxViews
from qcompiler.passes.halves.restore_halves import RestoreHalves
from qcompiler.passes.halves.save_activations import SaveActivations
from qcompiler.passes.halves.save_codes import SaveCodes
from qcompiler.passes.halves.save_derivatives import SaveDerivatives
from qcompiler.passes.halves.save_masks import SaveMasks
from qcompiler.passes.halves.save_pool_windows import SavePoolWindows
from qcompiler.passes.halves.sink_floats import SinkFloats
from qcompiler.passes.halves.split_norms import SplitNorms
from qcompiler.passes.halves.stack_ranges import StackRanges
from qcompiler.passes.halves.start_ranges import StartRanges
from qcompiler.passes.ir.checker import GraphChecker
from qcompiler.passes.ir.frame import WHOLE, Frame
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.choose_blocks import ChooseBlocks
from qcompiler.passes.joint.dedupe_quantizers import DedupeQuantizers
from qcompiler.passes.joint.forget_values import ForgetValues
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
from qcompiler.passes.rules import Rule
from qcompiler.recipes.recipe import Recipe


def joint_pipeline(recipe: Recipe, *, frozen: bool = False, frame: Frame = WHOLE) -> Pipeline[GraphModule]:
    """Return the passes that quantize a captured graph by a recipe.

    The code of the module stays old until `recompile`: what runs is made of the graph.

    Args:
        frozen: for eval mode, in which ranges do not move.
        frame: the place of the graph in its model.
    """
    return Pipeline(
        (
            SplitConvolutionBackward(),  # one product a node
            ForgetValues(),  # of tensors whose shape alone is read
            AnnotateRoles(frame),  # role and summed axis of every operand
            RotateOperands(recipe.rules),  # outliers spread along the summed axis
            PlaceQuantizers(recipe.rules, frame),  # a quantizer in front of every operand
            ChooseBlocks(),  # a legal block for every reader
            MaskGradients(),  # the backward of a quantizer that clips
            LearnRanges(),  # the gradients of learned ranges
            HoistViews(),  # up to the tensor that readers share
            DedupeQuantizers(),  # one quantizer a tensor
            ThreadRanges(frozen),  # ranges of the past, in and out
            RoundBiases(active=frozen and recipe.integer_biases),  # as integer engines add them, in eval
            SaveQuantized(pinned=recipe.saves),  # codes, scales and bits for backward
            RestoreStrides(),  # as traced, for every operator that is no contraction
        ),
        GraphChecker(),
    )


def halves_pipeline(rules: Sequence[Rule] = (), execution: Execution = Execution.SIMULATE) -> Pipeline[Halves]:
    """Return the passes from a quantized joint graph to the halves that run; a graph without gradients is one half.

    Args:
        rules: of the recipe; those of the role *saved* say which floats are saved as codes.
        execution: which contractions of codes are computed as integers.
    """
    return Pipeline(
        (
            RecomputeFloats(),  # codes, not floats, in regions that the user checkpoints
            OrderOutputs(),  # states after forward in front of the gradients
            SplitNorms(),  # results of norms can be computed again
            Partition(torch_compat.split_joint),  # forward, backward, and the saved tensors
            JoinNorms(),  # forward computes them once
            DrawInForward(),  # one random key, so that backward can run twice
            QuantizeAgain(),  # parameters, which are alive anyway
            SaveCodes(),  # in place of floats that backward computes with again
            SaveMasks(tuple(rules)),  # bits, not codes that backward would compare
            SaveDerivatives(tuple(rules)),  # in place of inputs of activation functions
            SaveActivations(tuple(rules)),  # codes, not floats, for operators that are no contractions
            PackSaved(),  # masks and short codes
            SavePoolWindows(),  # bytes, not indices
            DropPacking(),  # of codes that one half makes and reads
            RestoreHalves(),  # strides as traced, in nodes that backward computes anew
            RelaxViews(),  # of tensors whose strides the compiler chooses
            LowerConvolutions(execution),  # products of patches of codes
            LowerInteger(execution),  # products of codes, without floats in between
        ),
        functools.partial(check_halves, check=GraphChecker()),
    )


def start_pipeline(*, first: bool) -> Pipeline[Halves]:
    """Return the passes that make, of a half that runs, the copy for first steps, or for the steps that follow them."""
    return Pipeline((StartRanges(first),), check_halves)


def kernel_pipeline(tally: Tally | None = None) -> Pipeline[Halves]:
    """Return the passes over the copy of a half that a compiler gets; a tally counts the quantizers."""
    return Pipeline(
        (
            StackRanges(),  # in hindsight, of all sites at once
            CallKernels(tally or Tally()),  # quantizers in one pass through memory
            JoinGradients(),  # both of a convolution in one call
            SinkFloats(),  # of codes, to where they are read
        ),
        clean_halves,
    )


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
