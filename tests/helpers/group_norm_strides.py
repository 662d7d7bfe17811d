"""Whether torch traces group norm with the strides that its kernel returns: torch 2.14.1 does not, on the CPU."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def _find_strides(x: torch.Tensor) -> tuple[int, ...]:
    return torch.nn.functional.group_norm(x, 2).stride()


_X = torch.ones(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
with FakeTensorMode() as _mode:
    _TRACED = _find_strides(_mode.from_tensor(_X))

#: False: what follows a group norm in channels last is captured for other strides than it gets, and rounds otherwise
AS_TRACED = _find_strides(_X) == _TRACED
