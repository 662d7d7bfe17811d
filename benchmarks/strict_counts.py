"""Contractions that plain PyTorch executes, counted by a mode that sees every operator; uses nothing of qcompiler."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

#: operators that multiply and have no formula in torch's table of FLOPs
WITHOUT_FORMULA: Final = """
    mv addmv dot vdot addr addbmm _trilinear linear matmul outer ger _grouped_mm _int_mm _scaled_grouped_mm _sparse_mm
    sspaddmm sparse_sampled_addmm _sparse_mm_reduce_impl mkldnn_linear mkldnn_convolution conv_tbc conv_tbc_backward
    _cdist_forward _cdist_backward _euclidean_dist _pdist_forward _pdist_backward
    mkldnn_rnn_layer mkldnn_rnn_layer_backward _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm gru rnn_tanh rnn_relu
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell lstm_mps quantized_lstm_cell
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
    _scaled_dot_product_attention_math _native_multi_head_attention _transformer_encoder_layer_fwd
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_fused_attention_overrideable_backward
"""
#: parts of names that promise a contraction: an operator with one that is in neither table stops the count
SUSPICIOUS: Final = {
    "mm",
    "addmm",
    "bmm",
    "mv",
    "dot",
    "matmul",
    "linear",
    "conv",
    "convolution",
    "attention",
    "rnn",
    "lstm",
    "gru",
}
#: made of other operators, which the mode then sees
COMPOSITE: Final = torch._C.DispatchKey.CompositeImplicitAutograd


def kind_of(operator: Any) -> str:
    """Return the name of an operator that multiplies tensors, without its overload; empty for any other.

    Raises:
        ValueError: the name sounds like a contraction, and no table says that it is one.
    """
    if not isinstance(operator, torch._ops.OpOverload):
        return ""
    name = operator._schema.name.partition("::")[2]
    if operator.overloadpacket in flop_registry or name in WITHOUT_FORMULA.split():
        return name
    if SUSPICIOUS & set(name.split("_")):
        raise ValueError(f"{operator}: a contraction? neither torch's table of FLOPs nor this script knows")
    return ""


def count_of(kind: str, args: tuple[Any, ...]) -> int:
    """Return how many contractions one call makes: a backward of a convolution one for each gradient asked for."""
    return sum(args[-1][:2]) if kind == "convolution_backward" else 1


class Halves(Counter[tuple[str, str]]):
    """(half, operator) → number of contractions; the halves are forward, backward, and again (for a checkpoint)."""

    def total_of(self, half: str) -> int:
        """Return the number in one half."""
        return sum(count for (part, _), count in self.items() if part == half)

    def __str__(self) -> str:
        again = self.total_of("again")
        return f"{self.total_of('forward')}/{self.total_of('backward')}" + (f" +{again}" if again else "")


class Recorder(TorchDispatchMode):
    """Counts the contractions that run inside of it, each with the module that runs it."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counts = Halves()
        #: (operator, path of the innermost module) → number, of forward
        self.places: Counter[tuple[str, str]] = Counter()
        self._is_backward = False
        self._modules = {id(module): name for name, module in model.named_modules()}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True: torch.cond compiles itself, and Dynamo gives up functions inside of other modes."""
        return True

    def backward(self, loss: Tensor) -> None:
        """Run the backward of a loss; from here on contractions belong to backward."""
        self._is_backward = True
        loss.backward()

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count a contraction; look into composite operators, and into the functions of a higher-order operator."""
        if isinstance(func, torch._ops.OpOverload) and func.has_kernel_for_dispatch_key(COMPOSITE):
            with self:  # F.linear in a branch of torch.cond
                return func.decompose(*args, **(kwargs or {}))
        kind = kind_of(func)
        if kind:
            self._count(kind, args)
        if isinstance(func, torch._ops.HigherOrderOperator):
            args = tuple(self._look_into(arg) if callable(arg) else arg for arg in args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: tuple[Any, ...]) -> None:
        again = self._is_backward and torch.is_grad_enabled()  # autograd switches gradients off in backward
        half = "again" if again else "backward" if self._is_backward else "forward"
        self.counts[half, kind] += count_of(kind, args)
        if half == "forward":
            self.places[kind, self._find_module()] += 1

    def _find_module(self) -> str:
        """Return the path of the innermost module whose method runs."""
        frame = sys._getframe(3)
        while frame is not None and id(frame.f_locals.get("self")) not in self._modules:
            frame = frame.f_back
        return "" if frame is None else self._modules[id(frame.f_locals["self"])]

    def _look_into(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with self:
                return function(*args)

        return call
