"""The examples that need no data: tiny settings, a run resumed from its checkpoint, the tables that they print."""

import importlib.util
from pathlib import Path

import pytest
import torch

import qcompiler

pytestmark = pytest.mark.usefixtures("fresh")

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    """An example as a module; `main(arguments)` is what the command runs."""
    spec = importlib.util.spec_from_file_location(f"qcompiler_examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text():
    pytest.importorskip("transformers")
    return load("finetune_text")


@pytest.fixture(scope="module")
def formats():
    pytest.importorskip("sklearn")
    return load("compare_formats")


def test_fine_tuning_lowers_the_loss(text, capsys):
    scores = text.main(["--pretrain", "3", "--steps", "6", "--recipe", "hyperblock-int8"])
    assert list(scores) == ["before", "float", "hyperblock-int8"]
    assert max(scores["float"], scores["hyperblock-int8"]) < scores["before"]
    printed = capsys.readouterr().out
    assert "26 quantizers in evaluation mode; 0 operands in float" in printed
    assert f"hyperblock-int8  {scores['hyperblock-int8']:.3f}" in printed


@pytest.mark.parametrize("recipe", ["lsq-w4a4", pytest.param("in-hindsight-w8a8g8", marks=pytest.mark.full)])
def test_a_resumed_run_is_the_whole_run(text, recipe, tmp_path):
    """Stochastic rounding, kept ranges, and learned ranges with their optimizer group: all are in the checkpoint."""
    tokens = text.sources()[0]

    def run(*lengths):
        torch.manual_seed(0)
        base, losses = text.make_model(), []
        path = tmp_path / f"{len(lengths)}.pt"
        for length in lengths:
            model = qcompiler.compile(text.make_model(), recipe, backend="eager")
            model.load_state_dict(base.state_dict())
            losses += text.train(model, tokens, length, 1e-3, path)
        return losses, model.state_dict()

    (whole, state), (parts, resumed) = run(3), run(2, 3)
    assert parts == whole
    assert state.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in state.items())


@pytest.mark.full
def test_formats_are_compared(formats, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "formats.png"
    runs = formats.main(
        ["--recipes", "hyperblock-int8", "lsq-w4a4", "--epochs", "1", "--width", "2", "--plot", str(path)]
    )
    assert [run.name for run in runs] == ["float", "hyperblock-int8", "lsq-w4a4"]
    assert [run.quantizers for run in runs] == [0, 20, 13]
    assert runs[1].saved < runs[0].saved
    assert {len(run.losses) for run in runs} == {22}
    assert path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"{run.name}  {run.accuracies[-1]:7.1f}" in printed for run in runs)


def test_without_matplotlib_there_is_no_plot(formats, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    assert not formats.plot([formats.Run("float", [1.0], [50.0])], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_learned_ranges_move(formats):
    """The optimizer of ranges is made after the first forward, once there is something to move."""
    images, labels, *_ = formats.load_digits()
    model = qcompiler.compile(formats.ResNet(blocks=1, width=2, channels=1, stages=2), "lsq-w4a4", backend="eager")
    formats.train("lsq-w4a4", model, (images[:128], labels[:128], images[:8], labels[:8]), 1)
    first = {site: state.clone() for site, state in model.ranges().items()}
    formats.train("lsq-w4a4", model, (images[:128], labels[:128], images[:8], labels[:8]), 1)
    assert any(not torch.equal(first[site], state) for site, state in model.ranges().items())
