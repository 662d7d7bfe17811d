"""The command line: what each command prints, its exit code, and wrong arguments."""

import json
import subprocess
import sys
import time

import pytest
from command_line import run, run_process

import qcompiler


def test_help_names_every_command_and_waits_for_nothing(folder):
    from qcompiler.cli.main import main

    code, text, errors = run_process(folder, "--help")
    assert (code, errors) == (0, "")
    assert all(f"  {name} " in text for name in main.commands)
    assert "Examples:" in text
    source = "import sys, qcompiler.cli.main; assert not {'torch', 'networkx', 'rich', 'yaml'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", source], check=True)


@pytest.mark.full
def test_help_is_quick(folder):
    start = time.monotonic()
    run_process(folder, "--help")
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize(
    "command", ["recipes", "show", "draw", "explain", "export", "verify", "demo", "debug", "search"]
)
def test_every_command_explains_itself(command):
    from click.testing import CliRunner

    from qcompiler.cli.main import main

    made = CliRunner().invoke(main, [command, "--help"])
    assert made.exit_code == 0
    assert "--json" in made.output
    assert command in ("recipes", "demo") or "module:callable" in made.output
    assert command not in ("demo", "debug", "search") or f"qcompiler {command} " in made.output


def test_recipes(folder):
    code, text, _ = run(folder, "recipes", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(text)] == list(qcompiler.RECIPES)
    code, text, _ = run(folder, "recipes", "hyperblock-int4")
    assert qcompiler.Recipe.from_yaml(text) == qcompiler.RECIPES["hyperblock-int4"]
    code, text, errors = run(folder, "recipes", "hyperblok-int4")
    assert (code, text) == (2, "")
    assert "did you mean 'hyperblock-int4'" in " ".join(errors.split())


def test_draw(folder):
    code, text, errors = run(folder, "draw", "mynet.py:make", "graph.html", "--recipe", "hyperblock-int4", "--json")
    assert (code, errors) == (0, "")
    made = json.loads(text)
    assert made == {"path": "graph.html", "bytes": (folder / "graph.html").stat().st_size}
    code, _, errors = run(folder, "draw", "mynet.py:make", "graph.png")
    assert code == 2
    assert "valid: a path that ends in .html, .svg, .dot, .graphml, .json" in " ".join(errors.split())
    assert not (folder / "graph.png").exists()


def test_explain(folder):
    code, text, errors = run_process(folder, "explain", "mynet.py:make", "--json")
    assert (code, errors) == (0, "")
    totals = json.loads(text)["totals"]
    assert (totals["placed"], totals["quantizers"]) == (10, 6)
    code, text, _ = run(folder, "explain", "mynet.py:make", "--eval", "--markdown", NO_COLOR="1")
    assert code == 0
    assert "| placed | 4 |" in text
    assert "\x1b[" not in text


def test_debug(folder):
    """The planted fault ranks first; the written recipe mends it; the picture has the same figures."""
    given = ("mynet.py:make", "--recipe", "bad.yaml", "--data", "mynet.py:batches", "--steps", "2")
    code, text, errors = run(folder, "debug", *given, "--json", "--out", "mended.yaml", "--draw", "harm.json")
    assert (code, errors) == (0, "")
    found = json.loads(text)
    assert (found["sites"][0]["name"], found["steps"], len(found["losses"])) == ("2/grad", 2, 2)
    assert found["proposal"]["site"] == "2/grad"
    assert found["proposal"]["harm"] == found["sites"][0]["harm"]
    assert found["notes"] == ["mended.yaml is written"]
    mended = qcompiler.Recipe.from_file(folder / "mended.yaml")
    assert mended.rules[1:] == qcompiler.Recipe.from_file(folder / "bad.yaml").rules
    drawn = json.loads((folder / "harm.json").read_text())
    harms = {s["details"]["name"]: s["figures"]["harm"] for s in drawn["shapes"] if s["figures"]}
    assert harms == {site["name"]: site["harm"] for site in found["sites"]}
    code, text, errors = run(folder, "debug", "mynet.py:make", "--recipe", "mended.yaml", NO_COLOR="1")
    assert (code, errors) == (0, "")
    assert "nothing stands out" in text
    assert "note: no --data: the example inputs" in text
    assert "\x1b[" not in text


def test_search(folder):
    """Finds a recipe within the budget, which compiles; the second run measures nothing and finds the same."""
    given = ("search", "mynet.py:Net", "--data", "mynet.py:batches", "--budget", "5", "--batches", "2")
    choices = ("--format", "int4", "--format", "int8", "--file", "state.json")
    code, text, errors = run(folder, *given, "found.yaml", *choices)
    assert code == 0, errors
    assert "Frontier" in text
    assert "chosen" in text
    assert "\x1b[" not in text
    state, found = (folder / "state.json").read_text(), qcompiler.Recipe.from_file(folder / "found.yaml")
    batches = json.loads(state)["found"]
    assert [len(sites) for sites in batches.values()] == [6, 6]
    # an interrupted search: one measurement is gone, and only this one is made again
    kept = json.loads(state)
    last = list(kept["found"])[-1]
    lost = kept["found"][last].popitem()[0]
    marked = kept["found"][last]["0/input"][1]
    marked[""] = marked[""] * 2
    (folder / "state.json").write_text(json.dumps(kept))
    code, text, errors = run(folder, *given, "again.yaml", *choices, "--json")
    assert (code, errors) == (0, "")
    again = json.loads((folder / "state.json").read_text())["found"]
    assert again[last][lost] == batches[last][lost]
    assert again[last]["0/input"][1] == marked
    assert json.loads(text)["path"] == "again.yaml"
    assert qcompiler.Recipe.from_yaml(json.loads(text)["yaml"]) == qcompiler.Recipe.from_file(folder / "again.yaml")
    assert {str(rule.spec.format) for rule in found.rules[:-3] if rule.spec} <= {"int4", "int8"}
