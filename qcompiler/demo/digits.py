"""A small residual network on handwritten digits, trained in float and through a recipe, side by side.

The digits are the 1,797 real images of 8×8 pixels that scikit-learn ships. Nothing is downloaded.
"""

import copy
import dataclasses
import sys
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import qcompiler
from qcompiler.demo.measure import measure_saved_bytes, one_step, paired_times
from qcompiler.demo.nets import ResNet, measure_accuracy
from qcompiler.runtime.errors import QCompilerError
from qcompiler.tables import Table, to_text


class DemoError(QCompilerError):
    """The demo cannot run; names the missing part."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both networks after training; `print` shows a table."""

    recipe: str
    #: percent of the test images that are met
    accuracy: tuple[float, float]
    #: quantizers before and after equal ones are merged
    placed: int
    quantizers: int
    saved_bytes: tuple[int, int]
    #: of a step, median
    milliseconds: tuple[float, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; pairs belong to float and to the recipe."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            ("test accuracy, %", *(f"{score:.1f}" for score in self.accuracy)),
            ("quantizers before deduplication", "-", self.placed),
            ("quantizers after", "-", self.quantizers),
            ("bytes saved for backward", *(f"{size:,}" for size in self.saved_bytes)),
            ("time per step, ms", *(f"{time:.1f}" for time in self.milliseconds)),
        ]
        table = Table("Handwritten digits", ("", "float", self.recipe), rows)
        return to_text([table, *(f"note: {note}" for note in self.notes)])


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels): 1,408 and 389 images as float32 [n, 1, 8, 8] in 0 … 1.

    Raises:
        DemoError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DemoError("demo: scikit-learn is not installed; pip install 'qcompiler[demo]'") from error
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(data.images, dtype=torch.float32) / 16).unsqueeze(1)[order]
    labels = torch.tensor(data.target)[order]
    return images[:1408], labels[:1408], images[1408:], labels[1408:]


def train_network(name: str, model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 64) -> None:
    """SGD with momentum and a cosine schedule, with a bar on stderr; the loop knows nothing of quantization."""
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in track(range(steps), description=f"{name:>16}", console=Console(stderr=True)):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images), generator=generator).split(batch)
        index = order[step % (len(images) // batch)]
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()


def compare_recipe(recipe: str = "hyperblock-int4", epochs: int = 12, backend: str | None = None) -> Comparison:
    """Trains the same network twice, and measures both.

    Args:
        recipe: the name of a recipe, or the path of a .yaml file.
        epochs: at least 1.
        backend: as of `qcompiler.compile`.

    Raises:
        DemoError: scikit-learn is not installed.
        RecipeError: the recipe is unknown or not valid.
    """
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load_digits()
    plain = ResNet(blocks=1, channels=1, stages=2)
    quantized = qcompiler.compile(copy.deepcopy(plain), recipe, backend=backend)
    if backend != "eager":
        print("The first step of the quantized network compiles it: that takes most of the time.", file=sys.stderr)
    for name, model in (("float", plain), (quantized.recipe.name, quantized)):
        train_network(name, model, images, labels, epochs)
    models, (x, y) = (plain, quantized), (images[:64], labels[:64])
    scores = [measure_accuracy(model, test_images, test_labels, batch=389) for model in models]
    plain.train(), quantized.train()
    plan, sizes = quantized.plan(), [measure_saved_bytes(model, x) for model in models]
    times = paired_times({str(number): one_step(model, x, y) for number, model in enumerate(models)})
    return Comparison(
        quantized.recipe.name,
        (scores[0], scores[1]),
        plan.placed,
        len(plan.sites),
        (sizes[0], sizes[1]),
        (1000 * times["0"], 1000 * times["1"]),
        plan.notes,
    )
