"""What a user lets go of is gone: models, with all that was compiled for them, and the inputs of first steps."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import qcompiler

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
RECIPES = ["hyperblock-int8", "in-hindsight-w8a8g8", "lsq-w4a4"]


class Broken(nn.Module):
    """Two graphs, whose names need the model."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        """[n, 8] → [n, 3]."""
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


MODELS = {"whole": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), "broken": Broken}


def train(qmodel):
    """One step and an evaluation; returns a weak reference to their inputs."""
    x = torch.randn(2, 8)
    qmodel.train()
    qmodel(x).sum().backward()
    qmodel.eval()
    with torch.no_grad():
        qmodel(x)
    return weakref.ref(x)


def refer_to(*modules):
    """Weak references to modules and to the parameters of the last one."""
    return [weakref.ref(thing) for thing in (*modules, *modules[-1].parameters())]


def is_gone(*references):
    """Whether all of them are; Dynamo lets go of some objects in a first collection, and those of others."""
    for _ in range(3):
        gc.collect()
    return all(reference() is None for reference in references)


@pytest.mark.sample(1)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_models_and_inputs(recipe, model):
    plain = MODELS[model]()
    qmodel = qcompiler.compile(plain, recipe, backend="eager")
    assert is_gone(train(qmodel))
    references = refer_to(qmodel, plain)
    assert not is_gone(*references)
    del qmodel, plain
    assert is_gone(*references)


def test_compiled_steps():
    plain = MODELS["whole"]()
    qmodel = qcompiler.compile(plain, "in-hindsight-w8a8g8", backend="inductor")
    assert is_gone(train(qmodel))
    references = refer_to(qmodel, plain)
    del qmodel, plain
    assert is_gone(*references)


@pytest.mark.full
def test_graphs_of_many_models_do_not_pile_up():
    def count_graphs():
        for _ in range(3):
            gc.collect()
        return sum(type(thing) is torch.fx.Graph for thing in gc.get_objects())

    for _ in range(2):
        train(qcompiler.compile(MODELS["whole"](), backend="eager"))
    before = count_graphs()
    for _ in range(3):
        train(qcompiler.compile(MODELS["whole"](), backend="eager"))
    assert count_graphs() <= before


def test_the_backend_of_torch_compile():
    plain = MODELS["whole"]()
    compiled = torch.compile(plain, backend="qcompiler", options={"backend": "eager"})
    assert is_gone(train(compiled))
    references = refer_to(compiled)
    del compiled, plain
    assert is_gone(*references)


def test_a_thread_that_goes_on_keeps_no_model():
    over = threading.Event()
    start = torch._dynamo.disable(lambda: threading.Thread(target=over.wait, daemon=True).start())

    class Starting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x):
            start()
            return self.layer(x)

    plain = Starting()
    qmodel = qcompiler.compile(plain, backend="eager")
    try:
        qmodel(torch.randn(2, 8)).sum().backward()
        references = refer_to(qmodel, plain)
        del qmodel, plain
        assert is_gone(*references)
    finally:
        over.set()
