"""A model above the 2 GB of protobuf, through tensors that lie beside the file: written, checked, run, replaced.

    python benchmarks/onnx_large.py [--gigabytes 2.1] [--folder FOLDER]

Linear layers of 8192 channels, the first and the last in 8-bit hyperblocks, the others in float to make it large. Takes
about four times its size of memory, and twice its size of disk.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import qcompiler

RECIPE = """
name: ends
rules:
- {position: inner, keep: true, reason: to be large}
- {format: int8, block: b2c8o4i4}
"""


def main() -> None:
    """Prints what was written, how far the outputs differ, and the memory it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.1)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    inner = int(-(-given.gigabytes * 1e9 // (4 * given.width**2)))
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(given.width, given.width, bias=False) for _ in range(inner + 2)))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.01, 0.01)
    qmodel = qcompiler.compile(model, qcompiler.Recipe.from_yaml(RECIPE), backend="eager").eval()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "large.onnx"
        for turn in ("written", "replaced"):
            start = time.perf_counter()
            report = qcompiler.export_onnx(qmodel, path, (torch.randn(2, given.width),))
            files = {one.name: f"{one.stat().st_size:,}" for one in path.parent.iterdir()}
            print(f"{turn} in {time.perf_counter() - start:.0f} s: {files}")
            print(f"difference {report.difference:.1e}, quantizers {dict(report.exported)} of {report.trained}")
        print(f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")


if __name__ == "__main__":
    main()
