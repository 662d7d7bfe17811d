"""Every quantizer of every named recipe, over 20 steps of training, against the oracles of their formulas.

A small network trains under a recipe. What each quantizer reads, measures and returns is recorded from the graph as it
runs. The oracles (tests/runtime), which know neither torch nor the project, compute it once more from the tensor, the
random key and a state of their own, which is carried from step to step.

Codes, values, zero points and states are compared bit for bit; scales too, but where a range holds means or deviations:
there the scale lies between those of the range times 1 − slack and times 1 + slack.
"""

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Interpreter

from qcompiler.passes.rules import Behind, Position, Product, Role, Sign
from qcompiler.recipes import RECIPES
from qcompiler.runtime import ops

pytestmark = pytest.mark.usefixtures("fresh")

STEPS = 20
EPS = 2.0**-24


def load(name: str) -> ModuleType:
    """tests/runtime/<name>.py."""
    path = Path(__file__).parents[1] / "runtime" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"qcompiler_steps_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle, range_oracle = load("oracle"), load("range_oracle")


class Net(nn.Sequential):
    """Products at the ends and inside, behind batch norm, behind relu and behind a signed activation."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 5),
        )


ENDS = {"0": Position.FIRST, "8": Position.LAST}
#: what relu keeps above zero
NONNEGATIVE = {"3/input", "8/input"}
#: what layers that end in relu hand on, where a rule speaks of the end of the layer and not of its product
NONNEGATIVE_LAYERS = {"0/output", "6/output"}
ROLES = {"input": Role.ACTIVATION, "weight": Role.WEIGHT, "grad": Role.GRADIENT, "output": Role.OUTPUT}
LEARNED = ("lsq", "learned", "pact")


class Call(NamedTuple):
    """One call of an operator of ours."""

    target: Any
    args: tuple[Any, ...]
    result: Any


class Found(NamedTuple):
    """The oracle's range: ends of every block, and how far the graph's may be from them, as a fraction."""

    low: np.ndarray
    high: np.ndarray
    slack: Any = 0.0


def array(x):
    """The logical values."""
    return x.detach().contiguous().numpy()


def short(text):
    """A spec without its range."""
    return ":".join(text.split(":")[:5])


def make_case(x, text, layout):
    """The oracle's view of the estimator in front of a tensor."""
    spec = oracle.read_spec(short(text))
    number, counts = oracle.block_numbers(tuple(x.shape), layout, spec.edges)
    name, _, numbers = (text.split(":")[5:] or ["current"])[0].partition("(")
    values = tuple(float(number) for number in numbers.rstrip(")").split(",") if number)
    kind = "int" if spec.kind == "float" else spec.kind  # both are symmetric
    return range_oracle.Case(name, values, kind, spec.bits, number, math.prod(counts))


def sign(rule, site):
    """What is known of the values that a rule would quantize."""
    known = NONNEGATIVE | (NONNEGATIVE_LAYERS if rule.behind is Behind.LAYER else set())
    return Sign.NONNEGATIVE if site in known else Sign.SIGNED


def expected_spec(rules, site):
    """The spec of the first rule for a site, by the names of modules and operands of `Net`."""
    module, _, rest = site.partition("/")
    operand, *marks = rest.split(".")
    product = next((mark for mark in marks if mark != "turned"), None)
    operator = "convolution" if module in ("0", "3") else "linear"
    where = (ROLES[operand], operator, module, frozenset({ENDS.get(module, Position.INNER)}))
    asked = [rule for rule in rules if rule.product == product]  # a rule for one product puts it into the site
    spec = next(rule.spec for rule in asked if rule.matches(*where, rule.product or Product.FORWARD, sign(rule, site)))
    return str(spec.with_block(spec.block.transposed()) if "turned" in marks else spec)


class Follower:
    """Carries the oracle's state of every site from step to step."""

    def __init__(self, rules):
        self.rules = rules
        self.states = {}
        self.sites = set()

    def follow(self, calls, learned):
        """Checks all quantizers of one step; `learned`: site → the range that the optimizer gave to the step."""
        made, first = set(), {}
        for call in calls:
            site = (call.args[6], call.args[5]) if call.target is ops.QUANTIZE else None
            if site in first:
                check_again(call, first[site])
            elif call.target is ops.QUANTIZE:
                first[site] = call
                self.check(call, calls, learned)
                made.add(identity(call.result, call.args[1], call.args[4]))
                self.sites.add(call.args[6])
            elif call.target is ops.DEQUANTIZE:
                codes, scale, point, text, layout = call.args[:5]
                zero = np.zeros(scale.numel(), np.float32) if point is None else array(point).ravel()
                values = oracle.decode(array(codes), short(text), layout, array(scale).ravel(), zero)
                assert oracle.same(array(call.result), values), text
                assert identity(codes, scale, text) in made, text
            elif call.target is ops.ROTATE:
                check_rotation(call)
            elif call.target is ops.SCALE_GRADIENT:
                check_scaled_gradient(call)

    def check(self, call, calls, learned):
        """Spec, scale, zero point, state after the step and codes of one quantizer."""
        x, scale, point, key, text, layout, site = call.args
        assert text == expected_spec(self.rules, site)
        case, data, stored = make_case(x, text, layout), array(x), array(scale).ravel()
        updates = [other for other in calls if other.target is ops.UPDATE and other.args[0] is x]
        low, high, slack = self.range(case, site, data, learned, [u.result for u in updates if u.args[2] == text])
        least, _ = oracle.measure(data, short(text), layout, (low * (1 - slack), high * (1 - slack)))
        most, zero = oracle.measure(data, short(text), layout, (low * (1 + slack), high * (1 + slack)))
        assert stored.dtype == most.dtype
        assert np.all(least <= stored), (site, text)
        assert np.all(stored <= most), (site, text)
        words = (0, 0) if key is None else tuple(key.tolist())
        expected = oracle.encode(data, short(text), layout, stored, zero, words, site)
        assert expected.zero is None if point is None else oracle.same(array(point), expected.zero), (site, text)
        assert oracle.same(array(call.result), expected.codes), (site, text)

    def range(self, case, site, x, learned, updates):
        """The range in use; carries on the state, and compares it with the one that the graph returned."""
        if case.name == "current":
            return Found(*oracle.block_ranges(x, case.number, case.blocks))
        if case.name in ("fixed", "percentile"):
            return Found(*getattr(range_oracle, case.name)(case, x))
        if case.name == "sawb":
            return sawb_range(case, x)
        if case.name in LEARNED:
            return learned_range(case, x, learned.get(site))
        (after,) = updates
        before = self.states.get(site, np.float32(np.nan))
        if case.name == "cosine":
            low, high, state = cosine_range(case, x, before, after)
        else:
            low, high, state = range_oracle.step(case, x, before)
        assert np.array_equal(array(after).reshape(state.shape), state), (site, case)
        self.states[site] = state
        return Found(low.astype(np.float32), high.astype(np.float32), slack_of(case, x, before))


def identity(codes, scale, text):
    """What tells the codes of one quantizer from those of others, whatever views and packing they went through."""
    return text, np.sort(array(codes).astype(np.int64).ravel()).tobytes(), array(scale).tobytes()


def check_again(call, first):
    """Backward, which quantizes a tensor again that is kept in float too, gets the codes of forward bit for bit."""
    assert call.args[4:] == first.args[4:]
    given = zip((*call.args[:4], call.result), (*first.args[:4], first.result), strict=True)
    assert all(one is other or oracle.same(array(one), array(other)) for one, other in given), call.args[6]


def slack_of(case, x, before):
    """How far float32 may be from the float64 of the oracle, relative to the range."""
    if case.name == "history":
        # n − 1 sums and a quotient make the mean; a difference, a square, a sum and a root follow, in units of the
        # largest of the history, which the range is at least `headroom` times
        length, deviations, _ = case.numbers
        return (deviations * (length + 4) + 4) * EPS
    if case.name == "adaptive":
        # a sum of n numbers, and of n squares; where so small an error moves the decision, the test says nothing
        for block in range(case.blocks):
            members = x[case.number == block].astype(np.float64)
            place = np.abs(members - members.mean())
            reach = 2 * members.size * EPS * np.abs(members).max()
            shares = [(place > members.std() + error).mean() > case.numbers[1] for error in (-reach, reach)]
            assert shares[0] == shares[1]
    return 0.0


def sawb_range(case, x):
    """Two means of n float64 numbers, a root and a difference that cancels; one rounding to float32."""
    low, high = range_oracle.sawb(case, x)
    c1, c2 = {4: (12.68, 12.80)}[case.bits]
    size = np.abs(x.astype(np.float64))
    error = (x.size + 6) * 2.0**-53 * (c1 * math.sqrt((size**2).mean()) + c2 * size.mean())
    return Found(low, high, np.float32(EPS + error / high))


def learned_range(case, x, held):
    """What the optimizer left; in the first step a mean or deviation of n float32 numbers."""
    if held is not None:
        return Found(*range_oracle.learned_ends(case, array(held)))
    start = np.array([[range_oracle.learned_start(case, x)]], np.float32)
    return Found(*range_oracle.learned_ends(case, start), (2 * x.size + 8) * EPS)


def cosine_range(case, x, before, after):
    """The best of all clips, but for the error of three float32 sums of n products; then as it is."""
    state, slack = before, 3 * x.size * EPS
    if np.isnan(before).all():
        state, options = array(after), dict(range_oracle.cosines(case, x))
        assert options[state[0, 0]] >= max(options.values()) - slack
        assert abs(1 - options[state[0, 0]] - state[1, 0]) <= slack
    return -state[0], state[0], state


def check_rotation(call):
    """x·R along one dimension: sums of `size` products in float32."""
    x, dim, size = call.args
    parts = np.moveaxis(array(x).astype(np.float64), dim, -1)
    parts, matrix = parts.reshape(*parts.shape[:-1], -1, size), oracle.rotation(size)
    turned = np.moveaxis(array(call.result), dim, -1).reshape(parts.shape)
    assert np.all(np.abs(turned - parts @ matrix) <= (size + 3) * EPS * (np.abs(parts) @ np.abs(matrix)))


def check_scaled_gradient(call):
    """EWGS: g·(1 + δ·sign(g)·(x − x̂)/(high − low)) inside, 0 outside; x/step is one float32 quotient."""
    grad, x, scale, text = call.args
    delta, case = float(text.split("ewgs(")[1].split(")")[0]), make_case(x, text, "o" * x.dim())
    top = 2**case.magnitude_bits - 1
    bottom = -top if case.kind == "int" else 0
    real, g = (array(x) / array(scale).ravel()[0]).astype(np.float64), array(grad).astype(np.float64)
    expected = g * (1 + delta * np.sign(g) * (real - np.rint(real)) / (top - bottom))
    expected = np.where((real < bottom) | (real > top), 0, expected)
    assert np.all(np.abs(array(call.result) - expected) <= 6 * EPS * (1 + delta) * np.abs(g))


def check_learning(calls, parameters):
    """The gradient of each learned range is that of its formula, and reaches the optimizer."""
    found = []
    for call in calls:
        if call.target is ops.RANGE_GRADIENT:
            grad, x, scale, text = call.args
            case = make_case(x, text, "o" * x.dim())
            expected, size = range_oracle.learned_gradient(case, array(grad), array(x), array(scale).ravel()[0])
            assert abs(call.result.item() - expected) <= (x.numel() + 4) * EPS * size
            found.append(abs(call.result.item()))
    given = [abs(parameter.grad.item()) for parameter in parameters if parameter.grad is not None]
    assert sorted(given) == sorted(found)


@pytest.fixture
def calls(monkeypatch):
    """Every call of an operator of ours from now on."""
    found = []

    def call(self, target, args, kwargs):
        result = plain(self, target, args, kwargs)
        if target in ops.DECOMPOSITIONS:
            found.append(Call(target, args, result))
        return result

    plain = Interpreter.call_function
    monkeypatch.setattr(Interpreter, "call_function", call)
    return found


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "identity"])
def test_twenty_steps(name, eager, calls):
    model = eager(Net(), name, strict=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)]
    follower = Follower(RECIPES[name].rules)
    for step in range(STEPS):
        x, labels = 1.1**step * torch.randn(16, 3, 4, 4), torch.randint(5, (16,))
        learned = {site: state.detach().clone() for site, state in parameters_of(model).items()}
        calls.clear()
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        follower.follow(calls, learned)
        check_learning(calls, parameters_of(model).values())
        kept = {site: state for site, state in model.ranges().items() if site not in parameters_of(model)}
        assert kept.keys() == follower.states.keys()
        for site, state in follower.states.items():
            assert np.array_equal(array(kept[site]).reshape(state.shape), state), site
        if step == 0 and parameters_of(model):
            optimizers.append(torch.optim.Adam(model.quantizer_parameters(), lr=1e-2))
            for parameter in model.quantizer_parameters():
                parameter.data /= 4  # so that some of every tensor is clipped
        for optimizer in optimizers:
            optimizer.step()
    quantized = {rule.role for rule in RECIPES[name].rules if rule.spec is not None}
    assert {ROLES[site.partition("/")[2].partition(".")[0]] for site in follower.sites} == quantized


def parameters_of(model):
    """Site → learned range."""
    return {site: state for site, state in model._session.store.states.items() if isinstance(state, nn.Parameter)}
