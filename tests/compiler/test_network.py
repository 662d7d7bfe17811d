"""to_networkx(): what the graph says equals the plan, the real saved tensors and a slow walk over the fx graph."""

import sys
from collections import Counter

import networkx
import pytest
import torch
from torch import nn
from torch.fx import Node

import qcompiler
from qcompiler.compiler.plan import describe_contraction
from qcompiler.compiler.stages import QUANTIZED, StageError
from qcompiler.passes.ir.meta import iterate_contractions
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import is_view
from qcompiler.runtime import ops

pytestmark = pytest.mark.usefixtures("fresh")

LOOKS = [
    ("cnn", "hyperblock-int4"),
    ("gpt", "hyperblock-int4"),
    ("tied", "channelwise-int4"),
    ("vit", "hyperblock-int8"),
]


def readers_of(codes):
    """An oracle on the fx graph before the partition: the contractions behind a quantizer."""
    facts, found, queue = dict(iterate_contractions(codes.graph)), [], [codes]
    while queue:
        for user in queue.pop().users:
            if user in facts:
                found.append(describe_contraction(facts[user]))
            elif user.target in (ops.PACK, ops.UNPACK, ops.DEQUANTIZE) or is_view(user):
                queue.append(user)
    return sorted(found)


@pytest.mark.parametrize(("name", "recipe"), LOOKS)
@pytest.mark.sample(1)
def test_counts_and_consumers_equal_the_plan(models, eager, name, recipe):
    case = models.CASES[name]
    qmodel = eager(case.build(), recipe)
    case.loss(qmodel(*case.inputs())).backward()
    graph, plan = qmodel.to_networkx(), qmodel.plan()
    quantizers = [data for _, data in graph.nodes(data=True) if data["kind"] == "quantizer"]
    found = {data["name"]: data for data in quantizers}
    assert len(quantizers) == len(found) == len(plan.sites) > 0
    for site in plan.sites:
        data = found[site.name]
        assert (data["role"], data["spec"], data["shape"]) == (site.role, str(site.spec), site.shape)
        assert sorted(graph.nodes[reader]["name"] for reader in data["consumers"]) == sorted(site.consumers)
    kept = [data["kept"] for _, data in graph.nodes(data=True) if data["kind"] == "contraction" and data["kept"]]
    reasons = {reason.reason for reason in plan.kept}
    assert all(any(reason in text for text in kept) for reason in reasons)
    assert bool(kept) == bool(reasons)
    (whole,) = [stage for stages in qmodel.stages() for stage in stages if stage.name == QUANTIZED]
    assert {str(c.args[6]): readers_of(c) for c in whole.graph.find_nodes(op="call_function", target=ops.QUANTIZE)} == {
        name: sorted(graph.nodes[reader]["name"] for reader in data["consumers"]) for name, data in found.items()
    }


@pytest.mark.parametrize(("name", "recipe"), LOOKS[:2])
def test_the_saved_bytes_are_those_that_autograd_keeps(models, eager, name, recipe):
    case = models.CASES[name]
    torch.manual_seed(0)
    model, inputs, kept = case.build(), case.inputs(), {}
    qmodel = eager(model, recipe)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        outputs = qmodel(*inputs)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs)}
    real = [t for t in kept.values() if t.untyped_storage().data_ptr() not in own]
    graph = qmodel.to_networkx()
    sizes = [data["saved_bytes"] for _, data in graph.nodes(data=True) if data["saved_bytes"]]
    assert Counter(sizes) == Counter(t.numel() * t.element_size() for t in real)
    assert sum(sizes) == qmodel.plan().saved_bytes
    case.loss(outputs).backward()


def test_looking_gives_the_graph_that_ran(models, eager, monkeypatch):
    """The stages are made anew: their text is the one of the graph that the compiler lowered."""
    module, lowered = sys.modules["qcompiler.compiler.graph_compiler"], []
    rewrite = module.rewrite_halves

    def spy(captured, *args):
        lowered.append(graph_text(captured.module))
        return rewrite(captured, *args)

    monkeypatch.setattr(module, "rewrite_halves", spy)
    qmodel = eager(models.convolutions(), "hyperblock-int4")
    qmodel(torch.randn(4, 3, 8, 8)).sum().backward()
    assert [qmodel.graph_text()] == lowered
    assert qmodel.graph_text() == qmodel.graph_text()


def test_looking_gives_the_halves_that_ran(models, eager, monkeypatch):
    """Torch drops other nodes outside of Dynamo, such as a random key that only backward reads."""
    module, ran = sys.modules["qcompiler.compiler.rewrite"], []
    split = module.split_halves

    def spy(captured, *args, **options):
        halves = split(captured, *args, **options)
        ran.extend(map(graph_text, halves.graphs))
        return halves

    qmodel = eager(models.convolutions(), "hyperblock-int4")
    with monkeypatch.context() as patched:
        patched.setattr(module, "split_halves", spy)
        qmodel(torch.randn(4, 3, 8, 8)).sum().backward()
    (stages,) = qmodel.stages()
    assert [graph_text(stages[-1].graph), graph_text(stages[-1].backward)] == ran
    assert "draw_key" in ran[0]


def test_edges_follow_the_arguments(models, eager):
    qmodel = eager(models.convolutions(), "hyperblock-int4")
    qmodel(torch.randn(4, 3, 8, 8)).sum().backward()
    graph = qmodel.to_networkx(stage="save-quantized")
    (stage,) = (s for s in qmodel.stages()[0] if s.name == "save-quantized")
    for node in stage.graph.nodes:
        if node.op == "call_function":
            flat = [a for arg in node.args for a in (arg if isinstance(arg, list | tuple) else [arg])]
            sources = [a.name for a in flat if isinstance(a, Node)]
            assert sorted(source for source, _ in graph.in_edges(node.name)) == sorted(sources)
    assert networkx.is_directed_acyclic_graph(graph)


def test_lanes_modules_and_source_lines(models, eager):
    qmodel = eager(models.resnet20(4), "hyperblock-int8")
    qmodel(torch.randn(2, 3, 8, 8)).sum().backward()
    graph = qmodel.to_networkx()
    names = {name for name, _ in qmodel.named_modules()}
    assert {data["module"] for _, data in graph.nodes(data=True)} <= names
    by_name = {data["name"]: data for _, data in graph.nodes(data=True) if data["kind"] in ("quantizer", "contraction")}
    assert by_name["3.conv1/grad"]["lane"] == by_name["3.conv1 weight gradient"]["lane"] == "backward"
    assert by_name["3.conv1/weight"]["lane"] == by_name["3.conv1 forward"]["lane"] == "forward"
    assert by_name["3.conv1/grad"]["module"] == by_name["3.conv1 weight gradient"]["module"] == "3.conv1"
    # the input of a block with a shortcut is read by two of its modules
    assert by_name["6.conv1/input"]["module"] == "6"
    assert "models.py:" in by_name["3.conv1 weight gradient"]["source"]
    assert "self.conv1(x)" in by_name["3.conv1 weight gradient"]["source"]
    saved = [(a, b) for a, b, data in graph.edges(data=True) if data["saved"]]
    assert saved
    assert all(graph.nodes[a]["saved"] for a, _ in saved)
    crossing = {
        (data["lane"], graph.nodes[b]["lane"]) for a, data in graph.nodes(data=True) for b in graph.successors(a)
    }
    assert ("backward", "forward") not in crossing


def test_several_graphs_and_ranges_of_the_past(models, eager):
    def forward(self, x):
        h = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(h)

    model = models.Function(forward, first=nn.Linear(8, 8), second=nn.Linear(8, 4))
    qmodel = eager(model, "in-hindsight-w8a8g8")
    with torch.no_grad():
        qmodel(torch.randn(4, 8))
    graph = qmodel.to_networkx()
    assert graph.graph["graphs"] == 2
    assert {name.partition(":")[0] for name in graph} == {"1", "2"}
    assert networkx.number_weakly_connected_components(graph) >= 2
    assert any(data["kind"] == "state" for _, data in graph.nodes(data=True))


def test_eval_and_errors(models, eager):
    qmodel = eager(models.mlp(), "hyperblock-int8")
    with pytest.raises(qcompiler.CompileError, match=r"^to_networkx: nothing is captured yet; call the model"):
        qmodel.to_networkx()
    qmodel.eval()
    with torch.no_grad():
        qmodel(torch.randn(3, 12))
    graph = qmodel.to_networkx(training=False)
    assert {data["lane"] for _, data in graph.nodes(data=True)} == {"forward"}
    assert sum(data["kind"] == "quantizer" for _, data in graph.nodes(data=True)) == 4
    with pytest.raises(StageError, match=r"got 'dedup'; valid: captured, .*; did you mean 'dedupe-quantizers'\?"):
        qmodel.to_networkx(stage="dedup", training=False)


class Gated(nn.Module):
    """A convolution, attention in pieces and a gate: a weight whose codes backward makes again under another name."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.ln = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.LayerNorm(16)
        self.parts, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 10)

    def forward(self, x):
        tokens = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        q, k, v, gate = (part(tokens) for part in self.parts)
        mixed = (q @ k.transpose(1, 2) / 4).softmax(-1) @ v
        return self.head(self.ln(tokens + gate.sigmoid() * mixed).mean(1))


def test_codes_that_backward_makes_again_are_one_quantizer(eager):
    qmodel = eager(Gated(), "hyperblock-int4")
    qmodel(torch.randn(8, 3, 16, 16)).sum().backward()
    nodes = qmodel.to_networkx().nodes(data=True)
    names = [data["name"] for _, data in nodes if data["kind"] == "quantizer"]
    assert sorted(names) == sorted(site.name for site in qmodel.plan().sites)
