"""An eval graph whose parameters and ranges are known: the subject of the frozen pipeline."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qcompiler.passes.ir.arguments import get_argument, run_call
from qcompiler.passes.ir.edit import insert_input
from qcompiler.passes.ir.facts import Input, InputKind
from qcompiler.passes.ir.inference import fake_mode
from qcompiler.passes.ir.meta import get_value, set_fact, set_value
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.passes.ir.verify import clean_and_verify
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import TENSOR
from qcompiler.runtime.spec import parse_spec


@dataclasses.dataclass
class FrozenGraph:
    """A graph, the values that are known before the model gets an input, and the changes of the codes of weights."""

    module: GraphModule
    #: node → value: of parameters, buffers and ranges at first, of other nodes on demand
    known: dict[Node, Tensor]
    #: new placeholder → name in the file, and value
    constants: dict[str, tuple[str, Tensor]] = dataclasses.field(default_factory=dict)
    #: site of a tensor that depends on no input → codes, in the order of the trained weight
    codes: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    #: site → the order in which the dimensions of the codes lie in the file
    order: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    #: site → output channels whose codes are negated, for a batch norm with a negative factor
    negated: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    #: remarks for a reader of the file
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._fixed = _find_fixed(self.graph, self.known)

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.module.graph

    def get_value(self, node: Node) -> Tensor | None:
        """Return the value of a node whatever the input of the model is; None if the value depends on the input."""
        if node not in self.known and node in self._fixed:
            given = {"x": _make_any_tensor(get_argument(node, "x"))} if _is_static(node) else {}
            with torch.no_grad():
                self.known[node] = run_call(node, self.get_value, **given)
        return self.known.get(node)

    def add_constant(self, value: Tensor, name: str) -> Node:
        """Return a new placeholder that holds a value, at the head of the graph."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = insert_input(self.graph, f"c_{len(self.constants)}")
        set_value(node, fake_mode(self.graph).from_tensor(value, static_shapes=True))
        set_fact(node, Input(InputKind.CONSTANT, name))
        self.known[node] = value
        self.constants[node.name] = (name, value)
        return node

    def is_constant(self, node: Node) -> bool:
        """Return True for a placeholder that `add_constant` made."""
        return node.name in self.constants

    def fix_whole(self, quantizer: Quantizer, scale: Tensor, point: Tensor | None) -> None:
        """Give a quantizer one constant scale and zero point for the whole tensor."""
        site = quantizer.site
        step = self.add_constant(scale, f"{site}#scale")
        zero_point = None if point is None else self.add_constant(point, f"{site}#zero_point")
        whole = dataclasses.replace(quantizer.spec, block=TENSOR)
        quantizer.fix(quantizer.tensor, step, zero_point, whole, quantizer.layout)

    def list_folded(self) -> dict[str, Tensor]:
        """Return site → codes of every weight that only another weight was computed of, such as B in W + B·A."""
        left = {quantizer.site for quantizer in list_quantizers(self.graph)}
        return {site: codes for site, codes in self.codes.items() if site not in left}


def verify_frozen(subject: FrozenGraph) -> None:
    """Drop unread nodes, and check every rule on the rest: the check after each pass.

    Raises:
        VerifyError: with the first node that breaks a rule.
    """
    clean_and_verify(subject.module)


def _find_fixed(graph: Graph, known: Iterable[Node]) -> set[Node]:
    """Return the calls whose result does not depend on the input of the model."""
    fixed, held = set[Node](), set(known)
    for node in graph.nodes:
        sources = node.all_input_nodes
        constant = bool(sources) and all(source in held or source in fixed for source in sources)
        if node.op == "call_function" and (constant or _is_static(node)):
            fixed.add(node)
    return fixed


def _make_any_tensor(like: Node) -> Tensor:
    """Return zeros for a value that depends on no tensor; a free dimension is one."""
    return torch.zeros([extent if isinstance(extent, int) else 1 for extent in get_value(like).shape])


def _is_static(node: Node) -> bool:
    """Return True for a scale or zero point that does not depend on the tensor in front."""
    if node.target not in (ops.SCALE, ops.ZERO_POINT):
        return False
    return parse_spec(get_argument(node, "spec")).has_known_scale
