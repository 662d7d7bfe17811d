"""The architecture, held by parsing the source: imports point one way, and every public name is explained."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

import qcompiler

ROOT = Path(__file__).parents[1]
#: import name → folder
PACKAGES = {
    ".".join(["qcompiler", *parts] if parts[:1] != ["qcompiler"] else parts): "/".join(parts)
    for top in ("qcompiler", "passes", "runtime")
    for folder in sorted({path.parent for path in (ROOT / top).rglob("*.py")})
    if (parts := list(folder.relative_to(ROOT).parts))[1:2] not in (["passes"], ["runtime"])
}
SOURCES = {
    f"{folder}/{path.name}": path for folder in PACKAGES.values() for path in sorted((ROOT / folder).glob("*.py"))
}
TOP_MODULES = {"qcompiler"} | {
    f"{package}.{path.stem}"
    for package, folder in PACKAGES.items()
    if folder.startswith("qcompiler")
    for path in (ROOT / folder).glob("*.py")
}
#: private APIs of torch: those of Dynamo, those that the cache asks, and all others
COMPAT = (
    "qcompiler/compiler/torch_compat.py",
    "qcompiler/compiler/dynamo_compat.py",
    "qcompiler/compiler/cache/cache_compat.py",
)
#: outside of them: fake tensors and the mode that they belong to, modules that write their code when somebody asks, the
#: type of an operator, the mode that sees what an operator calls, and the loader of C++
ALLOWED_PRIVATE = {
    ("passes/ir/inference.py", "torch._subclasses.fake_tensor"),
    ("passes/ir/edit.py", "torch.fx._lazy_graph_module"),
    ("runtime/ops.py", "torch._ops"),
    ("runtime/kernels/recorder.py", "torch.utils._python_dispatch"),
    ("runtime/kernels/recorder.py", "torch.utils._python_dispatch.TorchDispatchMode"),
    ("runtime/kernels/loader.py", "torch._inductor.codecache"),
    ("runtime/kernels/loader.py", "torch._inductor.codecache.CppCodeCache"),
    ("runtime/kernels/loader.py", "torch._inductor.codecache.CppPythonBindingsCodeCache"),
}
LINES = 400


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that the source imports, at the top or inside of functions; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def private_torch(tree: ast.AST) -> Iterator[str]:
    """Private modules of torch, imported or reached as attributes: `torch._dynamo`, `torch._ops`."""
    for name in imported(tree):
        if name.startswith("torch.") and any(part.startswith("_") for part in name.split(".")[1:]):
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch" and node.attr.startswith("_"):
            yield f"torch.{node.attr}"


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public functions, classes and methods without a docstring; properties and nested classes included."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                setter = any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)
                if ast.get_docstring(node) is None and not setter:
                    yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, f"{prefix}{node.name}.")

    if ast.get_docstring(tree) is None:
        yield "(module)"
    yield from visit(tree.body, "")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_sources_are_found():
    assert {"qcompiler/module.py", "passes/ir/edit.py", "runtime/ops.py"} <= SOURCES.keys()


def list_imports(room):
    """Every import of a room, as (file, module)."""
    return {(name, i) for name, path in SOURCES.items() if name.startswith(room) for i in imported(parse(path))}


def test_runtime_imports_nothing_above_it():
    found = list_imports("runtime/")
    assert {(name, i) for name, i in found if i in TOP_MODULES or i.startswith("qcompiler.passes")} == set()


def test_passes_import_nothing_above_them():
    assert {(name, i) for name, i in list_imports("passes/") if i in TOP_MODULES} == set()


def test_imports_are_absolute_and_by_the_full_name():
    found = list_imports("")
    assert {(name, i) for name, i in found if i.partition(".")[0] in {"", "passes", "runtime"}} == set()


def test_private_torch_stands_in_two_files():
    found = {(name, used) for name, path in SOURCES.items() for used in private_torch(parse(path))}
    outside = {(name, used) for name, used in found if name not in COMPAT}
    modules = {
        (name, re.sub(r"(_\w+\.?\w*)\.(FakeTensor|FakeTensorMode|_LazyGraphModule)$", r"\1", used))
        for name, used in outside
    }
    assert modules == ALLOWED_PRIVATE
    assert outside != found


def test_public_names_have_docstrings():
    assert {(name, missing) for name, path in SOURCES.items() for missing in undocumented(parse(path))} == set()


def test_one_identity():
    """A bare `import passes` would make a second module with other enumerations and other caches."""
    assert {"qcompiler.passes", "qcompiler.runtime"} <= sys.modules.keys()
    assert {"passes", "runtime", "passes.graph", "runtime.ops"} & sys.modules.keys() == set()


def test_packages_of_the_wheel():
    """A package that is missing in the list is silently absent from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    finder = settings["packages"]["find"]
    assert sorted(find_packages(str(ROOT), include=finder["include"])) == sorted(PACKAGES)
    assert len(PACKAGES) > 8


def list_passes() -> list[str]:
    """Every file with a pass: a dataclass that has a name and can be called."""

    def is_pass(node: ast.stmt) -> bool:
        if not isinstance(node, ast.ClassDef) or not node.decorator_list:
            return False
        fields = {ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)}
        return "name" in fields and "__call__" in {getattr(part, "name", "") for part in node.body}

    return [name for name, path in SOURCES.items() if any(map(is_pass, parse(path).body))]


def test_every_pass_has_its_test():
    passes = [Path(name) for name in list_passes()]
    folders = {str(path.parent) for path in passes}
    assert folders == {"passes/joint", "passes/halves", "passes/frozen", "qcompiler/exporting/passes"}
    tests = [f"tests/{path.parent}/test_{path.name}".replace("tests/qcompiler/", "tests/") for path in passes]
    assert [name for name in tests if not (ROOT / name).exists()] == []


def test_meta_is_touched_in_one_file():
    """What is kept at a node is read and written in one place; everything else asks that place by name."""
    found = {name for name, path in SOURCES.items() if re.search(r"\.meta\b(?! import)", path.read_text("utf-8"))}
    assert found == {"passes/ir/meta.py"}


def test_public_names():
    """What is exported exists; of the rest of `__init__` nothing is public but the modules themselves."""
    names = {name for name in dir(qcompiler) if not name.startswith("_")}
    assert set(qcompiler.__all__) <= names
    assert all(getattr(qcompiler, name).__module__.startswith("qcompiler.") for name in names & {"compile", "draw"})
    assert {*itertools.chain(*qcompiler._EXPORTS.values())} == set(qcompiler.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = qcompiler.nothing
    modules = {name.split(".")[1] for name in TOP_MODULES | PACKAGES.keys() if "." in name}
    assert names - set(qcompiler.__all__) <= modules


def test_importing_the_package_is_cheap():
    """`qcompiler --help` imports it, and shall not wait for torch; `compile` stays the function in any order."""
    source = """
import sys, qcompiler
assert "torch" not in sys.modules
from qcompiler.errors import CompileError
assert qcompiler.compile.__name__ == "compile" and qcompiler.CompileError is CompileError
"""
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_no_file_is_long():
    files = [*SOURCES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    files += (ROOT / "benchmarks").glob("*.py")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lengths.items() if count > LINES} == {}


def test_the_checks_can_fail():
    """Each of the checks above on source that breaks its rule."""
    tree = ast.parse(
        "import passes.graph\nfrom qcompiler import lower\nfrom . import x\ndef f():\n    import torch._dynamo"
    )
    assert {"passes.graph", "qcompiler.lower", "."} <= {*imported(tree)}
    assert [*private_torch(tree)] == ["torch._dynamo"]
    assert [*private_torch(ast.parse("torch._C.x(torch.y)"))] == ["torch._C"]
    source = "class A:\n    'a'\n    def f(self): ...\n    def _g(self): ...\n    class B: ...\ndef h(): ...\n"
    assert [*undocumented(ast.parse(source))] == ["(module)", "A.f", "A.B", "h"]
