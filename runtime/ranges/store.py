"""The ranges that outlive a step: one small tensor a site, changed once a backward."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
import torch.distributed as dist
from torch import Tensor

from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.gather import Ranks

#: what a key of a checkpoint starts with, so that ranges and weights travel in one state_dict
PREFIX = "qcompiler.ranges."


@dataclasses.dataclass(frozen=True)
class StateSite:
    """One site that keeps a range: its name, its estimator, and the tensor that it keeps."""

    name: str
    estimator: Range
    shape: tuple[int, ...]
    device: torch.device
    #: what the numbers of the state mean: those of another estimator may have the same shape
    meaning: str = ""


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a step read its states: what its backward needs to know to propose the next ones."""

    #: True where the step seeks ranges from its own tensors (runtime/ranges/observed.py)
    is_first: bool
    clock: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Engine:
    """What the store asks of the autograd engine (private in torch, so it is handed in)."""

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


class RangeStore:
    """The state of every site by name.

    A forward reads the states and changes none. Its backward proposes the states after it, forward and backward sites
    alike, and when the whole backward has ended they are committed. So a forward without backward changes nothing,
    recomputed forwards read what the first one read, and each micro-batch of an accumulation counts once. Where several
    forwards have read one state before their backward, their proposals are merged to the widest.
    """

    def __init__(self, engine: Engine, group: "dist.ProcessGroup | None" = None) -> None:
        self._engine = engine
        self._ranks = Ranks(group)
        self.states: dict[str, Tensor] = {}
        #: site → what its state means
        self._meanings: dict[str, str] = {}
        self._commits: dict[str, int] = {}
        #: sites whose state holds a NaN still: they have not seen a finite tensor yet
        self._unseen: set[str] = set()
        #: backward (by its number) → what it has proposed so far
        self._proposed: dict[int, list[_Seen]] = {}
        #: learned sites whose parameter has no value yet
        self._unstarted: set[str] = set()
        #: backwards that have changed a state so far
        self.commits = 0

    def is_first(self, sites: Sequence[StateSite]) -> bool:
        """True where a site has no state yet, or seeks its range anew in this step. Decided without the device."""
        return any(
            not self._fits(site)
            or site.name in self._unstarted
            or site.name in self._unseen
            or (site.estimator.refresh > 0 and self._commits.get(site.name, 0) % site.estimator.refresh == 0)
            for site in sites
        )

    def read(self, sites: Sequence[StateSite]) -> list[Tensor]:
        """The state of each site; NaN where there is none (or one of another shape or meaning, of another recipe)."""
        return [
            self.states[site.name].detach().to(site.device)
            if self._fits(site)
            else torch.full(site.shape, torch.nan, device=site.device)
            for site in sites
        ]

    def parameters(self, sites: Sequence[StateSite]) -> list[torch.nn.Parameter]:
        """The parameter of each learned site, made where there is none yet; NaN until `start`."""
        for site in sites:
            held, fits = self.states.get(site.name), self._fits(site)
            start = held if held is not None and fits else torch.full(site.shape, torch.nan)
            if not isinstance(held, torch.nn.Parameter) or held.shape != site.shape:
                self._make_parameter(site.name, start.to(site.device))
            if not fits:
                self.states[site.name].data.copy_(start)
                self._unstarted.add(site.name)
            self._meanings[site.name] = site.meaning
        found = [self.states[site.name] for site in sites]
        return [parameter for parameter in found if isinstance(parameter, torch.nn.Parameter)]

    def learn(self, meanings: AbstractSet[str], device: torch.device) -> None:
        """Makes parameters of loaded states that mean one of these, before the step that would make them."""
        for name, state in self.states.items():
            if not isinstance(state, torch.nn.Parameter) and self._meanings.get(name) in meanings:
                self._make_parameter(name, state.to(device))

    def _make_parameter(self, name: str, start: Tensor) -> None:
        """A parameter that waits for its first finite tensor where a loaded state was saved before one."""
        self.states[name] = torch.nn.Parameter(start)
        if name in self._unseen:
            self._unseen.remove(name)
            self._unstarted.add(name)

    def start(self, sites: Sequence[StateSite], after: Sequence[Tensor]) -> None:
        """Gives learned ranges without a value that of their first finite tensor. All others wait for backward."""
        for site, state in zip(sites, after, strict=False):
            if site.name in self._unstarted and bool(torch.isfinite(state).all()):
                self.states[site.name].data.copy_(state)
                self._unstarted.remove(site.name)

    def means(self, name: str, meaning: str) -> bool:
        """True where the state of a site means this, or nobody has said what it means."""
        return self._meanings.get(name, meaning) == meaning

    def _fits(self, site: StateSite) -> bool:
        held = self.states.get(site.name)
        return held is not None and tuple(held.shape) == site.shape and self.means(site.name, site.meaning)

    def now(self, sites: Sequence[StateSite]) -> Moment:
        """The moment at which these sites are read. Forgets what a backward has proposed that ended in an error."""
        if self._engine.task() == -1:
            self._proposed.clear()
        return Moment(self.is_first(sites), tuple(self._commits.get(site.name, 0) for site in sites))

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
        """Merges what one backward has proposed, over ranks too, and makes it the state."""
        merged: dict[str, Tensor] = {}
        proposals = self._proposed.pop(task, [])
        for seen in proposals:
            name, merge = seen.site.name, seen.site.estimator.merge
            if name in merged:
                merged[name] = merge(merged[name], seen.after)
            elif self._commits.get(name, 0) != seen.read_at and self._fits(seen.site):
                merged[name] = merge(self.states[name].to(seen.after.device), seen.after)
            else:
                merged[name] = seen.after
        sites = {seen.site.name: seen.site for seen in proposals}
        starts = {name for name, site in sites.items() if name in self._unseen or not self._fits(site)}
        self.states |= self._over_ranks(sites, merged)
        self._meanings |= {name: site.meaning for name, site in sites.items()}
        # asks the device, but only at the start of a site
        self._unseen = self._unseen - starts | {name for name in starts if self.states[name].isnan().any()}
        for name in merged:
            self._commits[name] = self._commits.get(name, 0) + 1
        self.commits += bool(merged)
        self._share_learned()

    def _over_ranks(self, sites: Mapping[str, StateSite], states: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same states on every rank: those of all ranks, merged in the order of ranks."""
        if not states or self._ranks.count == 1:
            return states
        result, *others = self._ranks.gather(dict(sorted(states.items())))
        for other in others:
            result = {name: sites[name].estimator.merge(state, other[name]) for name, state in result.items()}
        return result

    def _share_learned(self) -> None:
        """Gives learned ranges, on every rank, the mean of the gradients of all ranks and the value of the first.

        DistributedDataParallel does not know these parameters. Each rank starts them from its own first tensor, so the
        first backward changes the values too. The mean of gradients that earlier backwards accumulated is themselves.
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
        states = {f"{PREFIX}{name}": state.detach().clone() for name, state in self.states.items()}
        clocks = {f"{PREFIX}{name}#steps": torch.tensor(self._commits.get(name, 0)) for name in self.states}
        meanings = {f"{PREFIX}{name}#meaning": _as_tensor(text) for name, text in self._meanings.items() if text}
        return states | clocks | meanings

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Replaces every state by a copy of those that `state_dict` gave; learned parameters keep their identity.

        States may have been averaged over checkpoints, or stored in another type: clocks are rounded, a state becomes
        float32, and one that is not finite starts anew.
        """
        plain = {key.removeprefix(PREFIX): state.detach() for key, state in states.items()}
        self._commits = {
            key.removesuffix("#steps"): round(n.item()) for key, n in plain.items() if key.endswith("#steps")
        }
        texts = {key.removesuffix("#meaning"): state for key, state in plain.items() if key.endswith("#meaning")}
        self._meanings = {name: _as_text(state) for name, state in texts.items()}
        loaded = {
            name: torch.where(state.isinf(), torch.nan, state.float())
            for name, state in plain.items()
            if not name.endswith(("#steps", "#meaning"))
        }
        learned = {name: held for name, held in self.states.items() if isinstance(held, torch.nn.Parameter)}
        for name, parameter in learned.items():
            if name in loaded and loaded[name].shape == parameter.shape:
                parameter.data.copy_(loaded[name])
                self._unstarted.discard(name)
            else:
                parameter.data.fill_(torch.nan)
                self._unstarted.add(name)
        self.states = loaded | learned
        unseen = {name for name, state in loaded.items() if state.isnan().any()}
        self._unstarted |= unseen & learned.keys()
        self._unseen = unseen - learned.keys()
        self._proposed.clear()


def _as_text(codes: Tensor) -> str:
    return bytes(codes.double().round().clamp(0, 255).to(torch.uint8).tolist()).decode(errors="replace")


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
