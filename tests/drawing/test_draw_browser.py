"""The page of draw() in a real browser, from disk: it opens, fetches nothing, and every part of it works.

`pytest tests/drawing/test_draw_browser.py --update-golden` writes the screenshots of docs/images/ anew.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from selenium.webdriver import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.support.ui import Select
from torch import nn

import qcompiler
from qcompiler.drawing.drawing import make_page, picture_of

IMAGES = Path(__file__).parents[2] / "docs" / "images"


class Attention(nn.Module):
    """Causal attention of GPT-2, with one projection for queries, keys and values."""

    def __init__(self, dim):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer of GPT-2."""

    def __init__(self, dim):
        super().__init__()
        self.ln1, self.attention, self.ln2 = nn.LayerNorm(dim), Attention(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT2(nn.Module):
    """Twelve layers."""

    def __init__(self, layers=12, dim=16):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(32, dim), nn.Embedding(8, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(dim), nn.Linear(dim, 32, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


def repeated(picture, count):
    """A picture `count` times, each in a module of its own: a large graph without the time to capture one."""
    shapes, lines, ranks = [], [], {f"box part{i}": i for i in range(count)}
    parents = {f"part{i}": "" for i in range(count)}
    for i in range(count):
        path = lambda module, i=i: f"part{i}.{module}" if module else f"part{i}"  # noqa: E731
        shapes += [dataclasses.replace(s, id=f"{i}:{s.id}", module=path(s.module)) for s in picture.shapes]
        lines += [dataclasses.replace(n, source=f"{i}:{n.source}", target=f"{i}:{n.target}") for n in picture.lines]
        ranks |= {f"box {path(box.removeprefix('box '))}": rank for box, rank in picture.ranks.items()}
        parents |= {path(inner): path(outer) for inner, outer in picture.parents.items()}
    return dataclasses.replace(picture, shapes=tuple(shapes), lines=tuple(lines), parents=parents, ranks=ranks)


@pytest.fixture(scope="module")
def pictures(models):
    """ResNet-20, a GPT-2 of 12 layers, and a graph of 5,000 nodes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    resnet = qcompiler.compile(models.resnet20(8), "hyperblock-int4", backend="eager")
    resnet(torch.randn(4, 3, 16, 16)).sum().backward()
    gpt = qcompiler.compile(GPT2(), "hyperblock-int8", backend="eager")
    gpt(torch.randint(0, 32, (2, 8))).sum().backward()
    small = picture_of(resnet)
    found = {"resnet20": small, "gpt2": picture_of(gpt), "large": repeated(small, -(-5000 // len(small.shapes)))}
    torch._dynamo.reset()
    return found, {"resnet20": resnet.plan(), "gpt2": gpt.plan()}


@pytest.fixture
def opened(browser, show_page, pictures, tmp_path):
    """opened(name) → the browser, showing the page of that picture."""

    def show(name):
        path = tmp_path / f"{name}.html"
        path.write_text(make_page(pictures[0][name]), encoding="utf-8")
        assert path.stat().st_size < 5 * 2**20
        browser.get_log("performance")
        browser.get_log("browser")
        show_page(path)
        return browser

    return show


def count(browser, selector):
    return browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def click(browser, identifier):
    """A real click on the first element of one node."""
    browser.execute_script("reveal(tree.byId.get(arguments[0]))", identifier)
    found = browser.execute_script(
        "return [...document.querySelectorAll('rect')].find(e => e.dataset.id === arguments[0])", identifier
    )
    found.click()


def press(browser, x, y):
    """A real click at a place of the window."""
    action = ActionBuilder(browser)
    action.pointer_action.move_to_location(round(x), round(y)).click()
    action.perform()


def slide(browser, stage):
    browser.execute_script(
        "const s = document.getElementById('stage'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", stage
    )


OVERLAPS = """
const seen = [...document.querySelectorAll('#scene text')].map(e => [e.getBoundingClientRect(), e.textContent])
  .filter(([r]) => r.bottom > 60 && r.top < innerHeight && r.right > 0 && r.left < innerWidth);
const bad = [];
for (let i = 0; i < seen.length; i++) for (let j = 0; j < i; j++) {
  const [a, b] = [seen[i][0], seen[j][0]];
  if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
    bad.push([seen[i][1], seen[j][1]]);
}
return [seen.length, bad]
"""


@pytest.mark.parametrize("name", [pytest.param("resnet20", marks=pytest.mark.full), "gpt2", "large"])
def test_it_opens_offline_and_labels_do_not_overlap(opened, name, request, tmp_path):
    browser = opened(name)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(asked) == 1  # the page itself
    assert asked[0].startswith("file://")
    assert browser.get_log("browser") == []
    labels, bad = browser.execute_script(OVERLAPS)
    assert labels > 20
    assert bad == []
    folder = IMAGES if request.config.getoption("--update-golden") and name != "large" else tmp_path
    folder.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(folder / f"{name}.png"))
    assert (folder / f"{name}.png").stat().st_size > 20_000


@pytest.mark.full
def test_the_first_picture_comes_soon(opened):
    """Seconds until the picture is there, on a machine that does nothing else."""
    picture = """
      const seen = performance.getEntriesByName('first-contentful-paint')[0].startTime;
      return Math.max(seen, performance.getEntriesByType('navigation')[0].domComplete) / 1000
    """
    opened("resnet20")  # the browser itself is slow the first time
    for name, most in (("resnet20", 3), ("gpt2", 5), ("large", 8)):
        assert 0 < opened(name).execute_script(picture) < most


def test_unfolding_shows_every_quantizer_and_all_saved_bytes(opened, pictures):
    for name in ("resnet20", "gpt2"):
        browser, plan = opened(name), pictures[1][name]
        browser.find_element("id", "unfold").click()
        assert count(browser, ".shape.quantizer") == len(plan.sites)
        shown = "return tree.shapes.values().filter(s => s.kind === 'saved' && isThere(s, state.stage))"
        assert browser.execute_script(f"{shown}.reduce((sum, s) => sum + s.bytes, 0)") == plan.saved_bytes
        browser.find_element("id", "fold").click()
        assert count(browser, ".module.open") == 0
        assert count(browser, ".shape.quantizer") == 0


def test_a_click_folds_a_module(opened):
    browser = opened("resnet20")
    browser.find_element("id", "fold").click()
    for expected in (True, False):
        box = "[...document.querySelectorAll('rect.module')].find(e => e.dataset.id === 'box 4')"
        place = browser.execute_script(f"return {box}.getBoundingClientRect()")
        press(browser, place["left"] + 60, place["top"] + 10)  # its title: below it an open box has its parts
        assert browser.execute_script("return state.open.has('4')") is expected
        assert (count(browser, ".module.open") > 0) is expected


def test_a_click_shows_details_and_every_consumer(opened, pictures):
    browser = opened("resnet20")
    site = next(site for site in pictures[1]["resnet20"].sites if site.name == "6.conv1/input")
    shapes = [s for s in pictures[0]["resnet20"].shapes if s.kind == "quantizer" and s.module == "6"]
    identifier = next(s.id for s in shapes if len(s.details["consumers"]) == len(site.consumers))
    click(browser, identifier)
    text = browser.find_element("id", "details").text
    for part in (str(site.spec), str(site.spec.block), str(list(site.shape)), *site.consumers):
        assert part in text
    assert "models.py" in text
    browser.find_element("id", "unfold").click()
    lit = browser.execute_script(
        "return [...document.querySelectorAll('path.line.on')].flatMap(p => p.lineItem.targets)"
        ".map(t => tree.shapes.get(t)).filter(s => s.kind === 'contraction').map(s => s.id)"
    )
    assert len(set(lit)) == len(site.consumers)


def test_search_reveals_what_it_finds(opened):
    browser = opened("gpt2")
    browser.find_element("id", "search").send_keys("blocks.7.mlp.2")
    assert browser.execute_script("return document.getElementById('found').textContent").startswith("1/")
    first = browser.execute_script("return state.chosen")
    browser.find_element("id", "search").send_keys("\n")
    assert browser.execute_script("return state.chosen") != first
    assert count(browser, "rect.chosen") == 1
    browser.find_element("id", "search").clear()
    browser.find_element("id", "search").send_keys("no such thing")
    assert browser.find_element("id", "found").text == "none"


def test_the_legend_filters(opened, pictures):
    browser = opened("resnet20")
    browser.find_element("id", "unfold").click()
    roles = [str(site.role) for site in pictures[1]["resnet20"].sites]
    for role in ("weight", "activation", "gradient"):
        assert count(browser, f".shape.quantizer.role-{role}") == roles.count(role) > 0
        browser.find_element("id", f"legend-{role}").click()
        assert count(browser, f".shape.quantizer.role-{role}") == 0
        browser.find_element("id", f"legend-{role}").click()
    assert count(browser, ".shape.quantizer") == len(roles)


def test_the_slider_goes_through_the_passes(opened, pictures):
    browser = opened("resnet20")
    picture, plan = pictures[0]["resnet20"], pictures[1]["resnet20"]
    browser.find_element("id", "unfold").click()
    counts = {}
    for index, (name, _) in enumerate(picture.stages):
        slide(browser, index)
        counts[name] = count(browser, ".shape.quantizer")
        assert name in browser.find_element("id", "stage-name").text
        assert count(browser, ".shape.new") > 0 or name not in ("place-quantizers", "save-quantized")
    assert counts["captured"] == 0
    biases = sum("bias gradient" in name for site in plan.sites for name in site.consumers)
    assert counts["place-quantizers"] == plan.placed + biases  # whose gradient is quantized too, but not multiplied
    assert counts["dedupe-quantizers"] == counts["lowered"] == len(plan.sites)
    assert browser.get_log("browser") == []


def test_colors_and_figures_of_the_debugger(browser, show_page, tmp_path):
    """Colors, legend and details are the numbers of the debugger."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    qmodel = qcompiler.compile(model, "tensor-int4", backend="eager")
    with qcompiler.debug(qmodel) as d:
        qmodel(torch.randn(16, 8)).square().mean().backward()
    show_page(qcompiler.draw(qmodel, tmp_path / "harm.html", debug=d))
    browser.find_element("id", "unfold").click()
    harms = {site: d.recording.harm(site) for site in d.recording.tallies}
    for heat in range(5):
        expected = sum(sum(harm >= edge for edge in (0.001, 0.01, 0.1, 0.5)) == heat for harm in harms.values())
        assert count(browser, f".shape.quantizer.heat-{heat}") == expected
        if expected:
            browser.find_element("id", f"legend-heat-{heat}").click()
            assert count(browser, f".shape.quantizer.heat-{heat}") == 0
            browser.find_element("id", f"legend-heat-{heat}").click()
    worst = d.recording.ranking()[0]
    found = "[...tree.shapes.values()].find(s => s.kind === 'quantizer' && s.details.name === arguments[0])"
    click(browser, browser.execute_script(f"return {found}.id", worst))
    text = browser.find_element("id", "details").text
    assert "debugger, 1 step" in text
    rows = dict(line.split(" ", 1) for line in text.partition("debugger, 1 step")[2].strip().splitlines())
    assert float(rows["harm"]) == pytest.approx(harms[worst], rel=1e-3)
    assert float(rows["sqnr"]) == pytest.approx(d.recording.tallies[worst].sqnr, rel=1e-3)
    Select(browser.find_element("id", "color")).select_by_visible_text("role")
    assert count(browser, ".shape.quantizer.role-weight") == 2
    assert browser.get_log("browser") == []
    torch._dynamo.reset()


def test_zoom_and_pan(opened):
    browser = opened("resnet20")
    where = "return document.getElementById('scene').getAttribute('transform')"
    before = browser.execute_script(where)
    canvas = browser.find_element("id", "canvas")
    ActionChains(browser).click_and_hold(canvas).move_by_offset(60, 40).release().perform()
    moved = browser.execute_script(where)
    assert moved != before
    ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, -200).perform()
    assert browser.execute_script(where) != moved
    browser.find_element("id", "fit").click()
    assert browser.execute_script(where) == before


def test_hostile_names_are_text(browser, show_page, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<script>", nn.Linear(4, 4))
            self.add_module("</script><img src=x onerror=alert(1)>", nn.Linear(4, 4))

        def forward(self, x):
            first, second = self.children()
            return second(first(x))

    torch._dynamo.reset()
    qmodel = qcompiler.compile(Model(), "hyperblock-int8", backend="eager")
    qmodel(torch.randn(2, 4)).sum().backward()
    browser.get_log("browser")
    show_page(qcompiler.draw(qmodel, tmp_path / "hostile.html"))
    assert browser.execute_script("return document.scripts.length") == 4
    assert count(browser, "img") == 0
    assert "<script>" in browser.execute_script("return document.getElementById('scene').textContent")
    assert browser.get_log("browser") == []
    torch._dynamo.reset()
