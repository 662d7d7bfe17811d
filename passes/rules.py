"""Rules: which operand of which contraction is quantized how. Rules are read in order and the first match decides."""

import dataclasses
import difflib
import enum
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Final

from qcompiler.runtime.ranges.present import Current
from qcompiler.runtime.spec import QuantSpec, Vjp


class Role(enum.StrEnum):
    """The part of an operand in training."""

    #: a parameter
    WEIGHT = "weight"
    #: flows forward
    ACTIVATION = "activation"
    #: flows backward
    GRADIENT = "gradient"
    #: the result of a forward contraction, for all readers
    OUTPUT = "output"
    #: a float that an operator without a contraction keeps for its gradient
    SAVED = "saved"


class Sign(enum.StrEnum):
    """The knowledge of the graph about the values of an operand."""

    #: no value is below zero: the result of relu, a sigmoid, a softmax, a pool of such …
    NONNEGATIVE = "nonnegative"
    #: nothing is known
    SIGNED = "signed"


class Product(enum.StrEnum):
    """Which of the products of a layer reads an operand."""

    #: Y = X·W
    FORWARD = "forward"
    #: dX = G·W
    INPUT_GRADIENT = "input-gradient"
    #: dW = G·X, and the bias gradient, which sums the same G
    WEIGHT_GRADIENT = "weight-gradient"


class Behind(enum.StrEnum):
    """The place of the quantizer of an output."""

    #: behind the product itself
    PRODUCT = "product"
    #: behind the batch norm and the relu that are the only readers: one integer kernel of an inference engine
    LAYER = "layer"


class Position(enum.StrEnum):
    """The place of a contraction among the forward contractions of the graph."""

    #: the one nearest to the input
    FIRST = "first"
    #: neither the first nor the last
    INNER = "inner"
    #: the one nearest to the loss
    LAST = "last"


#: matches every operator, or every module
ANY: Final = "*"
#: the contractions that a rule can name
OPERATORS: Final = ("convolution", "linear", "matmul")
#: the sum of two activations, which has an output, but operands for the quantizers of other outputs only
ADDITION: Final = "addition"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The operands of contractions that all conditions hold for are quantized by `spec`, or kept in float.

    `str(rule)` is the line of a report: `gradient of first convolution at layer1.* -> int4:fit:each:nearest:pass`, or
    `activation -> keep in float (measured)`. Conditions that hold for everything are left out.

    Raises:
        ValueError: a field is of the wrong type, or the operator is not one of `OPERATORS` and not `*`.
    """

    #: how to quantize; None = keep in float
    spec: QuantSpec | None
    #: only operands of this role; None = of every role (outputs and saved floats are no operands, and ask for a rule of
    #: their own)
    role: Role | None = None
    #: only contractions of this kind, one of `OPERATORS`; `*` = of every kind. For outputs also `addition`: a residual
    #: sum, which a rule has to name
    operator: str = ANY
    #: only modules whose path (`layer1.0.conv1`, empty for the model itself) matches this shell pattern as a whole;
    #: upper and lower case differ, and `*` also runs over dots
    module: str = ANY
    #: only contractions at this position; None = at every position
    position: Position | None = None
    #: only operands of this product; None = of all three. Rules that differ by product quantize a tensor more than once
    product: Product | None = None
    #: only operands of this sign; None = of either
    sign: Sign | None = None
    #: above 0: the operand is turned by random Hadamard matrices of this size along the summed axis in front of the
    #: quantizer, if every operand of the contraction is (passes/joint/rotate_operands.py)
    rotate: int = 0
    #: of an output: the place of the quantizer
    behind: Behind = Behind.PRODUCT
    #: why this rule is there, for the report
    reason: str = ""

    def __post_init__(self) -> None:
        for name, kind in _TYPES.items():
            given = getattr(self, name)
            if not isinstance(given, kind) and not (given is None and name in _OPTIONAL):
                none = " or None" if name in _OPTIONAL else ""
                raise ValueError(f"{name}: got {given!r} ({type(given).__name__}); valid: a {kind.__name__}{none}")
        valid = (*OPERATORS, ADDITION) if self.role is Role.OUTPUT else OPERATORS
        if self.operator not in (*valid, ANY):
            raise ValueError(
                f"operator: got {self.operator!r}; valid: {', '.join((*valid, ANY))}"
                f"{did_you_mean(self.operator, valid)}"
            )
        if self.behind is Behind.LAYER and self.role is not Role.OUTPUT:
            given = repr(str(self.role)) if self.role else "every role"
            raise ValueError(f"behind: got 'layer' for {given}; valid: role output")
        if self.rotate < 0 or self.rotate & (self.rotate - 1):
            raise ValueError(f"rotate: got {self.rotate}; valid: 0 or a power of two")
        if self.spec is not None and self.role is not Role.WEIGHT and not self.spec.outlives_batch:
            raise ValueError(
                f"range: {self.spec.range} keeps a range for each block, and block {self.spec.block} has other samples "
                "in the next batch; valid: whole axes of batch, space and group, such as tensor or b*s*g*"
            )
        if self.spec is not None and self.spec.range.is_learned and self.role not in (Role.WEIGHT, Role.ACTIVATION):
            given = repr(str(self.role)) if self.role else "every role"
            raise ValueError(
                f"range: {self.spec.range} learns from the gradient of an operand; got {given}; "
                "valid: role weight or activation"
            )
        if self.spec is not None and self.role in (Role.OUTPUT, Role.SAVED) and self.spec.vjp is not Vjp.PASS:
            raise ValueError(f"vjp: got {str(self.spec.vjp)!r} for the role {self.role}; valid: pass")
        if self.role is Role.SAVED:
            self._check_saved()

    def _check_saved(self) -> None:
        """Raise ValueError for a condition or a range that a saved float does not have."""
        for name in ("operator", "position", "product", "sign", "rotate"):
            plain = {"operator": ANY, "rotate": 0}.get(name)
            if getattr(self, name) != plain:
                raise ValueError(f"{name}: got {_show(getattr(self, name))} for the role saved; valid: module alone")
        if self.spec is not None and self.spec.range != Current():
            raise ValueError(f"range: got {self.spec.range} for the role saved; valid: current")

    def matches(
        self,
        role: Role,
        operator: str,
        module: str,
        positions: frozenset[Position],
        product: Product = Product.FORWARD,
        sign: Sign = Sign.SIGNED,
    ) -> bool:
        """Return True if every condition holds for one operand.

        Args:
            role: the part of the operand.
            operator: the kind of contraction, one of `OPERATORS`.
            module: the path of the module that the contraction belongs to.
            positions: all positions of the contraction: {FIRST, LAST} for the only one of a graph.
            product: the product of the layer that reads the operand.
            sign: the knowledge about the values.
        """
        return (
            (self.role is role or (self.role is None and role not in (Role.OUTPUT, Role.SAVED)))
            and (self.operator == operator or (self.operator == ANY and operator != ADDITION))
            and (self.position is None or self.position in positions)
            and self.product in (None, product)
            and self.sign in (None, sign)
            and fnmatch.fnmatchcase(module, self.module)
        )

    def __str__(self) -> str:
        operator = "" if self.operator == ANY else self.operator
        contraction = f"{self.position} {operator or 'contraction'}" if self.position else operator
        subject = (
            " of ".join(
                part for part in (" ".join(filter(None, (self.sign, self.role))), self.product, contraction) if part
            )
            or "everything"
        )
        where = "" if self.module == ANY else f" at {self.module or repr('')}"
        reason = f" ({self.reason})" if self.reason else ""
        subject += " behind the layer" if self.behind is Behind.LAYER else ""
        turned = f"rotated by {self.rotate}, " if self.rotate else ""
        return f"{subject}{where} -> {turned}{self.spec or 'keep in float'}{reason}"


#: the type of each field of a rule, and the fields that may be None instead
_TYPES: Final = {
    "spec": QuantSpec,
    "role": Role,
    "operator": str,
    "module": str,
    "position": Position,
    "product": Product,
    "sign": Sign,
    "rotate": int,
    "behind": Behind,
    "reason": str,
}
_OPTIONAL: Final = ("spec", "role", "position", "product", "sign")


def first_match(
    rules: Sequence[Rule],
    role: Role,
    operator: str,
    module: str,
    positions: frozenset[Position],
    product: Product = Product.FORWARD,
    sign: Sign = Sign.SIGNED,
) -> tuple[int, Rule] | None:
    """Return the first rule that matches an operand, with the index; None: no rule, and the operand stays in float."""
    for index, rule in enumerate(rules):
        if rule.matches(role, operator, module, positions, product, sign):
            return index, rule
    return None


def _show(value: object) -> str:
    """Return how a recipe file writes a value: the word of an enumeration, not its name in Python."""
    return repr(str(value) if isinstance(value, enum.StrEnum) else value)


def saves_floats(rules: Iterable[Rule]) -> bool:
    """Return True if a rule speaks of floats that operators without a contraction keep for their gradients."""
    return any(rule.role is Role.SAVED for rule in rules)


def did_you_mean(given: str, valid: Iterable[str], cutoff: float = 0.45) -> str:
    """`; did you mean 'x'?` with the nearest valid word, to end an error message with; empty if none is near.

    The cutoff lets abbreviations through: 'conv2d' and 'convolution' have a similarity of 2·4/(6+11) = 0.47.
    """
    near = difflib.get_close_matches(given, [str(word) for word in valid], n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
