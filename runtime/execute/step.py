"""One captured step at run time: the autograd function over the forward and the backward half."""

import contextlib
import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from qcompiler.runtime.execute.interpret import Half
from qcompiler.runtime.ranges.store import Moment, RangeStore, StateSite


@contextlib.contextmanager
def without_autocast(device_types: Iterable[str]) -> Iterator[None]:
    """A context in which autocast is off on some devices: the casts are part of a captured graph."""
    with contextlib.ExitStack() as stack:
        for kind in filter(torch.amp.is_autocast_available, device_types):  # "meta" has none
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class WriteKind(enum.Enum):
    """How the new value of an input reaches the tensor that was given."""

    #: the values alone, as under `no_grad`
    COPY = "copy"
    #: in place, with the gradient
    AUTOGRAD = "autograd"
    #: as `tensor.data = …`
    ASSIGN = "assign"


@dataclasses.dataclass(frozen=True)
class Write:
    """An input that forward changes."""

    input: int
    how: WriteKind = WriteKind.COPY
    #: of ASSIGN: the input that shares memory with this one from then on; None: new memory
    source: int | None = None

    def to(self, inputs: Sequence[Any], new: Tensor) -> None:
        """Writes the new value."""
        target = inputs[self.input]
        if self.how is WriteKind.ASSIGN:
            target.data = new.detach() if self.source is None else inputs[self.source].data
        else:
            target.copy_(new)


@dataclasses.dataclass(frozen=True)
class Tangent:
    """The gradient of one output, as backward was traced to read it."""

    #: which output of forward: written inputs come first
    output: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def fit(self, grad: Tensor | None) -> Tensor:
        """Return the gradient with the traced strides; zeros if the loss did not use the output."""
        if grad is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).zero_()
        if grad.stride() == self.stride and grad.dtype == self.dtype:
            return grad
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).copy_(grad)


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The sites of a step that keep a range; both halves read the states behind all other inputs.

    `first_…` are the halves of a step in which states are sought from the tensors themselves.
    """

    #: False in eval mode: states are read, and neither half returns those after the step
    learns: bool

    store: RangeStore
    forward_sites: tuple[StateSite, ...]
    backward_sites: tuple[StateSite, ...]
    #: for each backward site: the tangents that the tensor depends on
    backward_depends: tuple[frozenset[int], ...]
    #: None if no site is in that half
    first_forward: Half | None
    first_backward: Half | None
    #: backward for any strides: belongs to a step whose forward was a first one, which returned strides of its own
    plain_backward: Half | None

    @property
    def learned_sites(self) -> tuple[StateSite, ...]:
        """The forward sites whose state is a parameter, in order."""
        return tuple(site for site in self.forward_sites if site.estimator.is_learned)


@dataclasses.dataclass(frozen=True)
class Step:
    """Runs a captured graph: `step(*inputs)` returns the user outputs.

    Forward returns, in this order: new values of mutated inputs, user outputs, states after the step, tensors saved for
    backward. Buffers such as batch-norm statistics are written at forward, as in eager; states of ranges when backward
    has ended (runtime/ranges/store.py). Both halves run with autocast off: the casts are part of the graph already. A
    second derivative is refused: the backward half was traced without one.
    """

    forward: Half
    #: None for a graph without gradients; called with (saved, tangents as traced)
    backward: Half | None
    #: how each of the first outputs is written back
    writes: tuple[Write, ...]
    #: for each user output: True if autograd sees the output
    differentiable: tuple[bool, ...]
    tangents: tuple[Tangent, ...] = ()
    #: for each input: the tangents that the gradient depends on; None if there is no gradient
    depends: tuple[frozenset[int] | None, ...] = ()
    device_types: tuple[str, ...] = ("cpu",)
    ranges: Ranges | None = None

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if self.backward is None:
            with torch.no_grad():
                outputs, _ = self.run_forward(inputs)
            return self.write_back(inputs, outputs)
        learned = self.ranges.store.parameters(self.ranges.learned_sites) if self.ranges is not None else []
        with torch.enable_grad():  # the model may turn gradients on inside of no_grad
            outputs = list(_Run.apply(self, len(inputs), *self.detach_unused(inputs), *learned))
        return self.write_back(inputs, outputs)

    def detach_unused(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the inputs; without autograd if backward has no gradient for one, so that no graph in front runs."""
        return [
            x.detach() if needed is None and isinstance(x, Tensor) and x.requires_grad else x
            for x, needed in zip(inputs, self.depends, strict=False)
        ]

    def run_forward(self, inputs: Sequence[Any]) -> tuple[list[Any], Moment | None]:
        """Return the results of the forward half, and the moment at which the half read the states."""
        half, states, moment = self.forward, [], None
        if self.ranges is not None:
            sites = self.ranges.forward_sites
            moment = self.ranges.store.now(sites)
            states = self.ranges.store.read(sites)
            half = self.ranges.first_forward if moment.is_first and self.ranges.first_forward else half
        with without_autocast(self.device_types):
            results = list(half([*inputs, *states]))
        if self.ranges is not None and self.ranges.learns and moment is not None and moment.is_first:
            start = len(self.writes) + len(self.differentiable)
            self.ranges.store.start(self.ranges.forward_sites, results[start : start + len(states)])
        return results, moment

    def run_backward(self, args: list[Any], forward: Moment | None, used: AbstractSet[int]) -> list[Any]:
        """Return the results of the backward half, without the next states, which are proposed to the store.

        A gradient that the loss does not reach is no data: the zeros change no range.

        Args:
            args: the saved tensors, and the tangents. The list is emptied, so that tensors are freed after
                their last use.
            forward: the moment of the forward that this backward belongs to.
            used: the tangents that the loss reaches.
        """
        assert self.backward is not None
        half, states = self.backward, []
        if self.ranges is not None:
            sites = self.ranges.backward_sites
            moment = self.ranges.store.now(sites)
            states = self.ranges.store.read(sites)
            if moment.is_first and self.ranges.first_backward:
                half = self.ranges.first_backward
            elif forward is not None and forward.is_first and self.ranges.plain_backward:
                half = self.ranges.plain_backward
        with without_autocast(self.device_types):
            args += states
            results = list(half(args))
        if self.ranges is None or not self.ranges.learns or not states:
            return results
        reached = [bool(needed & used) for needed in self.ranges.backward_depends]
        after = [state if hit else None for state, hit in zip(results[-len(states) :], reached, strict=True)]
        self.ranges.store.propose(sites, after, moment)
        return results[: len(results) - len(states)]

    def before_write(self, inputs: Sequence[Any], saved: Sequence[Tensor]) -> list[Tensor]:
        """Copies those tensors saved for backward that `write_back` is about to change."""
        changed = [inputs[write.input] for write in self.writes if write.how is not WriteKind.ASSIGN]
        written = {tensor.untyped_storage().data_ptr() for tensor in changed}
        return [t.clone() if t.untyped_storage().data_ptr() in written else t for t in saved]

    def write_back(self, inputs: Sequence[Any], outputs: list[Any]) -> tuple[Any, ...]:
        """Writes mutated inputs; returns the user outputs.

        Values alone are written by one call: the statistics of 21 batch norms take 0.1 ms, one by one 0.5.
        """
        pairs = list(zip(self.writes, outputs, strict=False))
        copied = [(inputs[write.input], new) for write, new in pairs if write.how is WriteKind.COPY]
        if copied:
            with torch.no_grad():
                torch.ops.aten._foreach_copy_.default(*zip(*copied, strict=True))
        for write, new in pairs:
            if write.how is not WriteKind.COPY:
                write.to(inputs, new)
        return tuple(outputs[len(self.writes) :])

    def gradients(
        self, saved: list[Any], grads: Sequence[Tensor | None], forward: Moment | None
    ) -> list[Tensor | None]:
        """The gradient of every input; None for a gradient from outputs that the loss did not use, as in eager.

        The list of saved tensors is emptied: a second reference would keep all of them until the end of backward.
        """
        used = {i for i, tangent in enumerate(self.tangents) if grads[tangent.output] is not None}
        saved += [tangent.fit(grads[tangent.output]) for tangent in self.tangents]
        results = self.run_backward(saved, forward, used)
        return [
            grad if needed is not None and (not needed or needed & used) else None
            for grad, needed in zip(results, self.depends, strict=True)
        ]


class _Run(torch.autograd.Function):
    """forward and backward of a `Step`."""

    @staticmethod
    def forward(ctx: Any, step: Step, count_inputs: int, *args: Any) -> tuple[Any, ...]:
        inputs = args[:count_inputs]  # learned ranges follow, which the store holds too
        results, moment = step.run_forward(inputs)
        count = len(step.writes) + len(step.differentiable)
        states = len(step.ranges.forward_sites) if step.ranges is not None and step.ranges.learns else 0
        outputs, after, saved = results[:count], results[count : count + states], results[count + states :]
        ctx.save_for_backward(*step.before_write(inputs, saved))
        ctx.step, ctx.after, ctx.moment = step, after, moment
        ctx.set_materialize_grads(False)
        given = {id(one) for one in inputs}
        outputs = [_detach_output(out, given) for out in outputs]
        fixed = [write.how is not WriteKind.AUTOGRAD for write in step.writes]
        fixed += [not wanted for wanted in step.differentiable]
        ctx.mark_non_differentiable(*(o for o, f in zip(outputs, fixed, strict=True) if f and isinstance(o, Tensor)))
        return tuple(outputs)

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator] # a model may call autograd.grad in forward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # refused at once: an error at the second derivative itself (`once_differentiable`) is never reached if
            # autograd.grad asks for parameters only, and a gradient penalty would be dropped without a word
            raise RuntimeError("create_graph=True: a quantized step has no second derivative; leave create_graph out")
        step: Step = ctx.step
        if step.ranges is not None and ctx.after:
            step.ranges.store.propose(step.ranges.forward_sites, ctx.after, ctx.moment)
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # torch keeps them then if the user retains the graph
        return (None, None, *step.gradients(saved, grads, ctx.moment))


def _detach_output(out: Any, given: set[int]) -> Any:
    """Return an output that autograd does not take for a view or an input, so that users may change it in place.

    Args:
        given: the inputs, by `id`.
    """
    if not isinstance(out, Tensor):
        return out
    if id(out) in given:
        return out.clone()
    if out._is_view():
        return out.new_empty(0).set_(out.untyped_storage(), out.storage_offset(), out.shape, out.stride())
    return out
