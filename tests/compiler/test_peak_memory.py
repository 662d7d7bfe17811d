"""The peak of memory of a step: what backward has read for the last time is freed."""

import weakref

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.compiler import lower
from qcompiler.runtime.execute.interpret import make_runner

pytestmark = pytest.mark.usefixtures("fresh")


def watch_backward(monkeypatch, alive):
    """Note after each half the bytes of codes among its inputs that live on."""

    def watched(module):
        run = make_runner(module)

        def half(args):
            codes = [weakref.ref(tensor) for tensor in args if not tensor.is_floating_point()]
            given = list(args)
            args.clear()
            results = run(given)
            del given
            alive.append(sum(ref().nbytes for ref in codes if ref() is not None))
            return results

        return half

    monkeypatch.setattr(lower, "make_runner", watched)


@pytest.mark.parametrize("retain", [False, True])
def test_backward_frees_each_saved_tensor_after_its_last_use(retain, monkeypatch):
    """A list of them that lived on kept all until the end: the peak of memory was that of forward and backward."""
    alive = []
    watch_backward(monkeypatch, alive)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())))
    qmodel = qcompiler.compile(model, "hyperblock-int8", backend="eager")
    loss = qmodel(torch.randn(32, 8)).sum()
    loss.backward(retain_graph=retain)
    forward, backward = alive
    assert forward == 0
    assert (backward > 0) == retain
    if retain:
        loss.backward()
        assert alive[-1] == 0
