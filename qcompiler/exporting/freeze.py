"""Replace what an exported graph need not compute: weights become codes, ranges of the past become scales."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec, TensorArgument
from torch.export.graph_signature import InputKind as SpecKind
from torch.fx import Graph, Node

from qcompiler.passes.ir.arguments import get_argument, run_call
from qcompiler.passes.ir.edit import fake_mode, infer_value
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.layers import BATCH_NORMS
from qcompiler.passes.ir.meta import get_input, get_value, module_path, set_value
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.walk import get_dequantizer
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.biases import batch_norm_affine
from qcompiler.runtime.numbers.blocks import TENSOR, WHOLE, Block
from qcompiler.runtime.numbers.formats import IntFormat
from qcompiler.runtime.numbers.spec import Vjp, parse_spec
from qcompiler.runtime.ranges.observed import Current

#: shapes of the same elements, through which onnxruntime moves DequantizeLinear
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A range that was measured on data, and stands in the file in place of that of the present tensor."""

    lowest: float
    highest: float
    #: one number each, in the shape of the scale of a whole tensor
    scale: Tensor
    point: Tensor | None


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A program with constants, and what was done to the codes of weights on the way."""

    program: ExportedProgram
    #: site → the order in which the dimensions of its codes lie in the file
    order: Mapping[str, tuple[int, ...]]
    #: site → output channels whose codes are negated, for a batch norm with a negative factor
    negated: Mapping[str, tuple[int, ...]]
    #: what a reader of the file should know
    notes: tuple[str, ...]
    #: site → its range, measured on data
    calibrated: Mapping[str, Calibrated]
    #: site of a factor of a weight, such as B in W + B·A → its codes, which are part of that weight's
    folded: Mapping[str, Tensor]


def freeze(
    program: ExportedProgram,
    ranges: Mapping[str, Tensor],
    *,
    fold_batch_norm: bool,
    calibrated: Mapping[str, Calibrated],
) -> Frozen:
    """The program with constants in place of what depends on parameters and ranges alone.

    1. A quantized weight is its codes and scales: its quantizer reads the codes in place of the weight, which tells its
       site to what comes after. The float weight goes where nothing else reads it.
    2. A range that does not depend on the tensor in front is a scale, with its zero point; so is a `calibrated` one,
       over whole tensors.
    3. `x` beside the codes, which shows what is not finite, is dropped: `QuantizeLinear` saturates instead.
    4. The transposition of a weight is done to its codes where the product reads two quantized tensors of known scale.
       Elsewhere it stays, and a weight that has none is stored transposed: onnxruntime makes a matrix of codes times
       floats a MatMulNBits, which by default rounds the floats to 8 bits; lower.py keeps it transposed.
    5. With `fold_batch_norm` a batch norm behind a convolution becomes part of its bias and of its weight's scales,
       where these are one float a tensor or an output channel, so that the codes stay.
    6. A bias that is rounded for sums of integers is its result.
    7. Where a known range is the same for every block, such as that of `fixed`, the tensor is one block.
    8. A weight that is computed of others, quantized or not, is its own codes alone; those of the others are `folded`.
    """
    freezer = _Freezer(program, ranges)
    freezer.freeze_biases()
    for quantizer in list_quantizers(freezer.graph):
        if quantizer.site in calibrated:
            freezer.calibrate(quantizer, calibrated[quantizer.site])
        freezer.unite(quantizer)
        freezer.freeze(quantizer)
    for quantizer in list_quantizers(freezer.graph):
        freezer.transpose(quantizer)
    notes = freezer.fold() if fold_batch_norm else ()
    built = freezer.rebuilt()
    return Frozen(built, freezer.order, freezer.negated, notes, calibrated, freezer.folded())


class _Freezer:
    """One walk over one graph; the tables die with it."""

    def __init__(self, program: ExportedProgram, ranges: Mapping[str, Tensor]) -> None:
        self.program = program
        self.graph: Graph = program.graph_module.graph
        self.known: dict[Node, Tensor] = {}
        #: site of what depends on no input → its codes
        self.codes: dict[str, Tensor] = {}
        #: new placeholder → its name in the file and its value
        self.constants: dict[str, tuple[str, Tensor]] = {}
        self.order: dict[str, tuple[int, ...]] = {}
        self.negated: dict[str, tuple[int, ...]] = {}
        held = {**program.state_dict, **program.constants}
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in self.graph.find_nodes(op="placeholder"):
            fact = get_input(node)
            assert fact is not None
            if fact.kind is InputKind.STATE:
                self.known[node] = ranges[fact.name].detach()
            elif fact.kind is not InputKind.INPUT:
                self.known[node] = cast(Tensor, held[cast(str, specs[node.name].target)]).detach()
        self.fixed = self._fixed()

    def _fixed(self) -> set[Node]:
        """The calls whose result does not depend on the input of the model."""
        fixed: set[Node] = set()
        for node in self.graph.nodes:
            sources = node.all_input_nodes
            constant = bool(sources) and all(source in self.known or source in fixed for source in sources)
            if node.op == "call_function" and (constant or _is_static(node)):
                fixed.add(node)
        return fixed

    def _value(self, node: Node) -> Tensor | None:
        """What a node holds whatever the input of the model; None where it depends on that."""
        if node not in self.known and node in self.fixed:
            given = {"x": _make_any_tensor(get_argument(node, "x"))} if _is_static(node) else {}
            with torch.no_grad():
                self.known[node] = run_call(node, self._value, **given)
        return self.known.get(node)

    def freeze(self, quantizer: Quantizer) -> None:
        """Cases 1 to 3 for one quantizer."""
        site, held = quantizer.site, self._value(quantizer.codes)
        for node, name in ((quantizer.scale, "scale"), (quantizer.zero_point, "zero_point")):
            if node is not None and (known := self._value(node)) is not None:
                node.replace_all_uses_with(self._constant(known, f"{site}#{name}"))
        if held is not None:
            self.codes[site] = held
            quantizer.read(self._constant(held, f"{site}#codes"))
        for reader in quantizer.dequantizers:
            reader.show(None)

    def freeze_biases(self) -> None:
        """Case 6; first of all, since scales get other shapes on the way."""
        for bias in self.graph.find_nodes(op="call_function", target=ops.INTEGER_BIAS):
            bias.replace_all_uses_with(self._constant(cast(Tensor, self._value(bias)), f"{bias.name}#rounded"))

    def calibrate(self, quantizer: Quantizer, found: Calibrated) -> None:
        """Case 2 for a quantizer whose range was measured on data."""
        self._make_one_block(quantizer, found.scale, found.point, "calibrated")

    def unite(self, quantizer: Quantizer) -> None:
        """Case 7 for one quantizer."""
        spec, point, steps = quantizer.spec, quantizer.zero_point, self._value(quantizer.scale)
        alike = steps is not None and not spec.range.has_state and len(steps.unique()) == 1
        if steps is None or not alike or spec.block == TENSOR or self._value(quantizer.tensor) is not None:
            return
        first = (slice(1),) * steps.ndim
        known = None if point is None else self._value(point)
        self._make_one_block(quantizer, steps[first], None if known is None else known[first], "one")

    def _make_one_block(self, quantizer: Quantizer, scale: Tensor, point: Tensor | None, name: str) -> None:
        """Gives a quantizer one scale and zero point for all of its tensor."""
        site, zero_point = quantizer.site, None
        step = self._constant(scale, f"{site}#scale.{name}")
        if point is not None:
            zero_point = self._constant(point, f"{site}#zero_point.{name}")
        whole = dataclasses.replace(quantizer.spec, block=TENSOR)
        quantizer.fix(quantizer.tensor, step, zero_point, whole, quantizer.layout)

    def transpose(self, quantizer: Quantizer) -> None:
        """Case 4 for one quantizer."""
        floats = [reader.floats for reader in quantizer.dequantizers]
        readers = [(source, reader) for source in floats for reader in source.users]
        layout = quantizer.layout
        if quantizer.tensor not in self.known or not len(set(layout)) == len(layout) == 2 or not readers:
            return
        if all(reader.target is aten.t.default for _, reader in readers):
            if all(self._reads_static(product, view) for _, view in readers for product in view.users):
                self._turn(quantizer)
                for source, view in readers:
                    view.replace_all_uses_with(source)
        elif all(_is_right(reader, source) and not self._reads_static(reader, source) for source, reader in readers):
            self._turn(quantizer)
            for source in floats:
                with self.graph.inserting_after(source):
                    view = self.graph.call_function(aten.t.default, (source,))
                infer_value(view)
                for reader in [reader for reader in source.users if reader is not view]:
                    reader.replace_input_with(source, view)

    def _turn(self, quantizer: Quantizer) -> None:
        """Transposes the codes and scales of a weight."""
        self.order[quantizer.site] = (1, 0)
        point = quantizer.zero_point
        codes, scale = (
            self._turned(quantizer, "codes", quantizer.tensor),
            self._turned(quantizer, "scale", quantizer.scale),
        )
        zero_point = None if point is None else self._turned(quantizer, "zero_point", point)
        quantizer.fix(codes, scale, zero_point, quantizer.spec, quantizer.layout[::-1])

    def _turned(self, quantizer: Quantizer, name: str, node: Node) -> Node:
        return self._constant(cast(Tensor, self._value(node)).t().contiguous(), f"{quantizer.site}#{name}.t")

    def _reads_static(self, product: Node, weight: Node) -> bool:
        """True where the other operand of a product is dequantized by a scale that is known, to float32."""
        for node in product.all_input_nodes:
            while node.target in _VIEWS:
                node = cast(Node, node.args[0])
            reader = get_dequantizer(node)
            if node is not weight and reader is not None:
                return self._value(reader.scale) is not None and reader.dtype is torch.float32
        return False

    def fold(self) -> tuple[str, ...]:
        """Case 5 for every batch norm."""
        notes = []
        for target in BATCH_NORMS:
            for norm in self.graph.find_nodes(op="call_function", target=target):
                reason = self._fold(norm)
                if reason:
                    notes.append(f"batch norm {module_path(norm)} stays in float: {reason}")
        return tuple(notes)

    def _fold(self, norm: Node) -> str:
        """Folds one batch norm, or says why not."""
        product = cast(Node, norm.args[0])
        if product.target is aten.convolution.default and product.args[6]:
            return "it stands behind a transposed convolution, which onnxruntime computes in float in any case"
        if product.target is not aten.convolution.default or len(product.users) > 1:
            return f"it reads {product.name}, which is not a convolution that it alone reads"
        floats = get_dequantizer(product.args[1])
        quantizer = None if floats is None else Quantizer(floats.codes)
        held = None if quantizer is None else self._value(quantizer.tensor)
        if quantizer is None or held is None or len(quantizer.codes.users) > 1:
            return "the weight is not quantized for this convolution alone"
        site = quantizer.site
        spec, steps = quantizer.spec, cast(Tensor, self._value(quantizer.scale))
        if spec.scale.dtype is not torch.float32 or steps.numel() not in (1, len(steps)) or spec.has_zero_point:
            return f"the weight has other scales than one for each output channel: {spec}"
        if not isinstance(spec.format, IntFormat):
            return f"the weight has codes of {spec.format}"
        gain, offset = self._affine(norm)
        bias = product.args[2]
        before = 0.0 if bias is None else cast(Tensor, self._value(cast(Node, bias))).double()
        shape = (-1, *[1] * (held.ndim - 1))
        sign = torch.where(gain < 0, -1, 1).reshape(shape).to(held.dtype)
        steps = steps.double() * gain.abs().reshape(shape)
        held = held * sign
        self.negated[site] = tuple((gain < 0).nonzero().flatten().tolist())
        block = Block(out=1, in_=WHOLE, space=WHOLE, batch=WHOLE, channel=WHOLE, group=WHOLE)
        codes = self._constant(held, f"{site}#codes.folded")
        # a factor of 0 leaves sums of codes times 2^-126, which no bias sees
        scale = self._constant(steps.clamp(min=2.0**-126).float(), f"{site}#scale.folded")
        # the file needs neither a range nor a gradient, and some gradients allow no block but the tensor
        folded = dataclasses.replace(spec, block=block, range=Current(), vjp=Vjp.PASS)
        quantizer.fix(codes, scale, None, folded, quantizer.layout)
        product.update_arg(2, self._constant((before * gain + offset).to(get_value(product).dtype), f"{site}#bias"))
        for result in list(norm.users):
            result.replace_all_uses_with(product)
        return ""

    def _affine(self, norm: Node) -> tuple[Tensor, Tensor]:
        """(gain, offset) of a batch norm as float64: y = gain·x + offset."""
        gamma, beta, mean, var = (
            None if part is None else cast(Tensor, self._value(cast(Node, part))) for part in norm.args[1:5]
        )
        assert mean is not None
        assert var is not None
        return batch_norm_affine(gamma, beta, mean, var, float(cast(float, norm.args[-1])))

    def _constant(self, held: Tensor, name: str) -> Node:
        """A placeholder that holds a value."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            made = self.graph.placeholder(f"c_{len(self.constants)}")
        set_value(made, fake_mode(self.graph).from_tensor(held, static_shapes=True))
        self.known[made] = held
        self.constants[made.name] = (name, held)
        return made

    def rebuilt(self) -> ExportedProgram:
        """The program around the new graph; inputs that nothing reads are gone, except the user's own."""
        self.graph.eliminate_dead_code()
        old = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        inputs = []
        for node in self.graph.find_nodes(op="placeholder"):
            spec = old.get(node.name)
            if spec is not None and spec.kind is SpecKind.USER_INPUT:
                inputs.append(spec)
            elif not node.users:
                self.graph.erase_node(node)
            elif spec is not None:
                inputs.append(spec)
            else:
                name, _ = self.constants[node.name]
                inputs.append(InputSpec(SpecKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        self.graph.lint()
        targets = {spec.target for spec in inputs}
        new = {name: held for name, held in self.constants.values() if name in targets}
        state = {name: held for name, held in self.program.state_dict.items() if name in targets}
        return ExportedProgram(
            self.program.graph_module,
            self.graph,
            ExportGraphSignature(inputs, self._outputs()),
            {**state, **new},
            self.program.range_constraints,
            self.program.module_call_graph,
            self.program.example_inputs,
            self.program.constants,
            verifiers=self.program.verifiers,
        )

    def folded(self) -> dict[str, Tensor]:
        """Case 8: the quantizers that nothing reads any more in the graph that was built."""
        left = {quantizer.site for quantizer in list_quantizers(self.graph)}
        return {site: codes for site, codes in self.codes.items() if site not in left}

    def _outputs(self) -> list[OutputSpec]:
        """The outputs by their new names."""
        nodes = cast(tuple[Any, ...], self.graph.output_node().args[0])
        old = self.program.graph_signature.output_specs
        return [
            dataclasses.replace(spec, arg=TensorArgument(node.name)) if isinstance(node, Node) else spec
            for spec, node in zip(old, nodes, strict=True)
        ]


def _is_right(product: Node, weight: Node) -> bool:
    """True where a product of matrices reads a weight as its right operand."""
    return product.target in (aten.mm.default, aten.addmm.default) and product.all_input_nodes[-1] is weight


def _make_any_tensor(like: Node) -> Tensor:
    """Return zeros for what does not depend on the values of a tensor; a free dimension is one."""
    return torch.zeros([extent if isinstance(extent, int) else 1 for extent in get_value(like).shape])


def _is_static(node: Node) -> bool:
    """True for a scale or zero point that does not depend on the tensor in front."""
    if node.target not in (ops.SCALE, ops.ZERO_POINT):
        return False
    return parse_spec(get_argument(node, "spec")).has_known_scale
