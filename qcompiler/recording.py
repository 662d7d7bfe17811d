"""What watched steps did, added up over steps; and their last tensors, on which other specs can be tried."""

import dataclasses
import math
from typing import Any

from torch import Tensor

from qcompiler.passes.graph import Contraction, Operand
from qcompiler.passes.plan import role_of
from qcompiler.passes.rules import Role
from qcompiler.products import Energies, Product
from qcompiler.remedies import Trial
from qcompiler.runtime.figures import Agreement, Tally, agreement, ratio, simulate, tally
from qcompiler.runtime.spec import QuantSpec, parse_spec


@dataclasses.dataclass(frozen=True)
class Held:
    """The tensor that a site quantized last."""

    x: Tensor
    spec: QuantSpec
    layout: str


class Recording:
    """A `Log` of watched steps (qcompiler/shadow.py). Tensors are those of the last step that had them.

    The *harm* of a site is the sum, over the products that read it, of ‖P(x̂, w) − P(x, w)‖²/‖P(x, w)‖²: what each of
    them loses where this operand alone is quantized. A quantizer of the role output, whose codes every reader gets,
    counts by its own noise besides.
    """

    def __init__(self) -> None:
        #: forwards so far
        self.steps = 0
        self.tallies: dict[str, Tally] = {}
        self.held: dict[str, Held] = {}
        #: by label
        self.products: dict[str, Product] = {}
        #: site → product and operand → what it lost
        self.energies: dict[str, dict[tuple[str, int], Energies]] = {}
        #: contraction → its result against float
        self.layers: dict[str, Agreement] = {}
        #: parameter → its gradient against float
        self.gradients: dict[str, Agreement] = {}

    def quantized(self, site: str, args: tuple[Any, ...], codes: Tensor) -> None:
        """Adds one quantizer of one step."""
        x, scale, point, _, text, layout, _ = args
        spec = parse_spec(text)
        self.tallies[site] = self.tallies.get(site, Tally()) + tally(x, codes, scale, point, spec, layout)
        self.held[site] = Held(x, spec, layout)

    def multiplied(self, product: Product, quantized: dict[int, Tensor]) -> None:
        """Adds what each operand's quantizer costs one product."""
        self.products[product.label] = product
        for arg, values in quantized.items():
            costs, key = self.energies.setdefault(product.sites[arg], {}), (product.label, arg)
            costs[key] = costs.get(key, Energies()) + product.energies(arg, values)

    def compared(self, label: str, own: Tensor, reference: Tensor) -> None:
        """Adds one result of one contraction."""
        self.layers[label] = self.layers.get(label, Agreement()) + agreement(own, reference)

    def gradient(self, name: str, own: Tensor, reference: Tensor) -> None:
        """Adds the gradient of one parameter."""
        self.gradients[name] = self.gradients.get(name, Agreement()) + agreement(own, reference)

    def stepped(self) -> None:
        """Counts a forward."""
        self.steps += 1

    def harm(self, site: str) -> float:
        """The harm of a site over all steps; inf where something is not finite."""
        return _harm(site, list(self.energies.get(site, {}).values()), self.tallies[site])

    def ranking(self) -> list[str]:
        """The sites, the most harmful first; of equal ones that which ran first."""
        return sorted(self.tallies, key=lambda site: -self.harm(site))

    def readers(self, site: str) -> list[tuple[Product, Operand]]:
        """The products that read a site, with the operand that it is there."""
        return [
            (product, product.operand(arg))
            for product in self.products.values()
            for arg, name in product.sites.items()
            if name == site
        ]

    def try_spec(self, site: str, spec: QuantSpec | None) -> Trial:
        """Another spec at a site, on its last tensors; each reader takes the block as it is or turned, as compiled."""
        held = self.held[site]
        losses = [product.try_spec(operand.arg, spec)[1] for product, operand in self.readers(site)]
        if spec is None:
            return Trial(None, 0.0, Tally())
        seen = simulate(held.x, spec, held.layout).tally
        return Trial(spec, _harm(site, losses, seen), seen)


def _harm(site: str, losses: list[Energies], seen: Tally) -> float:
    parts = [ratio(loss.error, loss.signal) for loss in losses]
    if role_of(site) is Role.OUTPUT or not parts:
        parts.append(ratio(seen.noise, seen.signal))
    total = sum(parts)
    return math.inf if math.isnan(total) else total


def output_of(site: str, fact: Contraction) -> bool:
    """True where a site quantizes the result of this forward contraction."""
    return fact.gradient_of is None and site.partition("#")[0] == f"{fact.site}/output"
