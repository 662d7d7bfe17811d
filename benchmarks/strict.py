"""Is strict=True to be trusted? Contractions that plain PyTorch executes, counted beside the plan of every model.

    python benchmarks/strict.py [NAME ...] [--out FILE]

A mode that sees every operator counts the contractions of one forward and one backward in plain PyTorch
(strict_counts.py). The plan is that of a recipe which quantizes everything. Both numbers must be equal, operator by
operator and half by half, or the plan names the difference: contractions outside of the captured graphs, or inside of
a higher-order operator. strict=True must raise for every model with something that the plan keeps in float, or with a
graph break, and for no other.

The loss reads every output, since a plan is that of a graph and does not know the loss. Exits 1 on a difference
without a name.
"""

import argparse
import dataclasses
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import strict_models
from strict_counts import Halves, Recorder, count_of

import qcompiler
from qcompiler import Recipe, Rule
from qcompiler.compiler.plan import Kept, QuantPlan
from qcompiler.compiler.stages import QUANTIZED, find_stage
from qcompiler.passes.ir.meta import is_backward, iterate_contractions
from qcompiler.runtime.spec import parse_spec

#: forward operator → the contractions of its gradients
GRADIENTS: Final = {
    "mm": {"mm": 2},
    "addmm": {"mm": 2},
    "bmm": {"bmm": 2},
    "baddbmm": {"bmm": 2},
    "convolution": {"convolution_backward": 2},
    "mkldnn_rnn_layer": {"mkldnn_rnn_layer_backward": 1},
}
#: under Dynamo transformers takes operators of its own for an operator of torch; each with its number of contractions
TWINS: Final = {"grouped_mm_fallback": ("_grouped_mm", 1), "grouped_mm_fallback_backward": ("_grouped_mm", 2)}
#: how the plan begins to say why a contraction is in no captured graph
OUTSIDE, INSIDE = "runs outside of the captured graphs", "inside of a higher-order operator, in the "
#: everything by one rule, with blocks that are legal everywhere: nothing is kept on demand, nothing for its size
EVERYTHING: Final = Recipe(name="everything", rules=(Rule(spec=parse_spec("int8:fit:tensor:nearest:pass")),))


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the plan of a model says."""

    plan: QuantPlan
    #: in the captured graphs after all passes
    counts: Halves
    #: operators in the graphs: one may make several contractions
    nodes: int
    #: (operator, path of the layer) → number, of forward
    places: Counter[tuple[str, str]]
    #: True if a captured graph ran more than once in the call
    is_repeated: bool

    @property
    def is_whole(self) -> bool:
        """True if nothing stays in float, and nothing breaks the graph."""
        broken = any(note.startswith(("graph break", "no graph ran")) for note in self.plan.notes)
        return not broken and all(kept.asked for kept in self.plan.kept)

    def kept(self, reason: str) -> list[Kept]:
        """Return what stays in float for a reason that starts like this."""
        return [kept for kept in self.plan.kept if kept.reason.startswith(reason)]


def sum_outputs(outputs: Any) -> Tensor:
    """Return a loss that every differentiable output moves."""
    found = [out for out in find_tensors(outputs) if out.requires_grad]
    return torch.stack([(out.abs() if out.is_complex() else out).float().sin().sum() for out in found]).sum()


def find_tensors(tree: Any) -> Iterable[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from find_tensors(part)


def count_plain(case: strict_models.Case) -> Recorder:
    """Count the contractions of plain PyTorch: one forward, one backward."""
    torch.manual_seed(0)
    model = case.build()
    recorder = Recorder(model)
    args, options = case.call()
    with recorder:
        recorder.backward(sum_outputs(model(*args, **options)))
    return recorder


def train_step(case: strict_models.Case, *, strict: bool) -> qcompiler.QuantizedModule:
    """Compile a model by a recipe that quantizes everything, and train it one step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    qmodel = qcompiler.compile(case.build(), EVERYTHING, backend="eager", strict=strict)
    args, options = case.call()
    sum_outputs(qmodel(*args, **options)).backward()
    return qmodel


def count_planned(case: strict_models.Case) -> Planned:
    """Count the contractions of the plan, in the captured graphs after all passes."""
    qmodel = train_step(case, strict=False)
    compiler = qmodel._session.get_compiler(True)
    counts, places, nodes = Halves(), Counter[tuple[str, str]](), 0
    for stages in qmodel.stages() if compiler.captures else []:
        for node, fact in iterate_contractions(find_stage(stages, QUANTIZED).graph):
            kind = node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]
            kind, count = TWINS.get(kind) or (kind, 0 if fact.is_bias else count_of(kind, node.args))
            half = "backward" if is_backward(node) else "forward"
            counts[half, kind] += count
            nodes += not fact.is_bias
            places[kind, fact.module] += half == "forward"
    planned = Planned(qmodel.plan(), Halves(+counts), nodes, places, compiler.runs > len(compiler.captures))
    check_table(planned)
    return planned


def check_table(planned: Planned) -> None:
    """Check that the printed table has as many contractions as the graphs.

    Raises:
        ValueError: it has more or fewer.
    """
    readers = {reader for site in planned.plan.sites for reader in site.consumers}
    readers |= {kept.consumer for kept in planned.plan.kept if "/" in kept.name}
    whole = [
        kept for kept in planned.plan.kept if "/" not in kept.name and not kept.reason.startswith((OUTSIDE, INSIDE))
    ]
    listed = len([reader for reader in readers if not reader.endswith(" bias gradient")]) + len(whole)
    if listed != planned.nodes:
        raise ValueError(f"the table lists {listed} contractions, the graphs hold {planned.nodes}")


def compare(plain: Recorder, planned: Planned) -> tuple[list[str], list[str]]:
    """Return the differences that the plan names, and those that it does not."""
    kernels = Counter(kept.reason for kept in planned.kept("") if not kept.reason.startswith((OUTSIDE, INSIDE)))
    named = [f"{count} kept: {reason}" for reason, count in kernels.items()]
    executed = Halves({key: count for key, count in plain.counts.items() if key[0] != "again"})
    missing = executed - planned.counts
    for text, allowed in explain(plain, planned).items():
        covered = missing & allowed
        named += [f"{covered.total()} {text}"] if covered else []
        missing = missing - covered
    unnamed = [f"plan lacks {count} {kind} {half}" for (half, kind), count in missing.items()]
    surplus = planned.counts - executed
    return named, unnamed + [f"plan has {count} {kind} {half} too many" for (half, kind), count in surplus.items()]


def explain(plain: Recorder, planned: Planned) -> dict[str, Counter[tuple[str, str]]]:
    """Return for each reason the contractions that may be missing in the captured graphs."""
    inside = planned.kept(INSIDE)
    halves = [kept.reason.removeprefix(INSIDE).partition(" half")[0] for kept in inside]
    outside = {(operator_of(kept), kept.consumer.replace("(root)", "")) for kept in planned.kept(OUTSIDE)}
    again = set(planned.places) if planned.is_repeated else set()
    return {
        "inside of higher-order operators": Counter(zip(halves, map(operator_of, inside), strict=True)),
        "outside of the graphs": find_missing(plain, planned, outside),
        "in graphs that run again": find_missing(plain, planned, again),
    }


def operator_of(kept: Kept) -> str:
    """Return mm for aten.mm.default."""
    return kept.name.split(".")[1]


def find_missing(plain: Recorder, planned: Planned, layers: set[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Return what plain PyTorch executes more often than the plan says in these layers, with the gradients of it."""
    found = Counter[tuple[str, str]]()
    for (kind, path), count in plain.places.items():
        # attention runs the projection that another module owns
        own = [place for place in layers if place[0] == kind and (place[1] == path or place[1].startswith(f"{path}."))]
        more = max(0, count - sum(planned.places[place] for place in own)) if own or (kind, path) in layers else 0
        found["forward", kind] += more
        for gradient, most in GRADIENTS.get(kind, {}).items():
            found["backward", gradient] += most * more
    return +found


def find_verdict(case: strict_models.Case) -> str:
    """Return "accepts", or the error by which strict=True refuses a model."""
    try:
        train_step(case, strict=True)
    except qcompiler.CompileError as error:
        return str(error).partition("\n")[0]
    return "accepts"


@dataclasses.dataclass(frozen=True)
class Row:
    """One model: both counts, forward/backward, the differences, and the verdict of strict=True."""

    name: str
    plain: str
    planned: str
    named: list[str]
    unnamed: list[str]
    verdict: str

    def __str__(self) -> str:
        verdict = self.verdict.replace("strict: ", "raises: ", 1)[:76]
        differences = "; ".join([*self.named, *(f"UNNAMED: {text}" for text in self.unnamed)]) or "none"
        return f"{self.name:<24} {self.plain:<10} {self.planned:<8} {differences:<76} {verdict}"


def examine(name: str, case: strict_models.Case) -> Row:
    """Count, compare and try strict=True."""
    plain, planned = count_plain(case), count_planned(case)
    named, unnamed = compare(plain, planned)
    verdict = find_verdict(case)
    if (verdict == "accepts") != planned.is_whole:
        unnamed.append("strict raises for nothing" if planned.is_whole else "strict accepts what is kept")
    return Row(name, str(plain.counts), str(planned.counts), named, unnamed, verdict)


def main() -> int:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; all by default")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases, bad = strict_models.all_cases(), 0
    lines = [str(Row("model", "PyTorch", "plan", ["differences that the plan names"], [], "strict=True"))]
    for name in args.names or cases:
        try:
            row = examine(name, cases[name])
            line, bad = str(row), bad + bool(row.unnamed)
        except Exception as error:
            line, bad = f"{name:<24} {type(error).__name__}: {str(error)[:300]}", bad + 1
        lines.append(line)
        print(line, flush=True)
    print(f"{len(lines) - 1} models, {bad} with a difference that has no name")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
