"""Biases that are rounded for sums of integers become constants."""

import dataclasses
from typing import ClassVar

from qcompiler.passes.frozen.frozen_graph import FrozenGraph
from qcompiler.passes.ir.edit import replace_node
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class FreezeBiases:
    """integer_bias(bias, scales, …) → the result, a constant.

    The bias, both scales and the batch norm behind are all known: round-biases writes the operator nowhere else. The
    pass runs before all others, since scales get other shapes on the way.
    """

    name: ClassVar[str] = "freeze-biases"

    def __call__(self, subject: FrozenGraph) -> int:
        """Return the number of biases."""
        rounded = list(subject.graph.find_nodes(op="call_function", target=ops.INTEGER_BIAS))
        for bias in rounded:
            value = subject.get_value(bias)
            assert value is not None
            replace_node(bias, subject.add_constant(value, f"{bias.name}#rounded"))
        return len(rounded)
