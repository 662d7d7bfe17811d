"""debug(): the effect of every quantizer in some training steps on the tensor and on the gradients, and the remedy."""

import contextlib
import statistics
from types import TracebackType
from typing import Final, Self

from qcompiler.compiler.stages import Stage
from qcompiler.debugging.recording import Recording
from qcompiler.debugging.remedies import Proposal, Remedy, Trial, list_candidates
from qcompiler.debugging.report import DebugReport, LayerFigures, SiteFigures
from qcompiler.debugging.shadow import WatchedCompiler
from qcompiler.debugging.site_rules import site_rules
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.rules import did_you_mean
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.errors import QCompilerError
from qcompiler.runtime.spec import QuantSpec, parse_spec

#: a site stands out if its harm is above this many times the median of the peers: 10 dB; a mended site is below 6 dB
STANDS_OUT: Final = 10.0
MENDED: Final = 4.0
#: a harm that stands out whatever the peers are: half of a contraction is lost
LOST: Final = 0.5
_NO_STEP: Final = "no training step ran inside of the context"


class DebugError(QCompilerError):
    """The debugger cannot do what was asked; names the given and a valid value."""


def debug(qmodel: QuantizedModule) -> "Debugger":
    """`with qcompiler.debug(qmodel) as d:` watches the training steps inside, and changes none of the numbers.

    Inside, training mode runs node by node, with the numbers of `backend="eager"`, and each step runs once more in
    float. Outside, the compiled steps are the same as before: nothing is captured again. Evaluation mode is not
    watched.

    Raises:
        DebugError: `qmodel` is not a result of `qcompiler.compile`.
    """
    get_session("debug", qmodel, DebugError)
    return Debugger(qmodel)


class Debugger:
    """Figures of the training steps that ran inside of `debug(qmodel)`, and trials on the last tensors.

    Those tensors, one of each quantizer in float, stay in memory as long as the debugger.
    """

    def __init__(self, qmodel: QuantizedModule) -> None:
        self.qmodel = qmodel
        #: all figures, by site, contraction and parameter
        self.recording = Recording()
        #: the recipe of the recording
        self.recipe = qmodel.recipe
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self.recipe != self.qmodel.recipe:  # entered again, behind apply()
            self.recipe = self.qmodel.recipe
            self.recording.clear()
        compiler = self._contexts.enter_context(self.qmodel.training_through(WatchedCompiler))
        self._contexts.enter_context(compiler.relay.to(self.recording))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.close()

    def report(self) -> DebugReport:
        """Return all figures, the most harmful site first: `print` shows tables, `to_json`, `to_tensorboard`.

        Raises:
            DebugError: no training step ran inside of the context, or the recipe placed no quantizer.
        """
        seen, order = self.recording, self._order()
        sites = tuple(SiteFigures(site, seen.held[site].spec, seen.harm(site), seen.tallies[site]) for site in order)
        layers = tuple(LayerFigures(label, found) for label, found in seen.layers.items())
        gradients = tuple(LayerFigures(name, found) for name, found in seen.gradients.items())
        proposal = self.propose()
        advice = self._why_nothing() if proposal is None else str(proposal)
        return DebugReport(self.recipe.name, seen.steps, sites, layers, gradients, advice)

    def stages(self) -> list[list[Stage]]:
        """Every stage of the graphs that were watched, as `qmodel.stages()`; the model itself may have captured none.

        Raises:
            CompileError: nothing was watched with the present recipe.
        """
        with self.qmodel.training_through(WatchedCompiler):
            return self.qmodel.stages()

    def what_if(self, site: str, spec: QuantSpec | str | None) -> Trial:
        """Another spec (None: float) at one site, on the tensors of the last step.

        A range of the past starts from the tensor itself. Stochastic rounding draws the same bits at every call. The
        block is taken as given, or turned, as the compiler would; the tally belongs to the block as given.

        Raises:
            DebugError: no such site ran.
            ValueError: the spec is not valid.
        """
        self._check(site)
        return self.recording.try_spec(site, parse_spec(spec) if isinstance(spec, str) else spec)

    def propose(self, site: str | None = None) -> Proposal | None:
        """Return the cheapest change that brings the harm of a site down to its peers; None if no site stands out.

        None also if float is not finite either: NaN and infinities that a quantizer made are harm, others are not.

        A site stands out if the harm is above `STANDS_OUT` times the median of the peers, the sites with as many bits
        (all others if there are none), or above `LOST`. Candidates are tried on the recorded tensors, from other ranges
        over smaller blocks and more bits to float; the first that leaves at most `MENDED` times that median, and at
        most half of `LOST`, is taken.

        Args:
            site: the name; None: the site that ranks first among all that stand out.

        Raises:
            DebugError: no such site ran, or nothing ran.
        """
        if site is not None:
            self._check(site)
        if self.recording.not_finite is not None:
            return None
        out = [name for name in self._order() if self.recording.harm(name) > self._limit(name)]
        if site is None and not out:
            return None
        name = out[0] if site is None else site
        return self._propose(name) if name in out else None

    def _limit(self, site: str) -> float:
        return min(STANDS_OUT * self._usual(site), LOST)

    def _usual(self, site: str) -> float:
        """Return the median harm of the peers of a site; of a site that is alone a hundredth of the harm."""
        harms = [self.recording.harm(name) for name in self._list_peers(site)]
        return statistics.median(harms) if harms else self.recording.harm(site) / 100

    def _list_peers(self, site: str) -> list[str]:
        """Return the other sites with as many bits; all other sites if there are none."""
        bits = {name: held.spec.format.bits for name, held in self.recording.held.items()}
        others = [name for name in bits if name != site]
        return [name for name in others if bits[name] == bits[site]] or others

    def _explain_limit(self, site: str) -> str:
        """Say above which harm a site stands out, and how the number comes about."""
        limit, peers = self._limit(site), self._list_peers(site)
        if limit == LOST:
            return f"{limit:g}: half of a contraction is lost then"
        bits = self.recording.held[site].spec.format.bits
        same = bool(peers) and self.recording.held[peers[0]].spec.format.bits == bits
        others = f"the other quantizers with {bits} bits" if same else "all other quantizers"
        usual = f"{STANDS_OUT:g} times the median harm of {others}"
        return f"{limit:.3g}, {usual if peers else 'a tenth of that: there is no other quantizer'}"

    def _propose(self, name: str) -> Proposal:
        harm, target = self.recording.harm(name), min(MENDED * self._usual(name), LOST / 2)
        trials: list[tuple[Remedy, Trial]] = []
        for remedy, spec in list_candidates(self.recording.held[name].spec):
            trials.append((remedy, self.recording.try_spec(name, spec)))
            if trials[-1][1].harm <= target:
                break
        remedy, best = trials[-1]
        reason = f"{remedy}: {name} stood out"
        rules = site_rules(self.recording, self.recipe, name, lambda _: best.spec, reason)
        why = f"{name} stands out: harm {harm:.3g} is above {self._explain_limit(name)}"
        return Proposal(name, remedy, rules, harm, best.harm, target, tuple(trials), why)

    def apply(self, proposal: Proposal | None = None) -> Recipe:
        """Goes on with a recipe in which the worst site is mended; returns that recipe. Later steps are not watched.

        Raises:
            DebugError: nothing ran, nothing stands out, or float is not finite either.
        """
        chosen = self.propose() if proposal is None else proposal
        if chosen is None:
            raise DebugError(f"apply: {self._why_nothing()}")
        self.qmodel.use(self.mended(chosen))
        return self.qmodel.recipe

    def mended(self, proposal: Proposal) -> Recipe:
        """Return the present recipe with the rules of a proposal in front."""
        present = self.qmodel.recipe
        rules = tuple(dict.fromkeys((*proposal.rules, *present.rules)))
        return Recipe(name=f"{present.name.removesuffix('+debug')}+debug", rules=rules, source=present.source)

    def _order(self) -> list[str]:
        if not self.recording.tallies:
            name = self.recipe.name
            steps = f"recipe {name!r} places no quantizer in this model" if self.recording.steps else _NO_STEP
            raise DebugError(f"debug: {steps}")
        return self.recording.ranking()

    def _check(self, site: str) -> None:
        known = self.recording.tallies
        if site not in known:
            valid = ", ".join(sorted(known)) or "none, as nothing ran yet"
            raise DebugError(f"debug: no site {site!r}{did_you_mean(site, known)}; valid: {valid}")

    def _why_nothing(self) -> str:
        if self.recording.not_finite is not None:
            return f"no quantizer is to blame: float is not finite either ({self.recording.not_finite})"
        worst = self._order()[0]
        found = f"the most harmful quantizer, {worst}, has harm {self.recording.harm(worst):.3g}"
        return f"nothing stands out: {found}, not above {self._explain_limit(worst)}"
