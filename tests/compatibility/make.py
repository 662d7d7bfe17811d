"""Writes what this folder holds: run once, by the commit before the house was rebuilt (bf0a30e, with the guard
of `hindsight` as it was mended since), never again.

    python tests/compatibility/make.py

Checkpoints with ranges, the loss of the step after them, a recipe file, the nodes of exported files, public names.
"""

import inspect
import json
import sys
from pathlib import Path

import torch
from torch import nn

import qcompiler

FOLDER = Path(__file__).parent
RECIPES = ("in-hindsight-w8a8g8", "lsq-w4a4", "fp8-delayed", "int4-large-hindsight", "hyperblock-int4")
EXPORTS = ("hyperblock-int8", "deploy-int8", "in-hindsight-w8a8g8", "lsq-w4a4", "hfp8", "channelwise-int4")


def network() -> nn.Sequential:
    """Convolutions, batch norm, a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)),
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 2, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)


def train(qmodel: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The loss of each step."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        images, labels = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(qmodel(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resume(recipe: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer."""
    qmodel = qcompiler.compile(network(), recipe, backend="eager")
    return qmodel, torch.optim.SGD(qmodel.parameters(), lr=0.05, momentum=0.9)


def nodes(path: Path) -> list[list[object]]:
    """Operator, shapes of initializers, attributes of every node of a file, names aside."""
    import onnx

    model = onnx.load(str(path))
    held = {tensor.name: [tensor.data_type, *tensor.dims] for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        given = sorted(f"{a.name}={onnx.helper.get_attribute_value(a)}" for a in node.attribute)
        found.append([node.domain, node.op_type, [held.get(name, "") for name in node.input], given])
    return found


def signatures() -> dict[str, str]:
    """Public name → its signature, if there is one; `Class.method` too."""
    found = {}
    for name in qcompiler.__all__:
        thing = getattr(qcompiler, name)
        found[name] = signature(thing)
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            for method in sorted(key for key in vars(thing) if not key.startswith("_")):
                found[f"{name}.{method}"] = signature(getattr(thing, method))
    return found


def signature(thing: object) -> str:
    """The names and defaults of parameters."""
    if not callable(thing):
        return ""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    empty = inspect.Parameter.empty
    return ", ".join(f"{p.kind.name} {p.name}" + ("" if p.default is empty else f"={p.default!r}") for p in parameters)


def commands() -> dict[str, list[str]]:
    """Command of the command line → its parameters and options."""
    from qcompiler.cli.main import main

    return {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in main.commands.items()
    }


def main() -> None:
    """Everything into the folder."""
    after = {}
    for recipe in RECIPES:
        torch._dynamo.reset()
        qmodel, optimizer = resume(recipe)
        train(qmodel, optimizer, range(3))
        torch.save({"model": qmodel.state_dict(), "optimizer": optimizer.state_dict()}, FOLDER / f"{recipe}.pt")
        with torch.no_grad():
            evaluated = qmodel.eval()(batch(9)[0]).tolist()
        qmodel.train()
        plan = qmodel.plan()
        after[recipe] = {
            "losses": train(qmodel, optimizer, range(3, 6)),
            "evaluated": evaluated,
            "keys": list(qmodel.state_dict()),
            "sites": [[site.name, str(site.spec), list(site.consumers)] for site in plan.sites],
            "placed": plan.placed,
            "saved": [plan.saved_bytes, plan.saved_code_bytes],
            "graph": qmodel.graph_text(),
        }
    exported = {}
    for recipe in EXPORTS:
        torch._dynamo.reset()
        qmodel, optimizer = resume(recipe)
        train(qmodel, optimizer, range(2))
        path = FOLDER / "model.onnx"
        qcompiler.export_onnx(qmodel.eval(), path, (batch(9)[0],))
        exported[recipe] = nodes(path)
        path.unlink()
    recipes = {name: recipe.to_yaml() for name, recipe in qcompiler.RECIPES.items()}
    names = {"signatures": signatures(), "commands": commands()}
    for name, found in (("after", after), ("exported", exported), ("recipes", recipes), ("names", names)):
        (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
