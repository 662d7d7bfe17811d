"""Does a file choose the classes that PyTorch chooses? ResNet-8, the 10,000 test images of CIFAR-10.

    python benchmarks/onnx_top1.py --data FOLDER [--images 10000] [RECIPE ...]

The network is trained in float for an epoch, and from there for a few steps through each recipe. FOLDER holds
`cifar10-small.npz` and `cifar10.npz`. Every image on which the two disagree is listed with its margin in PyTorch
(largest logit minus the second), beside the spread: how far PyTorch's own logits in float32 are from those in float64,
of that image and the largest of all. `plain` is onnxruntime without its optimizations.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import qcompiler
from qcompiler.exporting import run

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar
from cifar10 import train

from qcompiler.demo.nets import ResNet
from qcompiler.exporting.observe import InDouble
from qcompiler.exporting.trace import trace_model

BATCH = 250


def logits(qmodel: qcompiler.QuantizedModule, images: torch.Tensor) -> np.ndarray:
    """What PyTorch returns in eval mode, as float64."""
    return np.concatenate([run.run_reference(qmodel, (x,), {})[0] for x in images.split(BATCH)]).astype(np.float64)


def pretrained(data: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network after one epoch in float."""
    torch.manual_seed(0)
    model = ResNet(blocks=1)
    train(model, *data, 1, 0)
    return model.state_dict()


def adapted(
    recipe: str, state: dict[str, torch.Tensor], data: tuple[torch.Tensor, torch.Tensor]
) -> qcompiler.QuantizedModule:
    """The same network after 20 steps of 128 images through a recipe."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = ResNet(blocks=1)
    model.load_state_dict(state)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01, momentum=0.9)
    for images, labels in list(zip(data[0].split(128), data[1].split(128), strict=True))[:20]:
        optimizer.zero_grad()
        F.cross_entropy(qmodel(images), labels).backward()
        optimizer.step()
    return qmodel


def compare(qmodel: qcompiler.QuantizedModule, images: torch.Tensor, path: Path) -> None:
    """Exports, prints."""
    recipe = qmodel.recipe.name
    qcompiler.export_onnx(qmodel, path, (images[:4],))
    ours = logits(qmodel, images)
    double = InDouble(trace_model(qmodel, (images[:BATCH],), {}, None, frozen=False), qmodel.ranges())
    spread = np.abs(ours - np.concatenate([double.outputs((x,), {})[0] for x in images.split(BATCH)])).max(1)
    second, first = np.sort(ours, 1)[:, -2:].T
    print(f"{recipe}: spread median {np.median(spread):.2g}, largest {spread.max():.2g}; margin median", end=" ")
    print(f"{np.median(first - second):.2g}")
    for optimize in (False, True):
        session = run.open_session(path, optimize=optimize)
        parts = [session.run(None, run.make_feeds(session, (x,), {}))[0] for x in images.split(BATCH)]
        found = np.concatenate(parts)
        other = np.flatnonzero(found.argmax(1) != ours.argmax(1))
        share = 100 * (1 - len(other) / len(images))
        print(f"  {'optimized' if optimize else 'plain'}: {share:.2f} % agree, logits differ by", end=" ")
        print(f"{np.abs(found - ours).max():.2g} at most; {len(other)} of {len(images)} disagree")
        for index in other:
            print(f"    image {index}: margin {first[index] - second[index]:.2g}, spread {spread[index]:.2g}", end="")
            print("" if first[index] - second[index] <= 2 * spread.max() else ", OUTSIDE of the spread")


def main() -> None:
    """Prints the agreement for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(qcompiler.RECIPES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000)
    given = parser.parse_args()
    data = cifar.load(given.data / "cifar10-small.npz", "train")
    images, _ = cifar.load(given.data / "cifar10.npz", "test")
    state = pretrained(data)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in given.recipes:
            try:
                compare(adapted(recipe, state, data), images[: given.images], Path(folder) / "model.onnx")
            except qcompiler.ExportError as error:
                print(f"{recipe}: {error}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
