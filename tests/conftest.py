"""Options of the test run, and what the end-to-end tests share."""

import copy
import functools
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch._C import DispatchKey
from torch._dynamo import guards
from torch._export import utils as export_utils
from torch._ops import OperatorBase
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import ONNXRegistry

import qcompiler
from qcompiler import collector
from qcompiler.compiler.cache import cache_compat
from qcompiler.runtime.kernels import convolutions, cpu, repeat, runs, whole

#: rooms whose cases take seconds each → how many cases of a test run by default; `sample` says otherwise
_SAMPLES = {"exporting": 1, "compiler": 2, "drawing": 1, "debugging": 2, "compatibility": 2, "recipes": 6}
#: seconds between two collections of garbage
_BETWEEN_COLLECTIONS = 120.0
#: when garbage was collected last
_COLLECTED = [time.monotonic()]
_HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --update-golden` writes the golden files anew, to be reviewed as a diff; `--full` leaves nothing out."""
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")
    parser.addoption("--full", action="store_true", help="run the tests marked full too, which take minutes each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `full`, and cases beyond a sample, are skipped, with the reason, unless --full is given."""
    if config.getoption("--full"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        if "full" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: make test-full"))
    for group in cases.values():
        marker, room = group[0].get_closest_marker("sample"), group[0].path.relative_to(_HERE).parts[0]
        wanted = _SAMPLES.get(room, len(group)) if marker is None else marker.args[0]
        chosen = spread_out(len(group), wanted)
        for place in sorted({*range(len(group))} - {*chosen}):
            group[place].add_marker(pytest.mark.skip(reason="one of many alike: make test-full"))


def spread_out(count: int, wanted: int) -> list[int]:
    """The places of so many cases out of `count`, from the first to the last, with equal distances."""
    if wanted >= count or wanted < 2:
        return [*range(min(count, wanted))]
    return [round(step * (count - 1) / (wanted - 1)) for step in range(wanted)]


def _load(name: str) -> ModuleType:
    """A module beside this file; under `--import-mode=importlib` no test can import it."""
    spec = importlib.util.spec_from_file_location(f"qcompiler_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


_MODELS = _load("models")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: a second thread only waits, and the order of sums would depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def rare_collections() -> Iterator[None]:
    """Captured graphs are many small objects: of 60 s of exports the collector took 10 to find next to nothing.

    What was imported stays out of its walks, so that a test that asks for a collection waits 0.1 s and not 2.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:  # asks whether objects are frozen, which takes 70 ms here
        patch.setattr(collector, "_pass_over", lambda: None)
        yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture(scope="module", autouse=True)
def graphs_of_a_file() -> Iterator[None]:
    """The graphs of some files of tests are gone before the next: they would fill the memory, and slow collections."""
    yield
    torch._dynamo.reset()
    if time.monotonic() > _COLLECTED[0] + _BETWEEN_COLLECTIONS:
        gc.collect()
        _COLLECTED[0] = time.monotonic()


@pytest.fixture(scope="session", autouse=True)
def quick_torch() -> Iterator[None]:
    """What torch does anew for every graph, and no test looks at: together a third of the time.

    Its exporter reads the tables of all operators, and registers 11,000 kernels with type hints that are made anew;
    Dynamo flushes the cache of the processor to time the guards, and collects garbage.
    """
    read_tables = functools.cache(ONNXRegistry.from_torchlib)

    def copy_tables(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
        made = copy.copy(read_tables(opset_version))
        made.functions = {target: [*found] for target, found in made.functions.items()}
        return made

    def register_kernel(operator: OperatorBase, key: Any) -> Callable[[Any], Any]:
        if not isinstance(key, DispatchKey) or key == DispatchKey.Python or key in operator.py_kernels:
            return py_impl(operator, key)

        def register(kernel: Any) -> Any:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
            return kernel

        return register

    py_impl = OperatorBase.py_impl
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(run_gc_after_compile=False):
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copy_tables))
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", functools.cache(export_utils._materialize_cpp_cia_ops))
        patch.setattr(guards, "profile_guard_manager", lambda *_: 0.0)
        patch.setattr(OperatorBase, "py_impl", register_kernel)
        yield


@pytest.fixture(autouse=True)
def nothing_repeated() -> None:
    """Every test records anew what its operators repeat: many put other functions in place of those in Python."""
    repeat.forget()


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> Iterator[None]:
    """Every test captures anew, but for those that ask for `kept`: many change what a capture does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_compat, "find_cache", lambda: None)
        yield


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which captured graphs are kept, empty at first."""
    folder = tmp_path / "kept graphs"
    monkeypatch.setattr(cache_compat, "find_cache", lambda: folder)
    return folder


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """tests/models.py."""
    return _MODELS


@pytest.fixture(scope="session")
def workers() -> ModuleType:
    """tests/workers.py."""
    return _load("workers")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window, in a new profile; skips the test where there is none."""
    browsing = _load("browsing")
    if not browsing.DRIVER or not browsing.BROWSER:
        pytest.skip("no browser: chromium and chromedriver are packages of the system")
    driver = browsing.start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def show_page(browser: Any) -> Callable[[Path], None]:
    """show_page(path): opens a page of draw(), and waits until its picture is there."""
    return functools.partial(sys.modules["qcompiler_tests_browsing"].show_page, browser)


@pytest.fixture
def fast_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor for which torch has an integer kernel."""
    monkeypatch.setattr(cpu, "is_fast", lambda: True)


@pytest.fixture
def wide_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX-512 VNNI, as far as products are compared with the fewest that pay."""
    for module in (convolutions, runs, whole):
        monkeypatch.setattr(module, "has_wide_vectors", lambda: True)


@pytest.fixture(params=_MODELS.CASES)
def case(request: pytest.FixtureRequest) -> Any:
    """Every case of tests/models.py, one after the other."""
    return _MODELS.CASES[request.param]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Seed 0, and nothing that Dynamo has captured before or keeps afterwards."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def eager() -> Callable[..., qcompiler.QuantizedModule]:
    """eager(model, recipe="identity", strict=False) → the model compiled to run node by node, which starts fast."""

    def make(model: nn.Module, recipe: str | qcompiler.Recipe = "identity", *, strict: bool = False) -> Any:
        return qcompiler.compile(model, recipe, backend="eager", strict=strict)

    return make


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """golden(before=text, after=text) compares with golden/<test name>.txt; `--update-golden` writes that file.

    The folder `golden` is the nearest one beside the test or above it.
    """
    folder = next(one / "golden" for one in request.path.parents if (one / "golden").is_dir())

    def compare(**texts: str) -> None:
        path = folder / f"{request.node.name}.txt"
        text = "\n".join(f"[{heading}]\n{body}" for heading, body in texts.items())
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing; run pytest --update-golden and review it"
        assert text == path.read_text()

    return compare
