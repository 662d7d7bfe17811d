"""The figures of watched steps, added up over steps; and the last tensors, on which other specs can be tried."""

import dataclasses
import math
import statistics

from torch import Tensor

from qcompiler.debugging.contractions import Loss, RecordedContraction
from qcompiler.debugging.remedies import Trial
from qcompiler.debugging.shadow import QuantizeCall
from qcompiler.passes.ir.facts import Operand
from qcompiler.passes.ir.site_name import get_role
from qcompiler.passes.rules import Role
from qcompiler.runtime.figures import (
    Agreement,
    Tally,
    compute_ratio,
    measure_agreement,
    simulate_quantizer,
    tally_quantizer,
)
from qcompiler.runtime.quantized import Quantized
from qcompiler.runtime.spec import QuantSpec, parse_spec


@dataclasses.dataclass(frozen=True)
class LastTensor:
    """The tensor that a site quantized last."""

    x: Tensor
    spec: QuantSpec
    layout: str


class Recording:
    """A `Log` of watched steps (qcompiler/debugging/shadow.py). Tensors come from the last step that had such tensors.

    The *harm* of a site is the sum, over the contractions that read the codes, of the loss of each (`Loss.worst`) if
    this operand alone is quantized; the mean over steps. A quantizer that no contraction reads, and one of the role
    output, whose codes every reader gets, counts by the noise Σ(x − x̂)²/Σx².
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        #: forwards so far
        self.steps = 0
        self.tallies: dict[str, Tally] = {}
        self.held: dict[str, LastTensor] = {}
        #: by label
        self.products: dict[str, RecordedContraction] = {}
        #: site → contraction and operand → the loss in each step
        self.losses: dict[str, dict[tuple[str, int], list[Loss]]] = {}
        #: contraction → the result against float
        self.layers: dict[str, Agreement] = {}
        #: parameter → the gradient against float
        self.gradients: dict[str, Agreement] = {}
        #: the name of the first NaN or infinity in float too, before any quantizer made such a number; None: there is
        #: none
        self.not_finite: str | None = None
        self._given: str | None = None
        self._is_lost = False

    def quantized(self, site: str, call: QuantizeCall, codes: Tensor) -> None:
        """Adds one quantizer of one step."""
        spec = parse_spec(call.spec)
        counted = tally_quantizer(call.x, Quantized(codes, call.scale, call.zero_point, spec, call.layout))
        self.tallies[site] = self.tallies.get(site, Tally()) + counted
        self.held[site] = LastTensor(call.x, spec, call.layout)

    def multiplied(self, product: RecordedContraction, quantized: dict[int, Tensor]) -> None:
        """Adds the losses of one contraction by each operand. The sum of a bias gradient is no contraction."""
        self.products[product.label] = product
        for arg, values in quantized.items() if not product.fact.is_bias else ():
            found = self.losses.setdefault(product.sites[arg], {})
            found.setdefault((product.label, arg), []).append(product.loss(arg, values))

    def compared(self, label: str, own: Tensor, reference: Tensor) -> None:
        """Adds one result of one contraction."""
        found = measure_agreement(own, reference)
        self._judge(f"the result of {label}", found)
        self.layers[label] = self.layers.get(label, Agreement()) + found

    def gradient(self, name: str, own: Tensor, reference: Tensor) -> None:
        """Adds the gradient of one parameter."""
        found = measure_agreement(own, reference)
        self._judge(f"the gradient of {name}", found)
        self.gradients[name] = self.gradients.get(name, Agreement()) + found

    def stepped(self) -> None:
        """Counts a forward."""
        self.steps += 1
        self._given = None

    def given(self, what: str, tensor: Tensor) -> None:
        """Keeps the name of the first, which is to blame only if a result in float is not finite."""
        self._given = self._given or what

    def _judge(self, what: str, found: Agreement) -> None:
        """Finds who made the first NaN or infinity; all later ones say nothing."""
        if self.not_finite is None and not self._is_lost:
            self._is_lost = not math.isfinite(found.own)
            if not math.isfinite(found.reference):
                self.not_finite = f"{self._given or what}, step {self.steps}"

    def harm(self, site: str) -> float:
        """Return the harm of a site over all steps; inf if something is not finite."""
        found = self.losses.get(site, {}).values()
        return _compute_harm(
            site, [statistics.fmean(loss.worst for loss in steps) for steps in found], self.tallies[site]
        )

    def ranking(self) -> list[str]:
        """Return the sites, the most harmful first; of equal ones that which ran first."""
        return sorted(self.tallies, key=lambda site: -self.harm(site))

    def readers(self, site: str) -> list[tuple[RecordedContraction, Operand]]:
        """Return the contractions and sums of biases that read a site, with the operand there."""
        return [
            (product, product.operand(arg))
            for product in self.products.values()
            for arg, name in product.sites.items()
            if name == site
        ]

    def try_spec(self, site: str, spec: QuantSpec | None) -> Trial:
        """Try another spec on the last tensors of a site; each reader takes the block as given or turned."""
        held = self.held[site]
        readers = [(product, operand) for product, operand in self.readers(site) if not product.fact.is_bias]
        losses = [product.try_spec(operand.arg, spec).worst for product, operand in readers]
        if spec is None:
            return Trial(None, 0.0, Tally())
        seen = simulate_quantizer(held.x, spec, held.layout).tally
        return Trial(spec, _compute_harm(site, losses, seen), seen)


def _compute_harm(site: str, losses: list[float], seen: Tally) -> float:
    own = get_role(site) is Role.OUTPUT or not losses
    total = sum(losses) + (compute_ratio(seen.noise, seen.signal) if own else 0.0)
    return math.inf if math.isnan(total) else total
