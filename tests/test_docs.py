"""The documentation: its Python blocks run, its recipes load, its links lead somewhere, its tables are complete."""

import linecache
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.cli.main import main
from qcompiler.compiler.capture import capture
from qcompiler.compiler.pipelines import (
    frozen_pipeline,
    halves_pipeline,
    joint_pipeline,
    kernel_pipeline,
    start_pipeline,
)
from qcompiler.compiler.stages import stage_text
from qcompiler.demo.nets import ResNet
from qcompiler.passes.rules import ADDITION, OPERATORS, Behind, Position, Product, Role, Sign
from qcompiler.runtime.numbers.blocks import AXES
from qcompiler.runtime.numbers.formats import BITS, FloatFormat, Kind, parse_format
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.ranges.estimators import ESTIMATORS, parse_range
from qcompiler.runtime.ranges.present import Current
from qcompiler.runtime.spec import Scale, Vjp

pytestmark = pytest.mark.usefixtures("fresh")

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "passes", "qcompiler", "runtime", "tests")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
}
#: [text](target), in prose and tables
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line number of its first line, source) of every fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def prose(text: str) -> str:
    """The page without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What `#…` can point at: headings in lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def page_module() -> Iterator[ModuleType]:
    """The module that the blocks of one page are written into; dataclasses look theirs up."""
    module = ModuleType("qcompiler_tests_page")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_the_pages_are_found():
    expected = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/numbers.md", "docs/glossary.md"}
    assert expected | {*PROGRAMS} <= PAGES.keys()


def test_the_index_lists_every_page():
    """Each page of docs/ once, with a sentence; the README leads to the index."""
    listed = re.findall(r"^\| \[[^\]]+\]\((\S+)\) \| .+\. \|$", PAGES["docs/index.md"], re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md")
    assert "(docs/index.md)" in PAGES["README.md"]


def test_the_readme_is_a_door():
    assert PAGES["README.md"].count("\n") <= 140
    assert len(PAGES["README.md"].split()) <= 1300


def test_references_are_complete():
    """Every public name and every command has its line."""
    assert {name for name in qcompiler.__all__ if f"`{name}" not in PAGES["docs/api.md"]} == set()
    assert {name for name in main.commands if f"| `{name}` |" not in PAGES["docs/cli.md"]} == set()


#: its blocks run after its diffs
CONTRIBUTING = "CONTRIBUTING.md"
#: pages whose blocks are one program, in order; on all other pages every block can be pasted alone
PROGRAMS = ("docs/numbers.md", "docs/writing_a_pass.md")


def write_recipes(page, folder):
    """The YAML blocks of a page as files, under the names in their first lines."""
    for _, recipe in blocks(PAGES[page], "yaml"):
        (folder / re.match(r"# (\S+\.yaml)\n", recipe)[1]).write_text(recipe, encoding="utf-8")


def run_block(page, line, block, namespace):
    """A block, with the line numbers of its page."""
    source = str(ROOT / page)
    linecache.checkcache(source)
    exec(compile("\n" * (line - 1) + block, source, "exec"), namespace)


@pytest.mark.parametrize(
    ("page", "line", "block"),
    [
        pytest.param(page, line, block, id=f"{page}:{line}")
        for page, text in PAGES.items()
        if page not in (*PROGRAMS, CONTRIBUTING)
        for line, block in blocks(text, "python")
    ],
)
@pytest.mark.sample(12)
def test_blocks_can_be_pasted_alone(page, line, block, page_module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipes(page, tmp_path)
    run_block(page, line, block, vars(page_module))


@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_run(page, page_module, tmp_path, monkeypatch):
    """All blocks in one namespace, in order; then the tests that they define. The folder is empty."""
    monkeypatch.chdir(tmp_path)
    for line, block in blocks(PAGES[page], "python"):
        run_block(page, line, block, vars(page_module))
    tests = [value for name, value in vars(page_module).items() if name.startswith("test_")]
    for test in tests:
        test()
    assert bool(tests) == (page == "docs/writing_a_pass.md")


def apply_diff(diff, root):
    """Applies a diff of one file, whose hunks have no line numbers; each has to fit in exactly one place."""
    path = root / re.match(r"--- a/(\S+)\n\+\+\+ b/\1\n@@\n", diff)[1]
    text = path.read_text(encoding="utf-8")
    for hunk in diff.split("\n@@\n")[1:]:
        lines = hunk.rstrip("\n").split("\n")
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != mark) for mark in "+-")
        assert text.count(old) == 1, (path.name, old)
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


#: tests that list formats, estimators and recipes, and the one that measures files: they hold in a patched copy too
LISTING_TESTS = (
    "tests/test_layering.py::test_no_file_is_long",
    "tests/runtime/numbers/test_formats.py",
    "tests/runtime/ranges/test_estimators.py",
    "tests/runtime/test_spec.py",
    "tests/recipes/test_recipes.py",
)


@pytest.fixture
def patched_copy(tmp_path):
    """The project with the diffs of CONTRIBUTING.md."""
    for folder in ("passes", "runtime", "qcompiler", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for _, diff in blocks(PAGES[CONTRIBUTING], "diff"):
        apply_diff(diff, tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", ["blocks", "tests"])
@pytest.mark.sample(1)
def test_the_diffs_of_contributing(patched_copy, what):
    """A format, an estimator and a recipe touch one file each; the page's claims hold in a copy, and its tests pass."""
    source = "".join(block for _, block in blocks(PAGES[CONTRIBUTING], "python"))
    tests = ["pytest", "-x", "-p", "no:cacheprovider", "-k", "not trains or median", *LISTING_TESTS]
    command = [sys.executable, *(["-c", source] if what == "blocks" else ["-m", *tests])]
    environment = os.environ | {"PYTHONPATH": str(patched_copy)}
    run = subprocess.run(command, cwd=patched_copy, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_graphs_of_how_it_works(page_module):
    """Every excerpt is part of the graph after the pass that it names: its lines in order, `…` for lines left out."""
    page = "docs/how_it_works.md"
    line, block = blocks(PAGES[page], "python")[0]
    run_block(page, line, block, vars(page_module))
    texts = {stage.name: stage_text([page_module.stages], stage.name).splitlines() for stage in page_module.stages}
    excerpts = [excerpt.splitlines() for _, excerpt in blocks(PAGES[page], "text")]
    assert len(excerpts) == 6
    for title, *lines in excerpts:
        graph, place = texts[title.removeprefix("# ")], 0
        for piece in "\n".join(lines).split("\n…\n"):
            wanted = piece.split("\n")
            place = graph.index(wanted[0], place)
            assert graph[place : place + len(wanted)] == wanted, title
            place += len(wanted)
    assert {stage.name for stage in page_module.stages} <= set(re.findall(r"`([a-z-]+)`", PAGES[page])) | {
        "captured",
        "lowered",
    }


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "yaml")])
def test_yaml_blocks_are_recipes(page):
    for _, recipe in blocks(PAGES[page], "yaml"):
        assert qcompiler.Recipe.from_yaml(recipe).rules


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Every relative link leads to a file or folder of the project, and to a heading where it names one."""
    broken = []
    for target in LINK.findall(prose(PAGES[page])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        inside = found.resolve().is_relative_to(ROOT.resolve())
        if not inside or not found.exists() or (anchor and anchor not in anchors(found.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def once(texts, empty="float"):
    """The texts that differ, in order, as one cell."""
    return " / ".join(dict.fromkeys(texts)) or empty


def operand(spec):
    """`int4` stochastic `large(0.001,0.001,0)`: the format, and the rounding and range where they are no default."""
    parts = [f"`{spec.format}`", "stochastic" if spec.rounding is Rounding.STOCHASTIC else ""]
    return " ".join(filter(None, [*parts, f"`{spec.range}`" if spec.range != Current() else ""]))


def cells(recipe):
    """Weights, activations, gradients, ends, scale, block of a row, from the rules."""
    specs = [rule.spec for rule in recipe.rules if rule.spec is not None]
    inner = [rule for rule in recipe.rules if rule.position is None and rule.spec is not None]
    ends = [rule for rule in recipe.rules if rule.position is not None]
    formats = once(f"`{rule.spec.format}`" if rule.spec is not None else "float" for rule in ends)
    only = next(iter({rule.position for rule in ends})) if len({rule.position for rule in ends}) == 1 else ""
    return [
        *(once(operand(rule.spec) for rule in inner if rule.role is role) for role in list(Role)[:3]),
        (f"{formats} ({only})" if only else formats) if ends else "as all",
        once((f"`{spec.scale}`" for spec in specs), "none"),
        once((f"`{spec.block}`" for spec in specs), "none"),
    ]


def rows(page):
    """Name → cells behind it, of every row of a recipe; rows of figures are shorter."""
    found = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", PAGES[page], re.MULTILINE)
    named = [(name, row.split(" | ")) for name, row in found if row.count(" | ") >= 6]
    assert len(dict(named)) == len(named)
    return dict(named)


def test_every_recipe_has_its_row():
    table = rows("docs/recipes.md")
    assert table.keys() == qcompiler.RECIPES.keys()
    for name, (paper, *found, _, difference) in table.items():
        recipe = qcompiler.RECIPES[name]
        assert found == cells(recipe), name
        years = set(re.findall(r"\b20\d\d\b", paper))
        assert years <= set(re.findall(r"\b20\d\d\b", recipe.source)), name
        assert bool(years) == bool(recipe.source), name
        assert difference.endswith("."), name


def test_the_guide_repeats_rows():
    """The main recipes, as in the full table, without paper and differences."""
    table, page = rows("docs/recipes.md"), rows("docs/using_recipes.md")
    assert {"identity", "hyperblock-int4", "in-hindsight-w8a8g8", "nvfp4"} <= page.keys()
    for name, row in page.items():
        assert row == table[name][1:-1]


def test_the_counts_of_recipes():
    """Quantizers of a convolution between two relus."""
    counts = {}

    def backend(module, inputs):
        for name, recipe in qcompiler.RECIPES.items():
            graph = capture(module, inputs).module
            joint_pipeline(recipe)(graph)
            counts[name] = sum(site.name.startswith("2/") for site in qcompiler.QuantPlan.of(graph).sites)
        return module

    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    torch.compile(nn.Sequential(*layers), backend=backend, dynamic=False)(torch.randn(2, 3, 8, 8))
    assert {name: int(row[-2]) for name, row in rows("docs/recipes.md").items()} == counts


def test_what_recipes_have_in_common():
    """The sentences of docs/recipes.md on `vjp` and overflow, for every recipe at once."""
    specs = [(name, rule.spec) for name, recipe in qcompiler.RECIPES.items() for rule in recipe.rules if rule.spec]
    kinds = {
        (str(spec.vjp), spec.range.is_learned) for name, spec in specs if name not in ("dorefa-w4a4g8", "ewgs-w4a4")
    }
    assert kinds == {("clip", True), ("pass", False)}
    assert {name for name, spec in specs if spec.vjp is Vjp.CLIP and not spec.range.is_learned} == {"dorefa-w4a4g8"}
    assert {str(spec.vjp) for name, spec in specs if name == "ewgs-w4a4"} == {"ewgs(1)"}
    assert all(spec.format.saturates for _, spec in specs if isinstance(spec.format, FloatFormat))
    table = set(re.findall(r"^\| `([\w-]+)` \| [^|]* \| `[\w-]+`, .* \|$", PAGES["docs/recipes.md"], re.MULTILINE))
    assert table == qcompiler.SCHEDULES.keys()


def test_every_choice_is_named():
    """A new member of an enumeration, or a new pass, has to be written down."""
    names = {*Kind, *Scale, *Rounding, *Vjp, *AXES}
    rows = re.findall(r"^\| `([a-z-]+)(?:\(\S+\))?` \| .* \| .* \| .* \|", PAGES["docs/numbers.md"], re.MULTILINE)
    assert {kind.name for kind in ESTIMATORS} <= set(rows)
    assert {name for name in names if f"`{name}`" not in PAGES["docs/numbers.md"]} == set()
    names = {*Kind, *Scale, *Rounding, *Vjp, *Role, *Position, *Product, *Sign, *Behind, *OPERATORS, ADDITION}
    assert {name for name in names if f"`{name}`" not in PAGES["docs/using_recipes.md"]} == set()
    joint, start = joint_pipeline(qcompiler.RECIPES["identity"]), start_pipeline(first=True)
    halves = halves_pipeline(), start, kernel_pipeline()
    names = {step.name for pipeline in (joint, *halves, frozen_pipeline()) for step in pipeline.passes}
    assert {name for name in names if f"[`{name}`]" not in PAGES["docs/writing_a_pass.md"]} == set()
    widths = f"{', '.join(map(str, BITS[:-1]))} or {BITS[-1]}"
    assert f"A uniform grid with b bits: {widths}." in PAGES["docs/numbers.md"]


def test_the_table_of_float_formats():
    """Bits, largest and smallest level of every row are those of the format it names."""
    rows = re.findall(r"^\| `(e\dm\w+)` \| (\d+) \| ([\d.]+) \| 2\^−(\d+) \|", PAGES["docs/numbers.md"], re.MULTILINE)
    assert len(rows) == 10
    for name, bits, largest, smallest in rows:
        form = parse_format(name)
        assert (form.bits, form.largest, form.smallest) == (int(bits), float(largest), 2.0 ** -int(smallest))


def test_the_defaults_of_ranges():
    """The numbers that docs/numbers.md gives are those of `Range` without any."""
    (text,) = re.findall(
        r"Numbers that are left out have their defaults: (.*?)\. The scale", PAGES["docs/numbers.md"], re.DOTALL
    )
    named = re.findall(r"`(\S+)`", text)
    assert named == [str(parse_range(name.split("(")[0])) for name in named]
    assert {name.split("(")[0] for name in named} == {kind.name for kind in ESTIMATORS if "(" in str(kind())}


def test_the_glossary_is_sorted():
    words = re.findall(r"^\| ([\w ]+) \|", PAGES["docs/glossary.md"], re.MULTILINE)[1:]
    assert words == sorted(set(words), key=str.lower)


def test_counts_of_the_readme():
    counts = []

    def backend(module, inputs):
        for recipe in ("channelwise-int4", "hyperblock-int4"):
            graph = capture(module, inputs).module
            joint_pipeline(qcompiler.RECIPES[recipe])(graph)
            plan = qcompiler.QuantPlan.of(graph)
            counts.extend([plan.placed, len(plan.sites), len(plan.kept)])
        return module

    torch.compile(ResNet(blocks=1, width=4), backend=backend, dynamic=False)(torch.randn(2, 3, 8, 8))
    assert counts == [58, 54, 0, 58, 28, 0]
    text = " ".join(PAGES["README.md"].split())
    assert "58 operands need 54 quantizers with `channelwise-int4`, and 28 with `hyperblock-int4`" in text


def test_the_words():
    """Conditions say if or when, and no phrase says `that of`; the words of the house, over README and docs."""
    text = "\n".join(prose(page) for name, page in PAGES.items() if name.startswith("docs/") or name == "README.md")
    words = re.findall(r"[a-z']+", re.sub(r"`[^`]*`", "", text.lower()))
    assert words.count("if") + words.count("when") > 5 * words.count("where")
    assert re.findall(r"\b(?:that|those) of\b|\bthe ones? of\b", text) == []


def test_the_checks_can_fail():
    text = "# A b, c\n```python\nx = 1\n```\n[t](none.md)\n"
    assert blocks(text, "python") == [(3, "x = 1\n")]
    assert anchors(text) == {"a-b-c"}
    assert LINK.findall(prose(text)) == ["none.md"]
