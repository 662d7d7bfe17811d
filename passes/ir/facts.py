"""The knowledge of passes about a node: an `Input` of a placeholder, a `Contraction` of a node that sums products."""

import dataclasses
import enum

from qcompiler.passes.rules import Position, Product, Role


class InputKind(enum.StrEnum):
    """The meaning of a placeholder of the joint graph."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    #: an int or float of Python that changes from call to call
    NUMBER = "number"
    TANGENT = "tangent"
    #: the range of a quantizer, kept between steps; named by the site
    STATE = "state"
    #: a value that a frozen graph holds in place of what computed it; named as in the file
    CONSTANT = "constant"


@dataclasses.dataclass(frozen=True)
class Input:
    """A placeholder: the kind, and the user's name (`layer1.0.conv1.weight`)."""

    kind: InputKind
    name: str


@dataclasses.dataclass(frozen=True)
class Operand:
    """One tensor that a contraction reads."""

    #: index in the node's arguments
    arg: int
    role: Role
    #: input, weight, left, right or grad: the last part of the site's name
    name: str
    #: a letter for each dimension, as the contraction sees the tensor (runtime/numbers/blocks.py)
    layout: str
    #: the letter that is summed over
    contracted: str
    #: elements summed over along that letter in one contraction (channels of a group in a grouped convolution)
    extent: int
    #: why this operand stays in float; empty: the operand is quantized
    kept: str = ""
    #: True if a rule of the recipe keeps the operand in float, False if nothing else was possible
    asked: bool = False
    #: index of the recipe's rule that decided; None: no rule matched
    rule: int | None = None
    #: a wish for this operand, quantized or not, that could not be fulfilled
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A sum of products in the graph, forward or backward, and the knowledge of the passes about the operands."""

    #: module path of the layer, which rules match: `layer1.0.conv1`, empty for the model itself
    module: str
    #: the unique name: the path, with /matmul for contractions of activations and #2, #3 … if a module multiplies again
    site: str
    #: convolution, linear or matmul
    operator: str
    positions: frozenset[Position]
    operands: tuple[Operand, ...]
    #: a letter for each dimension of the result; empty if nobody asks (backward)
    layout: str = ""
    #: index of the recipe's rule that quantizes the result; None: the result stays in float
    output_rule: int | None = None
    #: the operand of the forward contraction whose gradient this is; None in forward and for the bias gradient
    gradient_of: int | None = None
    #: True for the sum that makes a bias gradient: no contraction, but a reader of the same codes of the gradient
    is_bias: bool = False
    #: why nothing here can be quantized; empty if the operands decide
    kept: str = ""
    #: why quantized operands are multiplied as floats although integers were asked for
    simulated: str = ""

    @property
    def product(self) -> Product:
        """Which of the layer's products this is; of a product of activations the right one counts as the weight."""
        if self.is_bias:
            return Product.WEIGHT_GRADIENT
        if self.gradient_of is None:
            return Product.FORWARD
        with_weight = any(operand.role is Role.WEIGHT for operand in self.operands)
        is_input = with_weight if self.operator != "matmul" else self.gradient_of == 0
        return Product.INPUT_GRADIENT if is_input else Product.WEIGHT_GRADIENT
