"""Texts of graphs and inputs: equal for equal captures, different for every difference, refused for the unknown."""

import enum
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qcompiler.compiler.cache.capture_key import make_capture_key
from qcompiler.compiler.cache.texts import (
    Key,
    UncachedError,
    describe_graph,
    describe_inputs,
    describe_value,
    hash_texts,
)
from qcompiler.compiler.naming import PLAIN

pytestmark = pytest.mark.usefixtures("fresh")


class Color(enum.Enum):
    """Two members of one value would be one member."""

    RED = 1
    BLUE = 2


def trace(model, *inputs):
    """The graph that Dynamo hands over."""
    found = []

    def backend(module, given):
        found.append((module, given))
        return module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=False)(*inputs)
    return found[0]


def describe(model, *inputs):
    return describe_graph(trace(model, *inputs)[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ("1", 1),
        (None, "None"),
        ((1, 2), [1, 2]),
        ((1, (2,)), (1, 2)),
        ([], ()),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {1: "a"}),
        (slice(1, 2), slice(1, 2, 1)),
        (torch.float32, torch.float64),
        (torch.strided, torch.sparse_coo),
        (torch.contiguous_format, torch.channels_last),
        (torch.device("cpu"), torch.device("meta")),
        (Color.RED, Color.BLUE),
        (math.inf, -math.inf),
        (torch.empty(2, 3), torch.empty(3, 2)),
        (torch.empty(2, 2), torch.empty(2, 2).t()),
        (torch.empty(2), torch.empty(2).requires_grad_()),
        (torch.empty(2), torch.empty(2).double()),
        (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar),
        (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor),
    ],
)
def test_different_values_have_different_texts(first, second):
    assert describe_value(first) != describe_value(second)
    assert describe_value(first) == describe_value(first)


def test_nan_is_one_number():
    assert describe_value(math.nan) == describe_value(float("nan")) == "nan"


@pytest.mark.parametrize(
    "value",
    [
        object(),
        lambda: 1,
        {1, 2},
        nn.Linear(1, 1),
        torch.empty(2, 2).to_sparse(),
        torch.ops.qcompiler.quantize.default,
        torch.complex(torch.ones(2), torch.ones(2)).conj(),
    ],
)
def test_what_may_mean_something_else_is_refused(value):
    with pytest.raises(UncachedError):
        describe_value(value)


def test_equal_models_have_equal_texts(case):
    torch.manual_seed(0)
    texts = {describe(case.build(), *case.inputs()) for _ in range(2)}
    assert len(texts) == 1


def add_one(x):
    return x + 1


def add_two(x):
    return x + 2


def add_one_elsewhere(x):
    return x + 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (add_one, add_two),
        (add_one, add_one_elsewhere),  # reports name lines
        (lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh")),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: F.dropout(x, 0.1), lambda x: F.dropout(x, 0.2)),
        (lambda x: F.dropout(x, 0.1), lambda x: F.dropout(x, 0.1, training=False)),
        (lambda x: x.sin(), lambda x: x.cos()),
        (lambda x: x[1:], lambda x: x[:1]),
        (lambda x: x.to(torch.float64), lambda x: x.to(torch.bfloat16)),
        (lambda x: torch.cat([x, x + 1]), lambda x: torch.cat([x + 1, x])),
    ],
)
def test_different_models_have_different_texts(first, second):
    x = torch.randn(3, 3)
    assert describe(first, x) != describe(second, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.t(),
        lambda x: x[:3],
        lambda x: x.requires_grad_(),
        lambda x: nn.Parameter(x),
        lambda x: torch.cat([x.flatten(), torch.ones(1)])[1:].view(4, 4),  # another place in memory
    ],
)
def test_different_inputs_have_different_texts(change):
    x = torch.ones(4, 4)
    before = describe_inputs([x])
    assert describe_inputs([change(x)]) != before
    assert describe_inputs([torch.zeros(4, 4)]) == before or x.requires_grad


def test_inputs_that_share_memory_have_no_key(kept, caplog):
    x = torch.ones(4, 4)
    module, _ = trace(torch.add, x, torch.ones(4, 4))
    assert make_capture_key(module, [x, torch.ones(4, 4)], PLAIN) is not None
    with caplog.at_level("INFO", logger="qcompiler"):
        assert make_capture_key(module, [x, x[1:]], PLAIN) is None
    assert "share memory" in caplog.text


def test_a_subclass_of_a_tensor_is_refused():
    class Special(torch.Tensor):
        pass

    with pytest.raises(UncachedError, match="Special"):
        describe_inputs([torch.ones(2).as_subclass(Special)])


def test_an_operator_of_the_user_is_refused():
    with pytest.raises(UncachedError, match="not torch's own"):
        describe(triple, torch.randn(3))


@torch.library.custom_op("cache_test::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


triple.register_fake(torch.empty_like)


def test_a_function_of_the_user_is_refused():
    allowed = torch.compiler.allow_in_graph(lambda x: x * 2)
    with pytest.raises(UncachedError, match="Unsupported call_function target"):
        describe(lambda x: allowed(x), torch.randn(3))


def test_hooks_for_saved_tensors_are_refused():
    module, _ = trace(nn.Linear(3, 2), torch.randn(4, 3))
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x.half(), lambda x: x.float()),
        pytest.raises(UncachedError, match="hooks"),
    ):
        describe_graph(module)
    describe_graph(module)


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode of the user."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_modes_are_refused():
    module, _ = trace(nn.Linear(3, 2), torch.randn(4, 3))
    with Watching(), pytest.raises(UncachedError, match="mode"):
        describe_graph(module)


def test_hashes_depend_on_every_text():
    lists = (("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"), ("a\n", "b"))
    hashes = {hash_texts(*texts) for texts in lists}
    assert len(hashes) == 5
    assert hash_texts("a", "b") == hash_texts("a", "b")
    assert all(len(found) == 64 for found in hashes)


def test_an_extended_key_depends_on_both():
    first, second = (Key("capture", "forward at model.py:1", letter) for letter in "ab")
    keys = [first.extend("halves", "text"), first.extend("halves", "other"), second.extend("halves", "text")]
    assert len({key.hash for key in (first, second, *keys)}) == 5
    assert str(keys[0]) == "halves of forward at model.py:1"


def test_a_text_that_is_no_unicode_has_a_key():
    assert hash_texts("\udc80") != hash_texts("\udc81")


def test_a_graph_that_has_no_text_has_no_key(kept, caplog):
    module, inputs = trace(triple, torch.randn(3))
    with caplog.at_level("INFO", logger="qcompiler"):
        assert make_capture_key(module, inputs, PLAIN) is None
    reason = "not kept for the next process: operator cache_test.triple.default"
    assert f"capture of a graph: {reason}" in caplog.text


def test_without_a_folder_there_is_no_key():
    assert make_capture_key(*trace(nn.Linear(3, 2), torch.randn(4, 3)), PLAIN) is None
