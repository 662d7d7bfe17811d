"""`deploy-int8` in onnxruntime: latency and size beside the float model and beside onnxruntime.quantization.

    python benchmarks/deploy.py [--width 64] [--size 64] [--batches 1 32] [--rounds 15] [--threads 1]

The network is as large as ResNet-18: four stages of two blocks, 64 channels in the first, 11 million parameters. It is
trained for a few steps, which is enough for ranges. All contenders take their turns in every round, so that they meet
the same machine; medians and their ratios are printed. The rival is the same float model, quantized statically by
onnxruntime with the same data: QDQ, uint8 activations, int8 weights by channel.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

import qcompiler
from qcompiler.exporting import run

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from qcompiler.demo.nets import ResNet


class Batches(CalibrationDataReader):
    """Calibration data for onnxruntime: a few batches."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.rest = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None at the end."""
        batch = next(self.rest, None)
        return None if batch is None else {"x": batch}


def files(folder: Path, width: int, size: int) -> dict[str, Path]:
    """The float file, the rival and the exports of a model after a few steps."""
    torch.manual_seed(0)
    model = ResNet(blocks=2, width=width, stages=4)
    qmodel = qcompiler.compile(model, "deploy-int8", backend="eager")
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=1e-3)
    batches = [torch.randn(8, 3, size, size) for _ in range(5)]
    for x in batches:
        qmodel(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: folder / f"{name}.onnx" for name in ("float", "onnxruntime.quantization", "deploy-int8", "int4")}
    report = qcompiler.export_onnx(qmodel, found["deploy-int8"], (batches[0],))
    print(report)
    print("convolutions", sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()), "sums 8")
    plain = qcompiler.compile(model, "identity", backend="eager")
    qcompiler.export_onnx(plain, found["float"], (batches[0],))
    narrow = qcompiler.compile(model, "channelwise-int4", backend="eager")
    qcompiler.export_onnx(narrow, found["int4"], (batches[0],))
    ready = folder / "ready.onnx"
    quant_pre_process(str(found["float"]), str(ready))
    quantize_static(
        str(ready),
        str(found["onnxruntime.quantization"]),
        Batches([x.numpy() for x in batches]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return found


def main() -> None:
    """Makes the files, times them in turn, prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        paths = files(Path(folder), given.width, given.size)
        sizes = Table("file", "bytes", "of float")
        for name, path in paths.items():
            size = path.stat().st_size
            sizes.add_row(name, f"{size:,}", f"{size / paths['float'].stat().st_size:.3f}")
        console.print(sizes)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = given.threads
        timed = {name: path for name, path in paths.items() if name != "int4"}
        sessions = {
            name: onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
            for name, path in timed.items()
        }
        times = Table("batch", "file", "ms", "of float", "of onnxruntime.quantization", "integer kernels")
        for batch in given.batches:
            x = torch.randn(batch, 3, given.size, given.size).numpy()
            seconds: dict[str, list[float]] = {name: [] for name in sessions}
            for turn in range(given.rounds + 2):
                for name, running in sessions.items():
                    start = time.perf_counter()
                    running.run(None, {running.get_inputs()[0].name: x})
                    if turn >= 2:  # the first two only warm up
                        seconds[name].append(time.perf_counter() - start)
            middle = {name: statistics.median(taken) for name, taken in seconds.items()}
            for name, taken in middle.items():
                others = [f"{taken / middle[other]:.2f}×" for other in ("float", "onnxruntime.quantization")]
                kinds = ", ".join(f"{count} {kind}" for kind, count in run.count_kernels(paths[name]).items())
                times.add_row(str(batch), name, f"{1000 * taken:.1f}", *others, kinds or "none")
        console.print(times)
    print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
