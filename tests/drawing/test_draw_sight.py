"""First sight of the page of draw(): themes, narrow windows, the keyboard, words on hover, nothing over another."""

import dataclasses
import re
from importlib import resources

import pytest
import torch
from selenium.webdriver import ActionChains, Keys
from torch import nn

import qcompiler
from qcompiler.drawing.drawing import make_page, make_svg
from qcompiler.drawing.picture import Picture, Shape


class Network(nn.Module):
    """A stem, blocks in a list, two heads in a dict."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.heads = nn.ModuleDict({"one": nn.Linear(8, 2), "two": nn.Linear(8, 2)})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.heads["one"](x) + self.heads["two"](x)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of a small network."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    qmodel = qcompiler.compile(Network(), "hyperblock-int4", backend="eager")
    qmodel(torch.randn(4, 4)).sum().backward()
    path = qcompiler.draw(qmodel, tmp_path_factory.mktemp("page") / "graph.html")
    torch._dynamo.reset()
    return path


#: until the page has heard of its new size and theme
FRAMES = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0)))"


@pytest.fixture
def window(browser):
    """window(width, theme): size of the window, theme of the system; both as they were after the test."""

    def resize(width, theme="light", height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.execute_async_script(FRAMES)
        return browser

    yield resize
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def color(browser, selector, name="background-color"):
    """The computed color of the first such element, as three numbers."""
    ask = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    return tuple(map(int, re.findall(r"\d+", browser.execute_script(ask, selector, name))[:3]))


def test_the_theme_is_that_of_the_system_until_the_button_is_pressed(window, drawn, show_page):
    browser = window(1000, "dark")
    show_page(drawn)
    parts = (("body", "background-color"), ("#canvas", "background-color"), (".module.closed", "fill"))
    assert all(max(color(browser, *part)) < 80 for part in parts)
    assert min(color(browser, ".scene text", "fill")) > 120
    window(1000, "light")  # while the page is open
    assert all(min(color(browser, *part)) > 200 for part in parts)
    button = browser.find_element("id", "theme")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert max(color(browser, "body")) < 80
    button.click()
    assert min(color(browser, "body")) > 200
    window(1000, "dark")  # the button has not left its mark
    assert max(color(browser, "body")) < 80
    assert button.get_attribute("aria-pressed") == "true"


SPAN = """
const spans = [...document.querySelectorAll('#scene rect')].map(e => e.getBoundingClientRect());
return [Math.min(...spans.map(r => r.left)), Math.max(...spans.map(r => r.right)),
        d3.zoomTransform(document.getElementById('canvas')).k, document.documentElement.scrollWidth]
"""


def test_a_narrow_window_shows_the_whole_width(window, drawn, show_page):
    """On loading, and when the window changes under an open page."""
    browser = window(1600)
    show_page(drawn)
    for width in (700, 1600, 420, 700):
        window(width)
        left, right, scale, page_width = browser.execute_script(SPAN)
        assert left >= 0
        assert right <= width
        assert page_width == width  # nothing else sticks out
        assert scale == 1 or right - left > 0.9 * width  # no smaller than it has to be
        assert width < 700 or scale >= 0.75  # letters of 8 pixels
    show_page(drawn)
    assert browser.execute_script(SPAN)[1] <= 700


def test_a_picture_that_was_moved_keeps_its_middle(window, drawn, show_page):
    browser = window(1600)
    show_page(drawn)
    browser.find_element("id", "unfold").click()
    middle = "return d3.zoomTransform(document.getElementById('canvas')).invertX(innerWidth / 2)"
    before, modules = browser.execute_script(middle), "return document.querySelectorAll('.module.open').length"
    count = browser.execute_script(modules)
    window(700)
    assert browser.execute_script(middle) == pytest.approx(before, abs=1)
    assert browser.execute_script(modules) == count > 0


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


FOCUS = "return document.activeElement.dataset.key || ''"


def tab_into_picture(browser):
    """Tab from the top of the page until a node has the focus."""
    for _ in range(30):
        press(browser, Keys.TAB)
        if browser.execute_script(FOCUS):
            return
    pytest.fail("Tab never came into the picture")


def test_the_keyboard_reaches_every_node(window, drawn, show_page):
    """Down in each lane, right to the next lane: every node is passed, in the order of reading."""
    browser = window(1000)
    show_page(drawn)
    tab_into_picture(browser)
    keys = "return [...document.querySelectorAll('#scene [data-key]')].map(e => e.dataset.key)"
    everything, passed = set(browser.execute_script(keys)), set()
    assert len(everything) > 20
    for lane in "012":
        while not browser.execute_script(FOCUS).endswith(lane):
            press(browser, Keys.ARROW_RIGHT)
        press(browser, *[Keys.ARROW_DOWN] * len(everything))
        steps = [browser.execute_script(FOCUS)]
        while True:
            press(browser, Keys.ARROW_UP)
            now = browser.execute_script(FOCUS)
            if now == steps[-1]:
                break
            steps.append(now)
        passed |= set(steps)
    assert passed == everything
    inside = (
        "const r = document.activeElement.getBoundingClientRect(); return r.top >= 0 && r.left >= 0 && r.right <= 1000"
    )
    assert browser.execute_script(inside)  # the picture has moved along


def test_enter_chooses_and_escape_clears(window, drawn, show_page):
    browser = window(1000)
    show_page(drawn)
    browser.find_element("id", "unfold").click()
    tab_into_picture(browser)
    for _ in range(60):
        if "quantizer" in browser.execute_script("return document.activeElement.getAttribute('class')"):
            break
        press(browser, Keys.ARROW_DOWN)
    chosen = browser.execute_script(FOCUS).rpartition("|")[0]
    label = browser.execute_script("return document.activeElement.getAttribute('aria-label')")
    press(browser, Keys.ENTER)
    details = browser.find_element("id", "details")
    assert browser.execute_script("return state.chosen") == chosen
    site = browser.execute_script("return tree.shapes.get(state.chosen).details.name")
    assert site in details.text
    assert site in label
    ring = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"  # the focus is to be seen
    press(browser, Keys.ESCAPE)
    assert browser.execute_script("return state.chosen") is None
    assert details.text == ""
    assert browser.execute_script(FOCUS).rpartition("|")[0] == chosen


def test_enter_folds_a_module_which_keeps_the_focus(window, drawn, show_page):
    browser = window(1000)
    show_page(drawn)
    tab_into_picture(browser)
    browser.execute_script("setStop('box blocks.1|0', true)")
    for is_open in ("false", "true"):
        opened = browser.execute_script("return document.activeElement.getAttribute('aria-expanded')")
        press(browser, Keys.ENTER)
        assert browser.execute_script(FOCUS) == "box blocks.1|0"
        assert browser.execute_script("return document.activeElement.getAttribute('aria-expanded')") != opened, is_open


def test_a_container_is_no_box(window, drawn, show_page):
    browser = window(1000)
    show_page(drawn)
    browser.find_element("id", "unfold").click()
    ids = browser.execute_script("return [...document.querySelectorAll('rect.module')].map(e => e.dataset.id)")
    assert {"box blocks.0", "box heads.one", "box stem"} <= set(ids)
    assert not {"box blocks", "box heads"} & set(ids)


def test_every_node_says_what_it_is(window, drawn, show_page):
    """On hover and to a screen reader; nothing on the page needs the source code to be understood."""
    browser = window(1000)
    show_page(drawn)
    browser.find_element("id", "fold").click()
    both = "[e.querySelector('title').textContent, e.getAttribute('aria-label')]"
    read = f"return [...document.querySelectorAll('#scene [data-key]')].map(e => {both})"
    words = browser.execute_script(read)
    assert all(title == label and len(title.split()) > 3 for title, label in words)
    assert any(title.startswith("random key: two numbers, drawn once a step") for title, _ in words)
    assert any(re.search(r"module \S+, [\d.]+ K?i?B, \d tensors? that forward keeps for backward", t) for t, _ in words)
    chips = "return [...document.querySelectorAll('#scene .label.saved')].map(e => e.textContent)"
    assert all(re.search(r" K?i?B(, \d+ tensors?)?$", text) for text in browser.execute_script(chips))
    entries = "return [...document.querySelectorAll('#legend label')].map(e => e.title)"
    assert all(browser.execute_script(entries))
    assert browser.get_log("browser") == []


def crowded(watched):
    """A module of more than 2,000 quantizers in four colors, some contractions in float; without a model."""
    shapes, roles = [], ("weight", "activation", "gradient", "output")
    for lane in (0, 2):
        for index, role in enumerate(roles):
            figures = {"harm": [0, 0.002, 0.02, 0.7][index]} if watched else {}
            for number in range(10**index):
                name = f"{lane} {role} {number}"
                details = {"name": name, "format": "int8", "block": "tensor"}
                shapes.append(
                    Shape(name, "quantizer", lane, "many", "int8", role, stages=1, details=details, figures=figures)
                )
        for number in range(12):
            shapes.append(Shape(f"{lane} c{number}", "contraction", lane, "many", "c", kept="said", stages=1))
    return Picture("crowded", (("lowered", 0),), tuple(shapes), (), {"many": ""}, {"box many": 0}, watched=int(watched))


COLLISIONS = """
const all = [...document.querySelectorAll('#scene circle, #scene text')]
  .map(e => [e.getBoundingClientRect(), e.textContent]);
const box = [...document.querySelectorAll('rect.module')].map(e => e.getBoundingClientRect());
const bad = [];
for (let i = 0; i < all.length; i++) for (let j = 0; j < i; j++) {
  const [a, b] = [all[i][0], all[j][0]];
  if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) bad.push([all[i][1], all[j][1]]);
}
const counts = [...document.querySelectorAll('#scene circle, #scene .count')].map(e => e.getBoundingClientRect());
const out = counts.filter(c => !box.some(b => b.left <= c.left && c.right <= b.right));
return [counts.length, bad, out.length]
"""


@pytest.mark.parametrize("watched", [False, True])
def test_counts_and_dots_do_not_collide(window, show_page, tmp_path, watched):
    browser = window(1600)
    path = tmp_path / "crowded.html"
    path.write_text(make_page(crowded(watched)), encoding="utf-8")
    show_page(path)
    browser.find_element("id", "fold").click()
    count, bad, out = browser.execute_script(COLLISIONS)
    assert count == 2 * (4 + 4 + 1)  # both lanes: dots, their counts, and the contractions in float
    assert bad == []
    assert out == 0


def theme():
    """Color → (light, dark), as sums of red, green and blue weighted for the eye (relative luminance of WCAG 2)."""
    text = resources.files("qcompiler.drawing").joinpath("viewer", "theme.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--([\w-]+): light-dark\(#(\w{6}), #(\w{6})\);", text)
    assert len(pairs) == text.count("--")
    return {name: tuple(map(luminance, both)) for name, *both in pairs}


def luminance(color):
    parts = (int(color[start : start + 2], 16) / 255 for start in (0, 2, 4))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


ROLES = ("weight", "activation", "gradient", "output")
LETTERS = [
    *(("ink", ground) for ground in ("paper", "closed", "shape", "operator", "state", "end")),
    *((text, ground) for text in ("faint", "name") for ground in ("paper", "closed", "shape")),
    *(("role-ink", role) for role in ROLES),
    *((f"heat-{heat}-ink", f"heat-{heat}") for heat in range(5)),
    *(("kept-ink", ground) for ground in ("kept", "kept-stripe")),
    *((f"{name}-name", name) for name in ("forward", "backward")),
    *(("kept-count", "closed"), ("saved-ink", "saved"), ("contraction-ink", "contraction"), ("middle-name", "paper")),
]
SIGNS = [
    *((f"{role}-line", ground) for role in ROLES for ground in ("paper", "forward", "backward", "box")),
    *((name, ground) for name in ("line", "crossing", "focus") for ground in ("paper", "forward", "backward", "box")),
    *((f"{name}-edge", "box") for name in (*ROLES, "shape", "state", "end", "kept")),
    *((f"heat-{heat}-edge", "box") for heat in range(5)),
    *((name, "box") for name in ("contraction", "new", "goes")),
    *((name, ground) for name in ("closed-edge",) for ground in ("forward", "backward")),
    ("saved-edge", "paper"),
]  # fmt: skip


@pytest.mark.parametrize(("pairs", "least"), [(LETTERS, 4.5), (SIGNS, 3.0)])
@pytest.mark.parametrize("dark", [False, True])
def test_contrast(pairs, least, dark):
    """4.5 between letters and their ground, 3 between signs and theirs: level AA of WCAG 2.2."""
    colors = theme()
    for front, ground in pairs:
        low, high = sorted((colors[front][dark], colors[ground][dark]))
        assert (high + 0.05) / (low + 0.05) >= least, (front, ground)


def test_an_svg_has_plain_colors():
    """Not every program that reads SVG knows variables and themes."""
    pytest.importorskip("py_mini_racer")
    text = make_svg(crowded(watched=False), budget=1)
    assert "var(" not in text
    assert "light-dark" not in text
    assert ".shape.role-weight, .dot.role-weight { fill: #" in text


def test_a_graph_without_backward_has_one_lane():
    pytest.importorskip("py_mini_racer")
    both = crowded(watched=False)
    forward = dataclasses.replace(both, shapes=tuple(shape for shape in both.shapes if shape.lane == 0))
    names = [
        re.findall(r"(forward ↓|saved for backward|backward ↑)</text>", make_svg(one, budget=1))
        for one in (both, forward)
    ]
    assert names == [["forward ↓", "saved for backward", "backward ↑"], ["forward ↓"]]
    wide = [float(re.search(r'width="(\d+)"', make_svg(one, budget=1))[1]) for one in (both, forward)]
    assert wide[1] < wide[0] / 2
