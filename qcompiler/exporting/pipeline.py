"""The order of the passes over an ONNX model in memory."""

from qcompiler.exporting.exported_model import ExportedModel, verify_structure
from qcompiler.exporting.passes.add_functions import AddFunctions
from qcompiler.exporting.passes.close_windows import CloseWindows
from qcompiler.exporting.passes.lower_quantizers import LowerQuantizers
from qcompiler.exporting.passes.move_relus import MoveRelus
from qcompiler.exporting.passes.name_nodes import NameNodes
from qcompiler.exporting.passes.open_batch_norms import OpenBatchNorms
from qcompiler.exporting.passes.remove_unused import RemoveUnused
from qcompiler.exporting.passes.rename_dimensions import RenameDimensions
from qcompiler.exporting.passes.separate_quantizers import SeparateQuantizers
from qcompiler.exporting.passes.shield_float_kernels import ShieldFloatKernels
from qcompiler.exporting.passes.shield_four_bits import ShieldFourBits
from qcompiler.exporting.passes.split_biases import SplitBiases
from qcompiler.exporting.passes.split_clips import SplitClips
from qcompiler.exporting.passes.transpose_in_gemms import TransposeInGemms
from qcompiler.passes.base import Pipeline


def onnx_pipeline(*, signed_weights: bool = False) -> Pipeline[ExportedModel]:
    """Return the passes over an ONNX model in memory.

    Args:
        signed_weights: codes of weights stay int8, though kernels of some CPUs saturate.
    """
    return Pipeline(
        (
            LowerQuantizers(signed_weights),  # stored codes, QuantizeLinear, functions
            TransposeInGemms(),  # of weights: no MatMulNBits
            MoveRelus(),  # from behind a view to their linear layer
            SplitClips(),  # beside 4 bits, into Max and Min
            OpenBatchNorms(),  # that onnxruntime would fold into decoded weights
            ShieldFourBits(),  # no kernel on codes of 4 bits
            ShieldFloatKernels(),  # no kernel on codes that gives other numbers
            SeparateQuantizers(),  # that onnxruntime would make one
            RemoveUnused(),  # scales of stand-ins, floats of weights
            AddFunctions(),  # that nodes call
            NameNodes(),  # after their layer
            CloseWindows(),  # of max pools, as torch counts them
            RenameDimensions(),  # as the user calls them
            SplitBiases(),  # that onnxruntime would round
        ),
        verify_structure,
    )
