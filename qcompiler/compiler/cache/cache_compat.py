"""Private APIs of torch that say what a capture depends on, and where torch keeps compiled code."""

import itertools
from pathlib import Path
from typing import Final

import torch
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental import _config as shape_config
from torch.library import _impls

from qcompiler.passes.ir.meta import has_checkpoint_policy


def find_cache() -> Path | None:
    """Return the folder for captured graphs, in Inductor's; None if torch's caches are switched off."""
    switches = (inductor_config.fx_graph_cache, functorch_config.enable_autograd_cache)
    is_on = all(switches) and not torch.compiler.config.force_disable_caches
    return Path(cache_dir(), "qcompiler") if is_on else None


def describe_settings() -> str:
    """Return a hash of each configuration of torch that changes what is traced, as text.

    Dynamo's says which graphs it hands over, and nothing of what a graph becomes. One folder of Inductor's is the
    working directory if nobody has set it.
    """
    folder = {"xpu.cutlass_dir": ""} if hasattr(inductor_config, "xpu") else {}
    with inductor_config.patch(folder):
        return " ".join(config.get_hash().hex() for config in (functorch_config, inductor_config, shape_config))


def list_precisions() -> list[str]:
    """Return how exactly float32 is multiplied; the public questions raise if it is set in an old and a new way."""
    pairs = [("generic", "all"), *itertools.product(("mkldnn", "cuda"), ("all", "matmul", "conv", "rnn"))]
    return [torch._C._get_fp32_precision_getter(backend, kind) for backend, kind in pairs]


#: keys under which a function changes what is traced, and not only what runs
_TRACED_KEYS: Final = ("Autograd", "Autocast", "Composite", "Functionalize", "ADInplaceOrView")


def find_overridden() -> str | None:
    """Return an operator of torch that a function in Python replaces while a graph is traced; None without one."""
    entries = (name for name in _impls if name.startswith("aten/"))
    return next((name for name in entries if name.rpartition("/")[2].startswith(_TRACED_KEYS)), None)


def list_autocast() -> list[tuple[str, torch.dtype]]:
    """Return the devices on which autocast is on, and its types."""
    devices = torch._C._autocast_supported_devices()
    return [(kind, torch.get_autocast_dtype(kind)) for kind in devices if torch.is_autocast_enabled(kind)]


def explain_uncached(module: GraphModule) -> str:
    """Say why a graph of Dynamo may become another one in the next process; empty: by torch's own rules it may not.

    Modes of the user see operators while the graph is traced, and hooks the tensors that it saves.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode of torch is active, which sees operators"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) or hasattr(module, "saved_tensors_hooks_pack_0"):
        return "hooks change tensors that are saved for backward"
    if (name := find_overridden()) is not None:
        return f"a function in Python replaces an operator of torch: {name}"
    if has_checkpoint_policy(module):
        return "a function of the user decides what a checkpoint saves"
    try:
        check_cacheable(module)
    except BypassAOTAutogradCache as error:
        return " ".join(str(error).split())
    return ""


def explain_tensor_type(value: torch.Tensor) -> str:
    """Say why the type of a tensor may change what is traced; empty: a tensor, fake or not, or a parameter of torch."""
    kind = type(value)
    return "" if kind in (torch.Tensor, FakeTensor, torch.nn.Parameter, torch.nn.Buffer) else f"a {kind.__qualname__}"
