"""What takes part in benchmarks/steps.py: float, ours, and the peers that install from the package registry."""

import dataclasses
from typing import Any, Final

import torch
from step_models import Subject
from torch import nn

import qcompiler


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train a model."""

    #: float, qcompiler, torchao or QPyTorch
    maker: str
    #: of qcompiler
    recipe: str = ""
    execution: str = "simulate"
    save: str = ""
    channels_last: bool = False
    #: autocast
    bfloat16: bool = False
    compiled: bool = True

    @property
    def name(self) -> str:
        """The row of the table."""
        words = [
            self.recipe or self.maker,
            self.execution if self.execution != "simulate" else "",
            f"save {self.save}" * bool(self.save),
            "bfloat16" * self.bfloat16,
            "eager" * (self.is_float and not self.compiled),
            "channels-last" * self.channels_last,
        ]
        return ", ".join(filter(None, words))

    @property
    def is_float(self) -> bool:
        """Whether this is a rival in float, the best of which every time is divided by."""
        return self.maker == "float"

    def build(self, subject: Subject) -> nn.Module:
        """Return the module to train; its first step compiles."""
        model = subject.model
        if self.maker == "qcompiler":
            save = {"save": self.save} if self.save else {}
            return qcompiler.compile(model, self.recipe, backend="inductor", execution=self.execution, **save)
        if self.maker == "torchao":
            model = _convert_with_torchao(model)
        elif self.maker == "QPyTorch":
            model = _wrap_with_qpytorch(model)
        return torch.compile(model, dynamic=False) if self.compiled else model


def _convert_with_torchao(model: nn.Module) -> nn.Module:
    """Return the model with linear layers of int8, forward and backward, as torchao has them."""
    from torchao import quantize_
    from torchao.prototype.quantized_training import int8_mixed_precision_training

    quantize_(model, int8_mixed_precision_training())
    return model


def _wrap_with_qpytorch(model: nn.Module) -> nn.Module:
    """Return the model with quantizers of 8 bits, block floating point: weights, outputs of layers, their gradients."""
    from qtorch import BlockFloatingPoint
    from qtorch.quant import Quantizer
    from torch.nn.utils.parametrize import register_parametrization

    form: Any = BlockFloatingPoint(wl=8, dim=0)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | nn.Conv2d):
                register_parametrization(child, "weight", Quantizer(form, None, forward_rounding="nearest"))
                quantizer = Quantizer(form, form, forward_rounding="nearest", backward_rounding="stochastic")
                setattr(parent, name, nn.Sequential(child, quantizer))
    return model


_FLOAT: Final = tuple(
    Contender("float", channels_last=last, bfloat16=low, compiled=compiled)
    for compiled in (True, False)
    for low in (False, True)
    for last in (False, True)
)
_OURS: Final = tuple(
    Contender("qcompiler", recipe, execution, save, channels_last=last, bfloat16=low)
    for recipe, execution, save in (
        ("hyperblock-int8", "simulate", ""),
        ("hyperblock-int8", "simulate", "int8"),
        ("hyperblock-int4", "simulate", ""),
        ("hyperblock-int4", "simulate", "int4"),
        ("tensor-int8", "simulate", ""),
        ("tensor-int8", "auto", ""),
        ("hyperblock-int8-wide", "auto", ""),
        ("in-hindsight-w8a8g8", "simulate", ""),
        ("in-hindsight-w8a8g8", "auto", ""),
    )
    for low in (False, True)
    for last in (False, True)
)
_PEERS: Final = (Contender("torchao"), Contender("QPyTorch", compiled=False))
CONTENDERS: Final = (*_FLOAT, *_OURS, *_PEERS)
