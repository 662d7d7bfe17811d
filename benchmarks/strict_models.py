"""The models of strict.py: those of the tests, small ones of the package transformers, and odd ones."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the arguments of one call."""

    build: Callable[[], nn.Module]
    call: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]]


def give(*shapes: tuple[int, ...]) -> Callable[[], tuple[tuple[Tensor, ...], Mapping[str, Any]]]:
    """Return inputs of normal numbers, one of each shape."""
    return lambda: (tuple(torch.randn(*shape) for shape in shapes), {})


def tokens(**options: Any) -> Callable[[], tuple[tuple[Tensor, ...], Mapping[str, Any]]]:
    """Return token ids, and options of the call."""
    return lambda: ((torch.randint(2, 64, (2, 8)),), options)


def load_test_models() -> ModuleType:
    """Return tests/models.py, which is in no package."""
    path = Path(__file__).parents[1] / "tests" / "models.py"
    spec = importlib.util.spec_from_file_location("qcompiler_test_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Calls(nn.Module):
    """forward(*inputs) = function(self, *inputs), over the given parts."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        """Call the function."""
        return self.function(self, *inputs)


def two_layers(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    """Return a model with the layers `a` and `b`, 8 wide."""
    return lambda: Calls(function, a=nn.Linear(8, 8), b=nn.Linear(8, 8))


def branch(m: Any, x: Tensor) -> Tensor:
    """One of two layers, by torch.cond."""
    return m.b(torch.cond(x.sum() > 0, lambda y: m.a(y).relu(), lambda y: m.b(y).relu(), (x,)))


def repeat(m: Any, x: Tensor) -> Tensor:
    """A loop whose length depends on the data."""
    for _ in range(int(x.abs().max().item() > 0) + 1):
        x = m.a(x).tanh()
    return m.b(x)


def print_between(m: Any, x: Tensor) -> Tensor:
    """A graph break between two layers."""
    x = m.a(x)
    print(end="")
    return m.b(x)


def break_in_loop(m: Any, x: Tensor) -> Tensor:
    """A graph break inside of a loop: Dynamo gives the whole frame up."""
    for _ in range(3):
        x = m.a(x)
        print(end="")
    return m.b(x)


def read_number(m: Any, x: Tensor) -> Tensor:
    """A number of Python decides."""
    x = m.a(x)
    return m.b(x) if x.sum().item() > -1e9 else x


class Squared(torch.autograd.Function):
    """x @ w, with gradients that multiply by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        """x @ w."""
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients."""
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


class Lora(nn.Module):
    """A weight that is computed: W + B·A."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        """The layer with its computed weight."""
        return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)


def attend_with_masks(m: Any, x: Tensor) -> Tensor:
    """Multi-head attention with both masks."""
    causal = torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1)
    padding = torch.zeros(x.shape[0], 5, dtype=torch.bool, device=x.device)
    return m.attention(x, x, x, attn_mask=causal, key_padding_mask=padding, need_weights=False)[0]


def attend_and_tell(m: Any, x: Tensor) -> Tensor:
    """Multi-head attention that gives its weights too: two contractions instead of a kernel."""
    return m.attention(x, x, x)[0]


def attention() -> dict[str, nn.Module]:
    """The part of the two functions above."""
    return {"attention": nn.MultiheadAttention(8, 2, batch_first=True)}


def encoder(**options: Any) -> nn.Module:
    """Two encoder layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def stack() -> nn.Module:
    """Four layers."""
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def normed(normalize: Callable[..., nn.Module]) -> nn.Module:
    """Two layers whose weights are computed."""
    return nn.Sequential(normalize(nn.Linear(8, 8)), nn.ReLU(), normalize(nn.Linear(8, 4)))


def recurrent(kind: str) -> Callable[[], nn.Module]:
    """A recurrent layer and a head."""
    return lambda: Calls(lambda m, x: m.head(m.rnn(x)[0]), rnn=getattr(nn, kind)(8, 8), head=nn.Linear(8, 4))


def convolution(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """Two convolutions of one kind."""
    conv = getattr(nn, kind)
    return lambda: nn.Sequential(conv(4, 8, 3, **options), nn.ReLU(), conv(8, 4, 3, **options))


ODD: Final[dict[str, Case]] = {
    "cond": Case(two_layers(branch), give((4, 8))),
    "checkpoint": Case(two_layers(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False))), give((4, 8))),
    "checkpoint of both": Case(
        two_layers(lambda m, x: checkpoint(lambda y: m.b(m.a(y).relu()), x, use_reentrant=False)), give((4, 8))
    ),
    "checkpoint, reentrant": Case(
        two_layers(lambda m, x: m.b(checkpoint(m.b, m.a(x), use_reentrant=True))), give((4, 8))
    ),
    "checkpoint_sequential": Case(
        lambda: Calls(lambda m, x: checkpoint_sequential(m.stack, 2, x, use_reentrant=False), stack=stack()),
        give((4, 8)),
    ),
    "print": Case(two_layers(print_between), give((4, 8))),
    "item": Case(two_layers(read_number), give((4, 8))),
    "loop by data": Case(two_layers(repeat), give((4, 8))),
    "break in loop": Case(two_layers(break_in_loop), give((4, 8))),
    "LSTM": Case(recurrent("LSTM"), give((3, 2, 8))),
    "GRU": Case(recurrent("GRU"), give((3, 2, 8))),
    "LSTMCell": Case(lambda: Calls(lambda m, x: m.cell(m.cell(x)[0])[0], cell=nn.LSTMCell(8, 8)), give((4, 8))),
    "attention, masks": Case(lambda: Calls(attend_with_masks, **attention()), give((2, 5, 8))),
    "attention, weights": Case(lambda: Calls(attend_and_tell, **attention()), give((2, 5, 8))),
    "sdpa": Case(
        two_layers(lambda m, x: F.scaled_dot_product_attention(m.a(x), m.b(x), x, is_causal=True)), give((2, 2, 5, 8))
    ),
    "sdpa, dropout": Case(
        two_layers(lambda m, x: F.scaled_dot_product_attention(m.a(x), m.b(x), x, dropout_p=0.5)), give((2, 2, 5, 8))
    ),
    "encoder": Case(encoder, give((2, 5, 8))),
    "encoder, norm first": Case(lambda: encoder(norm_first=True, dropout=0.0), give((2, 5, 8))),
    "einsum": Case(
        two_layers(lambda m, x: torch.einsum("bth,bsh,hk->btsk", m.a(x), m.b(x), m.a.weight)), give((2, 5, 8))
    ),
    "FFT": Case(two_layers(lambda m, x: m.b(torch.fft.rfft(m.a(x), n=14).abs())), give((4, 8))),
    "weight_norm": Case(lambda: normed(nn.utils.parametrizations.weight_norm), give((4, 8))),
    "spectral_norm": Case(lambda: normed(nn.utils.parametrizations.spectral_norm), give((4, 8))),
    "weight_norm, old": Case(lambda: normed(nn.utils.weight_norm), give((4, 8))),
    "Bilinear": Case(lambda: nn.Bilinear(8, 6, 5), give((4, 8), (4, 6))),
    "Conv1d": Case(convolution("Conv1d"), give((2, 4, 12))),
    "Conv3d": Case(convolution("Conv3d"), give((2, 4, 6, 6, 6))),
    "ConvTranspose2d": Case(convolution("ConvTranspose2d", stride=2), give((2, 4, 5, 5))),
    "double use": Case(two_layers(lambda m, x: m.b(m.a(m.a(x).relu()))), give((4, 8))),
    "LoRA": Case(Lora, give((4, 8))),
    "autograd.Function": Case(two_layers(lambda m, x: m.b(Squared.apply(m.a(x), m.b.weight))), give((4, 8))),
    "matrix and vector": Case(two_layers(lambda m, x: m.a(x) @ m.b.bias + x @ m.a.bias), give((4, 8))),
    "dot": Case(two_layers(lambda m, x: m.a(x) * torch.dot(m.a.bias, m.b.bias)), give((4, 8))),
    "cdist": Case(two_layers(lambda m, x: torch.cdist(m.a(x), m.b(x))), give((4, 8))),
    "x·xᵀ": Case(two_layers(lambda m, x: m.a(x) @ m.a(x).mT @ m.b(x)), give((2, 5, 8))),
    "unused output": Case(two_layers(lambda m, x: (m.a(x), m.b(x).detach())), give((4, 8))),
    "no_grad part": Case(two_layers(lambda m, x: m.b(torch.no_grad()(lambda y: m.a(y))(x))), give((4, 8))),
}


def zoo() -> dict[str, Case]:
    """Return the models of the tests."""
    cases = load_test_models().CASES
    return {name: Case(case.build, lambda case=case: (case.inputs(), {})) for name, case in cases.items()}


def all_cases() -> dict[str, Case]:
    """Return every model by name."""
    from strict_transformers import TRANSFORMERS  # late: its import takes seconds

    return {**zoo(), **TRANSFORMERS, **ODD}
