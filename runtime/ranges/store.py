"""The ranges that outlive a step: one small tensor a site, changed once a backward."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
import torch.distributed as dist
from torch import Tensor

from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.gather import Ranks

#: the start of a key in a checkpoint, so that ranges and weights travel in one state_dict
PREFIX = "qcompiler.ranges."


@dataclasses.dataclass(frozen=True)
class StateSite:
    """One site that keeps a range: the name, the estimator, and the kept tensor."""

    name: str
    estimator: Range
    shape: tuple[int, ...]
    device: torch.device
    #: the meaning of the numbers in the state: a state of another estimator may have the same shape
    meaning: str = ""


@dataclasses.dataclass(frozen=True)
class Moment:
    """The time at which a step read its states, for the backward that proposes the next ones."""

    #: True if the step seeks ranges in the present tensors (runtime/ranges/searched.py)
    is_first: bool
    clock: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Engine:
    """The questions of the store to the autograd engine (private in torch, so the answers are handed in)."""

    #: calls a function when the backward that runs now has ended
    after_backward: Callable[[Callable[[], None]], None]
    #: the number of the backward that runs now; −1 outside of one
    task: Callable[[], int]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A state that a step proposes, and how often the site had been committed when the step read it."""

    site: StateSite
    after: Tensor
    read_at: int


@dataclasses.dataclass
class SiteState:
    """The kept facts of one site between steps."""

    #: a parameter if the range is learned
    state: Tensor
    #: the meaning of the numbers in the state; None: nobody has said
    meaning: str | None = None
    #: backwards that have changed the state so far: the clock of refreshes
    commits: int = 0
    #: False until the site has seen a finite tensor
    is_started: bool = True

    def fits(self, site: StateSite) -> bool:
        """Return True if the state has the shape and the meaning that a site asks for."""
        return tuple(self.state.shape) == site.shape and self.means(site.meaning)

    def means(self, meaning: str) -> bool:
        """Return True if the state means this, or nobody has said the meaning."""
        return self.meaning is None or self.meaning == meaning


class RangeStore:
    """The state of every site by name.

    A forward reads the states and changes none. The backward of that forward proposes the next states, for forward and
    backward sites alike, and when the whole backward has ended the proposals are committed. So a forward without
    backward changes nothing, recomputed forwards read the states of the first forward, and each micro-batch of an
    accumulation counts once. If several forwards have read one state before the first backward, the proposals are
    merged to the widest.
    """

    def __init__(self, engine: Engine, group: "dist.ProcessGroup | None" = None) -> None:
        self._engine = engine
        self._ranks = Ranks(group)
        self._sites: dict[str, SiteState] = {}
        #: backward (by its number) → the proposals so far
        self._proposed: dict[int, list[_Seen]] = {}
        #: backwards that have changed a state so far
        self.commits = 0

    @property
    def states(self) -> dict[str, Tensor]:
        """The state of every site, in the order in which sites came."""
        return {name: held.state for name, held in self._sites.items()}

    def is_first(self, sites: Sequence[StateSite]) -> bool:
        """True if a site has no state yet, or seeks the range anew in this step. Decided without the device."""
        return any(self._is_first(site) for site in sites)

    def _is_first(self, site: StateSite) -> bool:
        held = self._find_fitting(site)
        refresh = site.estimator.refresh
        return held is None or not held.is_started or (refresh > 0 and held.commits % refresh == 0)

    def _find_fitting(self, site: StateSite) -> SiteState | None:
        held = self._sites.get(site.name)
        return held if held is not None and held.fits(site) else None

    def read(self, sites: Sequence[StateSite]) -> list[Tensor]:
        """The state of each site; NaN if there is none (or one of another shape or meaning, of another recipe)."""
        found = [(site, self._find_fitting(site)) for site in sites]
        return [
            torch.full(site.shape, torch.nan, device=site.device)
            if held is None
            else held.state.detach().to(site.device)
            for site, held in found
        ]

    def parameters(self, sites: Sequence[StateSite]) -> list[torch.nn.Parameter]:
        """Return the parameter of each learned site, made if there is none yet; NaN until `start`."""
        return [self._learn_site(site) for site in sites]

    def _learn_site(self, site: StateSite) -> torch.nn.Parameter:
        fits = self._find_fitting(site) is not None
        nothing = torch.full(site.shape, torch.nan)
        held = self._sites.setdefault(site.name, SiteState(nothing, is_started=False))
        held.is_started = held.is_started and fits
        held.meaning = site.meaning
        start = held.state if fits else nothing
        parameter = held.state
        if not isinstance(parameter, torch.nn.Parameter) or parameter.shape != site.shape:
            parameter = held.state = torch.nn.Parameter(start.to(site.device))
        elif not fits:
            parameter.data.copy_(start)
        return parameter

    def learn(self, meanings: AbstractSet[str], device: torch.device) -> None:
        """Makes parameters of loaded states that mean one of these, before the step that would make them."""
        for held in self._sites.values():
            if not isinstance(held.state, torch.nn.Parameter) and held.meaning in meanings:
                held.state = torch.nn.Parameter(held.state.to(device))

    def start(self, sites: Sequence[StateSite], after: Sequence[Tensor]) -> None:
        """Gives learned ranges without a value the value of the first finite tensor. All others wait for backward."""
        for site, state in zip(sites, after, strict=False):
            held = self._sites.get(site.name)
            waits = held is not None and not held.is_started and isinstance(held.state, torch.nn.Parameter)
            if held is not None and waits and bool(torch.isfinite(state).all()):
                held.state.data.copy_(state)
                held.is_started = True

    def means(self, name: str, meaning: str) -> bool:
        """Return True if the state of a site means this, or nobody has said the meaning."""
        return name not in self._sites or self._sites[name].means(meaning)

    def now(self, sites: Sequence[StateSite]) -> Moment:
        """The moment at which these sites are read. Forgets the proposals of a backward that ended in an error."""
        if self._engine.task() == -1:
            self._proposed.clear()
        return Moment(self.is_first(sites), tuple(map(self._count_commits, sites)))

    def _count_commits(self, site: StateSite) -> int:
        held = self._sites.get(site.name)
        return 0 if held is None else held.commits

    def propose(self, sites: Sequence[StateSite], after: Sequence[Tensor | None], moment: Moment) -> None:
        """Keeps the states after a step until the backward that runs now has ended; None: the site saw no data."""
        task = self._engine.task()
        if task not in self._proposed:
            self._proposed[task] = []
            self._engine.after_backward(lambda: self._commit(task))
        for site, state, clock in zip(sites, after, moment.clock, strict=False):
            if state is not None and not site.estimator.is_learned:
                self._proposed[task].append(_Seen(site, state.detach(), clock))

    def _commit(self, task: int) -> None:
        """Merges the proposals of one backward, over ranks too, into the new states."""
        proposals = self._proposed.pop(task, [])
        sites = {seen.site.name: seen.site for seen in proposals}
        for name, state in self._over_ranks(sites, self._merge_proposals(proposals)).items():
            held, site = self._find_fitting(sites[name]), sites[name]
            starts = held is None or not held.is_started
            kept = self._sites.setdefault(name, SiteState(state))
            kept.state, kept.meaning, kept.commits = state, site.meaning, kept.commits + 1
            if starts:  # asks the device, but only at the start of a site
                kept.is_started = not bool(state.isnan().any())
        self.commits += bool(proposals)
        self._share_learned()

    def _merge_proposals(self, proposals: Sequence[_Seen]) -> dict[str, Tensor]:
        """Returns one proposal a site; merged with the state if the site was committed after the read."""
        merged: dict[str, Tensor] = {}
        for seen in proposals:
            name, merge = seen.site.name, seen.site.estimator.merge
            held = self._find_fitting(seen.site)
            if name in merged:
                merged[name] = merge(merged[name], seen.after)
            elif held is not None and held.commits != seen.read_at:
                merged[name] = merge(held.state.to(seen.after.device), seen.after)
            else:
                merged[name] = seen.after
        return merged

    def _over_ranks(self, sites: Mapping[str, StateSite], states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same states on every rank: the states of all ranks, merged in the order of ranks."""
        if not states or self._ranks.count == 1:
            return states
        result, *others = self._ranks.gather(dict(sorted(states.items())))
        for other in others:
            result = {name: sites[name].estimator.merge(state, other[name]) for name, state in result.items()}
        return result

    def _share_learned(self) -> None:
        """Gives learned ranges, on every rank, the mean of the gradients of all ranks and the value of the first.

        DistributedDataParallel does not know these parameters. Each rank starts from the first tensor of that rank, so
        the first backward changes the values too. Gradients of earlier backwards are equal on all ranks, so the mean
        changes none.
        """
        held = {name: state for name, state in sorted(self.states.items()) if isinstance(state, torch.nn.Parameter)}
        gradients = {name: parameter.grad for name, parameter in held.items() if parameter.grad is not None}
        if not gradients or self._ranks.count == 1:
            return
        own = {name: torch.stack([gradient, held[name].detach()]) for name, gradient in gradients.items()}
        everywhere = self._ranks.gather(own)
        for name, gradient in gradients.items():
            gradient.copy_(torch.stack([rank[name][0] for rank in everywhere]).mean(0))
            held[name].data.copy_(everywhere[0][name][1])

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every state, under `PREFIX` and the site's name; the clock of refreshes; the meaning, as bytes."""
        sites = {f"{PREFIX}{name}": held for name, held in self._sites.items()}
        states = {key: held.state.detach().clone() for key, held in sites.items()}
        clocks = {f"{key}#steps": torch.tensor(held.commits) for key, held in sites.items()}
        meanings = {f"{key}#meaning": _as_tensor(held.meaning) for key, held in sites.items() if held.meaning}
        return states | clocks | meanings

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Replaces every state by a copy of the states of a `state_dict`; learned parameters keep their identity.

        States may have been averaged over checkpoints, or stored in another type: clocks are rounded, a state becomes
        float32, and one that is not finite starts anew.
        """
        plain = {key.removeprefix(PREFIX): state.detach() for key, state in states.items()}
        learned = {name: held for name, held in self._sites.items() if isinstance(held.state, torch.nn.Parameter)}
        self._sites = {
            name: _load_site(name, state, plain)
            for name, state in plain.items()
            if not name.endswith(("#steps", "#meaning"))
        }
        for name, held in learned.items():
            self._sites[name] = _keep_parameter(held.state, self._sites.get(name))
        self._proposed.clear()


def _load_site(name: str, state: Tensor, states: Mapping[str, Tensor]) -> SiteState:
    """Returns the record of one site of a checkpoint."""
    loaded = torch.where(state.isinf(), torch.nan, state.float())
    clock, meaning = states.get(f"{name}#steps"), states.get(f"{name}#meaning")
    commits = 0 if clock is None else round(clock.item())
    text = None if meaning is None else _as_text(meaning)
    return SiteState(loaded, text, commits, not bool(loaded.isnan().any()))


def _keep_parameter(parameter: Tensor, loaded: SiteState | None) -> SiteState:
    """Returns the record with the parameter of before, which takes over a loaded value of the same shape."""
    if loaded is None or loaded.state.shape != parameter.shape:
        parameter.data.fill_(torch.nan)
        commits, meaning = (0, None) if loaded is None else (loaded.commits, loaded.meaning)
        return SiteState(parameter, meaning, commits, is_started=False)
    parameter.data.copy_(loaded.state)
    return dataclasses.replace(loaded, state=parameter)


def _as_text(codes: Tensor) -> str:
    return bytes(codes.double().round().clamp(0, 255).to(torch.uint8).tolist()).decode(errors="replace")


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
