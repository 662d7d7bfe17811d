"""The rooms of the house: which folder may import which, and that no two folders need each other."""

import ast
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
#: the flat files of qcompiler/: what a user gets, and what everybody may use
SHARED = {"collector", "errors", "files", "tables"}
FRONT = {"module", "session", "following", "calling_twin"}
CORE = {"runtime", "passes", "recipes", "compiler", *SHARED}
CLIENTS = {"exporting", "drawing", "debugging", "searching", "demo"}
#: room → the rooms that it may import; folders inside of runtime/ and passes/ are below
ARROWS = {
    "runtime": set(),
    "passes": {"runtime"},
    "errors": {"runtime"},
    "files": {"runtime"},
    "collector": set(),
    "tables": set(),
    "recipes": {"runtime", "passes", *SHARED},
    "compiler": CORE - {"compiler"},
    **{name: CORE | FRONT - {name} for name in FRONT},
    **dict.fromkeys(CLIENTS, CORE | FRONT),
    "drawing": CORE | FRONT | {"debugging", "exporting"},
    "searching": CORE | FRONT | {"debugging"},
    "cli": CORE | FRONT | CLIENTS,
    "__main__": {"cli"},
}
INSIDE = {
    "passes.base": set(),
    "passes.rules": set(),
    "passes.ir": {"passes.rules", "passes.base"},
    "passes.joint": {"passes.ir", "passes.rules", "passes.base"},
    "passes.halves": {"passes.joint", "passes.ir", "passes.base", "passes.rules"},
    "passes.frozen": {"passes.ir", "passes.base"},
    "runtime.errors": set(),
    "runtime.numbers": {"runtime.errors"},
    "runtime.ranges": {"runtime.numbers", "runtime.errors"},
    "runtime.spec": {"runtime.numbers", "runtime.ranges", "runtime.errors"},
    "runtime.scales": {"runtime.numbers", "runtime.spec"},
    "runtime.shapes": {"runtime.numbers", "runtime.spec"},
    "runtime.references": {"runtime.numbers", "runtime.ranges", "runtime.spec", "runtime.scales"},
    "runtime.recompute": set(),
    "runtime.stacked": {"runtime.numbers", "runtime.ranges", "runtime.spec", "runtime.scales"},
    "runtime.kernels": {"runtime.numbers", "runtime.ranges", "runtime.spec", "runtime.scales"},
    "runtime.coders": {
        "runtime.numbers",
        "runtime.spec",
        "runtime.references",
        "runtime.shapes",
        "runtime.stacked",
        "runtime.kernels",
    },
    "runtime.products": {"runtime.numbers", "runtime.spec", "runtime.scales", "runtime.kernels"},
    "runtime.patches": {"runtime.products"},
    "runtime.convolutions": {
        "runtime.products",
        "runtime.patches",
        "runtime.kernels",
        "runtime.numbers",
        "runtime.scales",
    },
    "runtime.ops": {
        "runtime.numbers",
        "runtime.references",
        "runtime.recompute",
        "runtime.coders",
        "runtime.shapes",
        "runtime.stacked",
        "runtime.products",
        "runtime.patches",
        "runtime.convolutions",
        "runtime.kernels",
    },
    "runtime.quantized": {"runtime.numbers", "runtime.spec", "runtime.references"},
    "runtime.figures": {"runtime.numbers", "runtime.spec", "runtime.scales", "runtime.quantized"},
    "runtime.execute": {"runtime.numbers", "runtime.ranges", "runtime.spec", "runtime.ops"},
}


def room_of(module: str, depth: int) -> str:
    """`qcompiler.passes.ir.meta` → `passes` or, two deep, `passes.ir`; the package itself has no room."""
    parts = module.split(".")[1:]
    return ".".join(parts[:depth]) if parts[:1] and parts[0] in ("passes", "runtime") else parts[0] if parts else ""


def imports_of(path: Path) -> set[str]:
    """Every module of ours that a file imports, at the top, inside of functions, or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "qcompiler":
            whole = node.module in ("qcompiler", "qcompiler.passes", "qcompiler.runtime")
            found |= {f"{node.module}.{alias.name}" if whole else node.module for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("qcompiler.")}
    return found


def find_arrows(depth: int) -> set[tuple[str, str]]:
    """(room, imported room) of all sources; `__init__` of the package hands everything out, and is no room."""
    arrows = set()
    for top in ("runtime", "passes", "qcompiler"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if name.startswith(("qcompiler.passes", "qcompiler.runtime")) or name == "qcompiler":
                continue  # links to the folders beside
            own = room_of(name if top == "qcompiler" else f"qcompiler.{name}", depth)
            arrows |= {(own, room_of(module, depth)) for module in imports_of(path)}
    return {(one, other) for one, other in arrows if one != other and other not in ("", "__version__")}


@pytest.mark.parametrize(("allowed", "depth"), [(ARROWS, 1), (INSIDE, 2)], ids=["rooms", "inside"])
def test_arrows_point_one_way(allowed, depth):
    arrows = {(one, other) for one, other in find_arrows(depth) if one in allowed and other in allowed}
    down = {(one, other) for one, other in arrows if one.startswith("passes.") and other.startswith("runtime.")}
    assert {(one, other) for one, other in arrows - down if other not in allowed[one]} == set()
    assert len(arrows) > 10
    assert networkx.is_directed_acyclic_graph(networkx.DiGraph(arrows))


def test_every_folder_is_a_room():
    folders = {
        path.name for path in (ROOT / "qcompiler").iterdir() if path.is_dir() and (path / "__init__.py").exists()
    }
    assert folders - {"passes", "runtime"} <= ARROWS.keys()
    found = {room for pair in find_arrows(2) for room in pair if room.startswith(("passes.", "runtime."))}
    assert found <= INSIDE.keys()


def test_the_check_can_fail(tmp_path):
    source = tmp_path / "x.py"
    source.write_text(
        "from qcompiler.drawing.dot import write_dot\nfrom qcompiler import tables\nimport qcompiler.cli.main"
    )
    assert imports_of(source) == {"qcompiler.drawing.dot", "qcompiler.tables", "qcompiler.cli.main"}
    assert room_of("qcompiler.passes.ir.meta", 1) == "passes"
    assert room_of("qcompiler.passes.ir.meta", 2) == "passes.ir"
    assert "drawing" not in ARROWS["compiler"]
