"""Keep nothing alive for operators of backward that read only the shape of a forward tensor."""

import dataclasses
from typing import ClassVar, Final

from torch.fx import GraphModule

from qcompiler.passes.ir.meta import is_backward
from qcompiler.passes.ir.stand_in import stand_in
from qcompiler.passes.ir.views import aten

#: gradients whose kernels read of their second argument shape, strides and dtype alone
_READ_SHAPES: Final = (
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
    aten.adaptive_max_pool2d_backward.default,
    aten.adaptive_max_pool3d_backward.default,
    aten.avg_pool2d_backward.default,
    aten.avg_pool3d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
    aten._adaptive_avg_pool3d_backward.default,
)


@dataclasses.dataclass(frozen=True)
class ForgetValues:
    """pool_backward(G, X) → pool_backward(G, empty tensor of the shape and strides of X)."""

    name: ClassVar[str] = "forget-values"

    def __call__(self, module: GraphModule) -> int:
        """Return the number of tensors that backward no longer reads."""
        found = (node for target in _READ_SHAPES for node in module.graph.find_nodes(op="call_function", target=target))
        return sum(stand_in(node, 1) for node in found if is_backward(node))
