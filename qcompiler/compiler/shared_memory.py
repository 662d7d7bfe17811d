"""Inputs that share memory, one of which forward changes in place: one input of the graph, and views of that."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompiler.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor as a part of the memory that it shares."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, index: int, tensor: Tensor) -> "View":
        """Return if a tensor lies in its memory."""
        return cls(index, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


#: inputs that share memory, group by group; empty: none does
Sharing = tuple[tuple[View, ...], ...]
NONE: Final[Sharing] = ()


def find_shared(inputs: Sequence[Any], among: Iterable[int]) -> Sharing:
    """Return the inputs that share memory with one another, of those with an index in `among`."""
    storages: dict[int, list[int]] = {}
    for index in among:
        x = inputs[index]
        if isinstance(x, Tensor) and x.layout is torch.strided:
            storages.setdefault(x.untyped_storage()._cdata, []).append(index)
    groups = [group for group in storages.values() if len(group) > 1]
    return tuple(tuple(View.of(index, inputs[index]) for index in group) for group in groups)


def check_shared(inputs: Sequence[Any], names: Sequence[str], sharing: Sharing) -> None:
    """Refuse inputs that cannot be one tensor.

    Raises:
        CaptureError: an input needs gradients, or has another type.
    """
    for group in sharing:
        tensors = [inputs[view.index] for view in group]
        told = " and ".join(names[view.index] for view in group)
        if any(tensor.requires_grad for tensor in tensors) or len({tensor.dtype for tensor in tensors}) > 1:
            raise CaptureError(
                f"inputs {told} share memory, and one of them is changed in place; valid: a copy, as by clone(), of "
                "all but one, or tensors of one type that need no gradients"
            )


def merge_shared(module: GraphModule, sharing: Sharing) -> None:
    """Rewrite a Dynamo graph: the first input of each group is all of the memory, the others are read from it."""
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    for group in sharing:
        whole = placeholders[group[0].index]
        with module.graph.inserting_after(placeholders[-1]):
            views = [
                module.graph.call_function(torch.as_strided, (whole, view.shape, view.stride, view.offset))
                for view in group
            ]
        for view, made in zip(group, views, strict=True):
            placeholders[view.index].replace_all_uses_with(made, delete_user_cb=lambda user: user not in views)  # noqa: B023
    module.recompile()


def join_inputs(inputs: Sequence[Any], sharing: Sharing) -> list[Any]:
    """Return the inputs with all of the shared memory in place of the first of each group, and nothing for the others.

    The others get a number of no meaning, since the graph does not read them.
    """
    joined = list(inputs)
    for group in sharing:
        first = inputs[group[0].index]
        storage = first.untyped_storage()
        whole = first.detach().new_empty(0).set_(storage, 0, (storage.nbytes() // first.element_size(),), (1,))
        for view in group:
            joined[view.index] = whole.new_zeros(())
        joined[group[0].index] = whole
    return joined
