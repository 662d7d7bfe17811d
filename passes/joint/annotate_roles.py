"""Find every contraction, forward and backward, and record the role and the summed axis of each operand."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final, cast

from torch.fx import Graph, GraphModule, Node

from qcompiler.passes.ir.facts import Contraction, Input, InputKind, Operand
from qcompiler.passes.ir.frame import WHOLE, Frame
from qcompiler.passes.ir.meta import (
    find_value,
    get_contraction,
    get_input,
    get_owner,
    get_value,
    is_backward,
    is_size,
    module_path,
    sequence_number,
    set_fact,
)
from qcompiler.passes.ir.opaque import explain_call, is_reached
from qcompiler.passes.ir.site_name import Numbering
from qcompiler.passes.ir.views import aten, is_view, view_root
from qcompiler.passes.rules import Position, Role

#: contractions of matrices → the arguments that are multiplied
MATRIX_PRODUCTS: Final = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}


@dataclasses.dataclass(frozen=True)
class AnnotateRoles:
    """Attach a `Contraction` to every node that sums products of two tensors, and to the sums that make bias gradients.

    1. Role: an operand computed from parameters (and buffers) alone is a *weight*, one that descends from a tangent
       a *gradient*, all else an *activation*.
    2. Forward contractions sum over the channels of an activation (`c`) and the input channels of a weight (`i`); the
       rest is `b` and `o`.
    3. A gradient contraction belongs to the forward contraction with the same sequence number. A forward tensor is then
       summed over the rest of forward; the output gradient over the axis in common with that tensor.
    4. A contraction inside a fused kernel is marked as kept in float, with the reason.
    5. First and last count in the whole model, and names are unique in the model: `frame` knows the other graphs.
    """

    name: ClassVar[str] = "annotate-roles"
    frame: Frame = WHOLE

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of contractions that were annotated."""
        return _Annotator(module.graph, self.frame).run()


class _Annotator:
    """One walk over one graph; the tables below are keyed by nodes, and die with the walk."""

    def __init__(self, graph: Graph, frame: Frame) -> None:
        self.graph, self.frame = graph, frame
        self.is_weight = _descends_only_from_parameters(graph)
        self.is_gradient = _descends_from_tangents(graph)
        self.forward: dict[int | None, list[Node]] = {}
        #: (forward contraction, index of the operand that the gradient reads): each gradient is made once
        self.matched: set[tuple[Node, int]] = set()
        self.names = Numbering()

    def run(self) -> int:
        found = [n for n in self.graph.nodes if n.op == "call_function" and get_contraction(n) is None]
        forward = [n for n in found if _find_operands(n) and not is_backward(n) and n.target is not _CONV_BACKWARD]
        paths = [_find_path(node, _find_operands(node)) for node in forward]
        for node, path, positions in zip(forward, paths, self.frame.positions(paths) if paths else [], strict=True):
            set_fact(node, self.annotate_forward(node, path, positions))
            self.forward.setdefault(sequence_number(node), []).append(node)
        backward = [n for n in found if is_backward(n) and _find_operands(n)]
        for node in backward:
            set_fact(node, self.annotate_backward(node))
        sums = [n for n in found if self.annotate_bias(n)]
        opaque = [n for n in found if _annotate_opaque(n)]
        return len(forward) + len(backward) + len(sums) + len(opaque)

    def annotate_forward(self, node: Node, module: str, positions: frozenset[Position]) -> Contraction:
        args = _find_operands(node)
        roles = [Role.WEIGHT if self.is_weight[_get_operand(node, a)] else Role.ACTIVATION for a in args]
        convolution = node.target is aten.convolution.default
        weights = [role is Role.WEIGHT for role in roles]
        operator = "convolution" if convolution else "linear" if any(weights) else "matmul"
        names = ["weight" if w else "input" for w in weights] if any(weights) != all(weights) else ["left", "right"]
        if convolution:
            operands = _convolution_operands(node, roles)
        else:
            pairs = [("o", "i") if w else ("b", "c") for w in weights]
            operands = [
                _matrix_operand(node, arg, role, name, pair, contracted=1 - side)
                for side, (arg, role, name, pair) in enumerate(zip(args, roles, names, pairs, strict=True))
            ]
        layout = operands[0].layout if convolution else _result_layout(operands)
        return Contraction(module, self.unique(module, operator), operator, positions, tuple(operands), layout)

    def unique(self, module: str, operator: str) -> str:
        """The module path, with /matmul for contractions of activations and #2, #3 … if a module multiplies again."""
        key = module or "(root)"
        key = f"{key}/{operator}" if operator == "matmul" else key
        return self.frame.name(key, self.names.count(key))

    def annotate_backward(self, node: Node) -> Contraction:
        """Case 3. Keeps a product that has no forward contraction, or two gradients for operands, with the reason."""
        if not get_value(node.args[0]).is_floating_point():  # type: ignore[arg-type]
            return _keep_contraction(node, f"nothing to quantize: {get_value(node.args[0]).dtype}")  # type: ignore[arg-type]
        args = _find_operands(node)
        grads = [a for a in args if self.is_gradient[_get_operand(node, a)]]
        if len(grads) != 1:
            return _keep_contraction(node, "not the gradient of a product: it multiplies two gradients, or none")
        (other,) = (a for a in args if a != grads[0])
        match = self.match(node, grads[0], other)
        if match is None:
            return _keep_contraction(node, "no forward product belongs to this gradient")
        forward, index = match
        fact = get_contraction(forward)
        assert fact is not None
        if node.target is _CONV_BACKWARD:
            operands = _convolution_gradient_operands(node, fact, index)
        else:
            operands = _matrix_gradient_operands(node, grads[0], other, fact, index)
        return dataclasses.replace(fact, operands=tuple(operands), gradient_of=1 - index, layout="")

    def match(self, node: Node, grad: int, other: int) -> tuple[Node, int] | None:
        """Return (forward contraction, index of the operand that backward reads), by sequence number and tensor.

        Each gradient of a contraction is made once. Nodes in the backward of a custom autograd.Function have the number
        of another operator: then the last forward contraction counts that reads the tensor and lacks this gradient.
        """
        same_number = self.forward.get(sequence_number(node), [])
        for forward in itertools.chain(same_number, self.find_fitting(node, grad)):
            hits = self.find_open(forward, view_root(_get_operand(node, other)))
            if len(hits) == 2:
                hits = [_choose_operand(node, other, [_get_operand(forward, a) for a in _find_operands(forward)])]
            if hits:
                self.matched.add((forward, hits[0]))
                return forward, hits[0]
        return None

    def find_fitting(self, node: Node, grad: int) -> Iterator[Node]:
        """Yield the forward contractions, last one first, whose result is as large as the output gradient of a node."""
        is_convolution, size = node.target is _CONV_BACKWARD, get_value(_get_operand(node, grad)).numel()
        forward = [n for nodes in self.forward.values() for n in nodes]
        fitting = [n for n in forward if get_value(n).numel() == size]
        yield from (n for n in reversed(fitting) if (n.target is aten.convolution.default) == is_convolution)

    def find_open(self, forward: Node, root: Node) -> list[int]:
        """The operands of a forward contraction that are views of a tensor, and that no gradient reads so far."""
        places = [(k, view_root(_get_operand(forward, arg))) for k, arg in enumerate(_find_operands(forward))]
        return [k for k, source in places if source is root and (forward, k) not in self.matched]

    def annotate_bias(self, node: Node) -> bool:
        """A sum of an output gradient over everything but the channels reads the same codes as the contractions do."""
        if node.target is not aten.sum.dim_IntList or not is_backward(node) or not isinstance(node.args[0], Node):
            return False
        source = node.args[0]
        owner = self.gradient_reader(view_root(source))
        dims = {d % get_value(source).ndim for d in cast(list[int], node.args[1])}
        if owner is None or dims != set(range(get_value(source).ndim - 1)):
            return False
        layout = "b" * len(dims) + "c"
        operand = Operand(0, Role.GRADIENT, "grad", layout, "b", math.prod(get_value(source).shape[:-1]))
        set_fact(node, dataclasses.replace(owner, operands=(operand,), gradient_of=None, is_bias=True))
        return True

    def gradient_reader(self, root: Node) -> Contraction | None:
        """Return the linear gradient contraction that reads this tensor as the output gradient."""
        readers = [root]
        for reader in readers:
            for user in reader.users:
                fact = get_contraction(user)
                if fact is not None and fact.operator == "linear" and fact.gradient_of is not None:
                    if any(o.role is Role.GRADIENT and user.args[o.arg] is reader for o in fact.operands):
                        return fact
                elif is_view(user):
                    readers.append(user)
        return None


def is_contraction(target: object) -> bool:
    """Return True for the operators of forward whose operands can be quantized."""
    return is_reached(target) and target is not _CONV_BACKWARD


_CONV_BACKWARD: Final = aten.convolution_backward.default


def _find_operands(node: Node) -> tuple[int, ...]:
    """Return the arguments that a contraction multiplies; empty for any other node."""
    if node.op != "call_function":
        return ()
    if node.target is aten.convolution.default:
        return (0, 1)
    if node.target is _CONV_BACKWARD:
        dx, dw, _ = cast(list[bool], node.args[-1])  # one contraction after split-convolution-backward
        return (0, 2) if dx else (0, 1) if dw else ()
    return MATRIX_PRODUCTS.get(node.target, ())  # type: ignore[call-overload,no-any-return]


def _get_operand(node: Node, index: int) -> Node:
    arg = node.args[index]
    assert isinstance(arg, Node)
    return arg


def _choose_operand(node: Node, other: int, operands: list[Node]) -> int:
    """Return which of two operands that are views of one tensor (x·xᵀ) a gradient reads: the start of the views there.

    Both in x·x. There the gradient of the left reads the right one, as G·xᵀ or (x·Gᵀ)ᵀ, the gradient of the right the
    left one, as xᵀ·G or (Gᵀ·x)ᵀ.
    """
    source = arg = _get_operand(node, other)
    while source not in operands and is_view(source):
        source = _get_operand(source, 0)
    met = [k for k, operand in enumerate(operands) if operand is source]
    on_right = other == _find_operands(node)[1]
    return met[0] if len(met) == 1 else int(on_right == (source is not arg))


def _find_path(node: Node, args: tuple[int, ...]) -> str:
    """The module path; the owner of the weight if that lies inside (attention multiplies for out_proj)."""
    path = module_path(node)
    for arg in args:
        fact = get_input(view_root(_get_operand(node, arg)))
        owner = fact.name.rpartition(".")[0] if fact is not None and fact.kind is InputKind.PARAMETER else None
        if owner is not None and (owner == path or owner.startswith(f"{path}." if path else "")):
            return owner
    return path


def _matrix_operand(node: Node, arg: int, role: Role, name: str, letters: tuple[str, str], contracted: int) -> Operand:
    """Return one operand [..., rows, columns] of a matrix product; letters = (left over, summed over)."""
    tensor = get_value(_get_operand(node, arg))
    free, summed = letters
    layout = "g" * (tensor.ndim - 2) + (free + summed if contracted == 1 else summed + free)
    return Operand(arg, role, name, layout, summed, tensor.shape[contracted - 2])


def _convolution_operands(node: Node, roles: list[Role]) -> list[Operand]:
    x, w = get_value(_get_operand(node, 0)), get_value(_get_operand(node, 1))
    transposed, groups = bool(node.args[6]), int(node.args[8])  # type: ignore[arg-type]
    taps = "s" * (w.ndim - 2)
    channels = x.shape[1] // groups
    return [
        Operand(0, roles[0], "input", "bc" + taps, "c", channels),
        Operand(1, roles[1], "weight", ("io" if transposed else "oi") + taps, "i", channels),
    ]


def _convolution_gradient_operands(node: Node, fact: Contraction, index: int) -> list[Operand]:
    grad, groups = get_value(_get_operand(node, 0)), int(node.args[9])  # type: ignore[arg-type]
    layout = fact.operands[0].layout
    channels, batch = grad.shape[1] // groups, grad.shape[0]
    letter, extent = ("c", channels) if index == 1 else ("b", batch)
    forward = fact.operands[index]
    other = dataclasses.replace(forward, arg=2 - (index == 0), contracted="o" if index == 1 else "b", extent=extent)
    return [Operand(0, Role.GRADIENT, "grad", layout, letter, extent), other]


def _matrix_gradient_operands(node: Node, grad: int, other: int, fact: Contraction, index: int) -> list[Operand]:
    """Case 3 for matrices: operand `index` of the forward contraction meets the output gradient."""
    forward = fact.operands[index]
    free = next(letter for letter in forward.layout[-2:] if letter != forward.contracted)
    sides = _find_operands(node)
    tensor = _matrix_operand(
        node, other, forward.role, forward.name, (forward.contracted, free), 1 - sides.index(other)
    )
    rows, columns = fact.layout[-2], fact.layout[-1]
    shared, left = (rows, columns) if index == 0 else (columns, rows)
    gradient = _matrix_operand(node, grad, Role.GRADIENT, "grad", (left, shared), 1 - sides.index(grad))
    return sorted([tensor, gradient], key=lambda operand: operand.arg)


def _result_layout(operands: Sequence[Operand]) -> str:
    """[..., rows, columns] of a matrix product: channels are the dimension beside a weight, batch the rest."""
    weights = [operand.role is Role.WEIGHT for operand in operands]
    return operands[0].layout[:-2] + ("cb" if weights == [True, False] else "bc")


def _keep_contraction(node: Node, reason: str) -> Contraction:
    module = get_owner(node) or ""
    return Contraction(module, module or "(root)", str(node.target), frozenset(), (), kept=reason)


def _annotate_opaque(node: Node) -> bool:
    reason = explain_call(node.target, map(find_value, node.all_input_nodes), find_value(node))
    if not reason:
        return False
    set_fact(node, _keep_contraction(node, reason))
    return True


def _descends_only_from_parameters(graph: Graph) -> dict[Node, bool]:
    """Return True for parameters and for tensors that only parameters and buffers give: W, Wᵀ, a normalized weight."""
    kinds: dict[Node, set[InputKind]] = {}
    for node in graph.nodes:
        fact = get_input(node)
        own = {fact.kind} if fact is not None else {InputKind.INPUT} if node.op == "placeholder" else set()
        kinds[node] = set() if is_size(node) else own.union(*(kinds[source] for source in node.all_input_nodes))
    allowed = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.NUMBER}
    return {node: InputKind.PARAMETER in found and found <= allowed for node, found in kinds.items()}


def _descends_from_tangents(graph: Graph) -> dict[Node, bool]:
    result: dict[Node, bool] = {}
    for node in graph.nodes:
        fact = get_input(node)
        tangent = isinstance(fact, Input) and fact.kind is InputKind.TANGENT
        result[node] = tangent or any(result[source] for source in node.all_input_nodes)
    return result
