"""The search: its measurements, its budget, what it keeps on disk, and that it beats the uniform recipe."""

import copy
import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler import Recipe, Role, Rule, SearchError, parse_spec
from qcompiler.searching.search_file import SearchFile, SearchFileError, checksum_values
from qcompiler.searching.sensitivity import Sensitivity, gradient_error

pytestmark = pytest.mark.usefixtures("fresh")

UNIFORM = Recipe(
    name="uniform",
    rules=(
        Rule(spec=parse_spec("int4:max:b2c8o4i4:stochastic:pass"), role=Role.GRADIENT),
        Rule(spec=parse_spec("int4:max:b2c8o4i4:nearest:pass")),
    ),
)
NEAREST = Recipe(name="nearest", rules=(Rule(spec=parse_spec("int4:max:b2c8o4i4:nearest:pass")),))


def network():
    """Two convolutions, batch norm and a head."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5))


def batches(count, seed=0):
    """Images with labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(16, 3, 12, 12, generator=generator) for _ in range(count)]
    return [(x, x.mean((1, 2)).mul(30).sum(1).long() % 5) for x in images]


def cross_entropy(model, batch):
    """The default loss."""
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(model, batch):
    """Weight → gradient, in a copy."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    cross_entropy(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.ndim > 1}


def mean_bits(recipe):
    """Bits of codes and scales for each element, read off the plan of the compiled model."""
    qmodel = qcompiler.compile(network(), recipe, backend="eager")
    cross_entropy(qmodel, batches(1)[0]).backward()
    sites = qmodel.plan().sites
    bits = elements = 0
    for site in sites:
        counts = [*site.shape]
        for dim, letter in enumerate(site.layout):
            counts[dim] = math.ceil(counts[dim] / (site.spec.block.edge(letter) or counts[dim]))
        bits += math.prod(site.shape) * site.spec.format.bits + 8 * math.prod(counts)
        elements += math.prod(site.shape)
    return bits / elements


def test_it_beats_the_uniform_recipe():
    """At no more bits, on batches that the search has not seen, by what it has promised."""
    model, data = network(), batches(2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = qcompiler.search(model, data, budget=mean_bits(UNIFORM), recipe=UNIFORM, quiet=True)
    assert mean_bits(found) <= mean_bits(UNIFORM)
    errors = []
    for recipe in (UNIFORM, found):
        qmodel = qcompiler.compile(model, recipe, backend="eager")
        pairs = [(gradients(qmodel, batch), gradients(model, batch)) for batch in batches(4, seed=1)]
        errors.append(statistics.fmean(gradient_error(*pair) for pair in pairs))
    assert errors[1] < 0.85 * errors[0]
    assert Recipe.from_yaml(found.to_yaml()) == found
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def measured(recipe, data, file=None, loss=cross_entropy, specs=(("int3", "b2c8o4i4"), ("int8", "b4c16o8i8"))):
    """The sensitivity of the network, and its store."""
    store = SearchFile(file, {})
    found = Sensitivity(network(), recipe, specs, loss, "bits")
    found.measure(data, store, quiet=True, budget=math.inf)
    return found, store


def test_one_site_alone(eager):
    """The error of a site is that of a model in which this site is all that is quantized."""
    data = batches(1)
    _, store = measured(NEAREST, data)
    (sites,) = store.found.values()
    exact = gradients(network(), data[0])
    assert len(sites) == 9
    for site, (error, _) in sites.items():
        module, _, name = site.partition("/")
        role = {"input": Role.ACTIVATION, "weight": Role.WEIGHT, "grad": Role.GRADIENT}[name]
        only = Recipe(name="only", rules=(Rule(spec=NEAREST.rules[0].spec, role=role, module=module),))
        assert error == pytest.approx(gradient_error(gradients(eager(network(), only), data[0]), exact), rel=1e-9)


def test_errors_of_other_specs():
    """A choice scales the measured error by the losses; its cost is bits of codes and of scales."""
    found, store = measured(NEAREST, batches(2))
    choices = found.choices(store)
    assert found.slots() == [[site] for site in found.recording.tallies]
    for (site,), (coarse, fine) in zip(found.slots(), choices, strict=True):
        assert (coarse.name, fine.name) == ("int3:b2c8o4i4", "int8:b4c16o8i8")
        parts = [sites[site] for sites in store.found.values()]
        expected = statistics.fmean(error * losses[coarse.name] / losses[""] for error, losses in parts)
        assert coarse.error == pytest.approx(expected, rel=1e-12)
        assert fine.error < coarse.error
    weight = found.recording.held["3/weight"].x
    assert found.cost("3/weight", "int3", "b2c8o4i4") == 3 * weight.numel() + 8 * (16 // 4) * (8 // 4) * 9


def test_shared_quantizers_get_one_spec():
    """Two layers that read one quantizer get rules with the same spec, so that it stays one."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            return self.left(x) * self.right(x).tanh()

    data = [(torch.randn(16, 16), torch.randint(8, (16,))) for _ in range(2)]
    found = qcompiler.search(Fork(), data, budget=5, recipe=UNIFORM, quiet=True)
    inputs = {rule.module: rule.spec for rule in found.rules if rule.role is Role.ACTIVATION}
    assert inputs["left"] == inputs["right"]
    qmodel = qcompiler.compile(Fork(), found, backend="eager")
    cross_entropy(qmodel, data[0]).backward()
    assert len(qmodel.plan().sites) == 5


@pytest.mark.parametrize("budget", [3000, 8000])
def test_a_budget_of_bytes(budget):
    """What forward keeps for backward as codes and scales fits; gradients, which cost nothing, get the most bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    data = [(torch.randn(32, 32), torch.randint(8, (32,)))]
    found = qcompiler.search(model, data, budget=budget, unit="bytes", recipe=UNIFORM, quiet=True)
    qmodel = qcompiler.compile(model, found, backend="eager")
    cross_entropy(qmodel, data[0]).backward()
    plan = qmodel.plan()
    assert 0.7 * min(budget, 4600) < plan.saved_code_bytes <= budget + 520  # 512 bytes of relu bits, 8 of the key
    assert {site.spec.format.bits for site in plan.sites if site.role is Role.GRADIENT} == {8}


class InterruptedSearchError(Exception):
    """What stands for a kill."""


def test_an_interrupted_search_goes_on(tmp_path):
    """What was measured before is not measured again, and the result is that of a search in one piece."""
    data, file, calls = batches(2), tmp_path / "search.json", []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 8:
            raise InterruptedSearchError
        return cross_entropy(model, batch)

    with pytest.raises(InterruptedSearchError):
        qcompiler.search(network(), data, budget=5, recipe=UNIFORM, file=file, loss=loss, quiet=True)
    (held,) = json.loads(file.read_text())["found"].values()
    assert len(held) == 5  # one call to record, one in float
    first = len(calls)
    resumed = qcompiler.search(network(), data, budget=5, recipe=UNIFORM, file=file, loss=loss, quiet=True)
    assert len(calls) - first == 2 * (2 + 9) - 5
    whole = qcompiler.search(network(), data, budget=5, recipe=UNIFORM, quiet=True)
    assert resumed == whole
    again = len(calls)
    assert qcompiler.search(network(), data, budget=5, recipe=UNIFORM, file=file, loss=loss, quiet=True) == whole
    assert len(calls) - again == 2
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def test_the_file_belongs_to_one_search(tmp_path):
    file = tmp_path / "search.json"
    SearchFile(file, {"model": 1, "recipe": "a"}).put("0", "site", 1.0, {"": None})
    assert SearchFile(file, {"model": 1, "recipe": "a"}).has("0", "site")
    with pytest.raises(SearchFileError, match=r"of a search with another recipe; delete it, or give another file"):
        SearchFile(file, {"model": 1, "recipe": "b"})
    with pytest.raises(SearchFileError, match=r"of a search with other formats or blocks; delete it"):
        SearchFile(file, {"model": 1, "recipe": "a", "specs": []})
    for text in (
        "",
        "[]",
        '{"search": {}}',
        '{"search": 1, "found": 2}',
        '{"search": {"model": 1}, "found": {"0": 3}}',
    ):
        file.write_text(text)
        with pytest.raises(SearchFileError, match="no file of a search"):
            SearchFile(file, {"model": 1})


def test_checksums():
    a, b = torch.zeros(2), torch.ones(2)
    assert checksum_values([a, {"x": b}]) == checksum_values([a.clone(), {"x": b.clone()}])
    assert len({checksum_values(tree) for tree in ([a, b], [b, a], [a], a.bfloat16(), 1, "1", [])}) >= 6


def test_the_frontier_is_printed(capsys):
    data = [(torch.randn(16, 16), torch.randint(8, (16,)))]
    qcompiler.search(nn.Linear(16, 8), data, budget=4.6, recipe=UNIFORM)
    shown = capsys.readouterr().out
    assert "Frontier" in shown
    assert "chosen" in shown


def test_errors():
    linear, data = nn.Linear(16, 8), [(torch.randn(16, 16), torch.randint(8, (16,)))]
    valid = {"budget": 5, "recipe": UNIFORM, "quiet": True}
    for change, message in (
        ({"unit": "bit"}, "unit: got 'bit'; valid: bits, bytes"),
        ({"model": lambda x: x}, "got function; valid: a torch.nn.Module that is not compiled yet"),
        ({"model": qcompiler.compile(nn.Linear(2, 2))}, "got QuantizedModule; valid: a torch.nn.Module"),
        ({"budget": "4.5"}, "budget: got '4.5'; valid: a finite number above 0"),
        ({"budget": math.nan}, "budget: got nan"),
        ({"budget": math.inf}, "budget: got inf; valid: a finite number above 0"),
        ({"data": 5}, "data: got int; valid: an iterable of batches"),
        ({"data": []}, "data: got no batch; valid: at least one"),
        ({"data": data[0][0]}, "a batch is a Tensor; valid: a pair"),
        ({"budget": 1}, r"budget: got 1 bits; valid: at least 2\.\d+ bits"),
        ({"formats": ()}, "nothing to choose"),
        ({"recipe": "identity"}, "nothing to choose"),
        ({"recipe": "in-hindsight-w8a8g8"}, "keeps ranges between steps"),
        ({"formats": ("affine4",)}, "affine4 with block b2c8o4i4 for int4.*needs scale 'real'"),
        ({"formats": ("int99",)}, "int99 with block b2c8o4i4"),
        ({"blocks": ("z3",)}, "block: got 'z3'"),
        ({"blocks": ("each",)}, "no choice of format and block is legal"),
        ({"model": nn.ReLU(), "loss": lambda m, b: m(b[0].requires_grad_()).sum()}, "quantizes nothing in this model"),
        (
            {"loss": lambda m, b: m(b[0]).sum() * math.nan},
            r"float is not finite either \(the gradient that the loss gives for output 0",
        ),
    ):
        given = {"model": linear, "data": data, **valid, **change}
        with pytest.raises(SearchError, match=message):
            qcompiler.search(**given)


def test_a_budget_too_small_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(Sensitivity, "gradients", lambda *_: pytest.fail("measured"))
    data = [(torch.randn(16, 16), torch.randint(8, (16,)))]
    with pytest.raises(SearchError, match=r"budget: got 0\.5 bits; valid: at least 2\.\d+ bits"):
        qcompiler.search(nn.Linear(16, 8), data, budget=0.5, recipe=UNIFORM, quiet=True)


def test_a_folder_that_is_not_there_is_an_error_at_once(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        qcompiler.search(nn.Linear(16, 8), [None], budget=5, file=tmp_path / "nowhere" / "search.json", quiet=True)


def test_endless_data():
    """A loader may have more batches than are looked at."""

    def endless():
        while True:
            yield torch.randn(16, 16), torch.randint(8, (16,))

    assert qcompiler.search(nn.Linear(16, 8), endless(), budget=5, recipe=UNIFORM, batches=1, quiet=True).rules
