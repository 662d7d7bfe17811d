// The page around the picture: zoom, folding, search, legend, theme, and the slider through the passes.
"use strict";

const picture = JSON.parse(document.getElementById("picture").textContent);
const tree = buildTree(picture);
tree.count = picture.stages.length;
const SVG = "http://www.w3.org/2000/svg", by = id => document.getElementById(id);
const state = {stage: tree.count - 1, open: null, hidden: new Set(), chosen: null, color: picture.watched ? "harm" : "role",
               stop: null, moved: false};  // the node that Tab goes to; whether the user has folded or moved anything
const svg = d3.select("#canvas"), zoom = d3.zoom().scaleExtent([0.02, 4]);
let drawn;

svg.call(zoom.on("zoom", event => {
  by("scene").setAttribute("transform", event.transform);
  if (event.sourceEvent) state.moved = true;
})).on("dblclick.zoom", null);

function element(item) {
  const made = document.createElementNS(SVG, item.type);
  const set = (name, value) => made.setAttribute(name, value);
  set("class", item.cls);
  if (item.type === "rect") { set("x", item.x); set("y", item.y); set("width", item.w); set("height", item.h); set("rx", item.r); }
  if (item.type === "circle") { set("cx", item.x); set("cy", item.y); set("r", item.r); }
  if (item.type === "path") set("d", item.d);
  if (item.type === "text") {
    set("x", item.x); set("y", item.y);
    if (item.anchor) set("text-anchor", item.anchor);
    made.textContent = item.text;
  }
  if (item.id !== undefined) set("data-id", item.id);
  if (item.key) makeStop(made, item);
  else set("aria-hidden", "true");
  if (item.title) made.appendChild(document.createElementNS(SVG, "title")).textContent = item.title;
  return made;
}

function draw() {
  const hadFocus = by("scene").contains(document.activeElement);
  drawn = layout(tree, state);
  const parts = document.createDocumentFragment();
  for (const item of drawn.items) {
    const made = element(item);
    if (item.ends) made.lineItem = item;
    parts.appendChild(made);
  }
  by("scene").replaceChildren(parts);
  setStop(state.stop, hadFocus);
  const [name, changes] = picture.stages[state.stage];
  const now = countThere(state.stage), before = state.stage ? countThere(state.stage - 1, state.stage) : null;
  by("stage-name").textContent = `${state.stage + 1}/${tree.count} ${name}` + (changes ? `: ${plural(changes, "place")}` : "")
    + (before && before.added + before.removed ? `, +${before.added} −${before.removed}` : "") + `, ${plural(now.quantizers, "quantizer")}`;
  mark();
}

/** How many quantizers a stage has; with `next`, the nodes that come and go on the way there. */
function countThere(stage, next) {
  let quantizers = 0, added = 0, removed = 0;
  for (const shape of tree.shapes.values()) {
    const here = isThere(shape, stage), there = next !== undefined && isThere(shape, next);
    quantizers += here && shape.kind === "quantizer";
    added += !here && there;
    removed += here && !there && next !== undefined;
  }
  return {quantizers, added, removed};
}

const canvasSize = () => by("canvas").getBoundingClientRect();

function fit() {
  const size = canvasSize(), scale = Math.min(1, size.width / drawn.width);
  svg.call(zoom.transform, d3.zoomIdentity.translate((size.width - drawn.width * scale) / 2, 0).scale(scale));
}

const LEGIBLE = 0.75;  // of the size of the letters: 8 pixels high

/** The first picture: as many modules unfolded as can be read in a window of this width. */
function begin() {
  for (const budget of [60, 30, 15, 0]) {
    state.open = defaultOpen(tree, state.stage, budget);
    draw();
    if (drawn.width * LEGIBLE <= canvasSize().width) break;
  }
  fit();
}

let width = 0;
/** Another width of the window: the first picture again, or, once the user has moved it, the same middle. */
function refit() {
  const before = width;
  width = canvasSize().width;
  if (!state.moved) begin();
  else svg.call(zoom.translateBy, (width - before) / 2 / d3.zoomTransform(by("canvas")).k, 0);
}

/** Moves the picture as little as will show a place of it. */
function bring(place) {
  const now = d3.zoomTransform(by("canvas")), size = canvasSize(), edge = 12;
  const shift = (low, high, most) => high > most - edge ? Math.max(most - edge - high, edge - low) : low < edge ? edge - low : 0;
  const x = shift(now.applyX(place.x), now.applyX(place.x + place.w), size.width);
  const y = shift(now.applyY(place.y), now.applyY(place.y + Math.min(place.h, LINE)), size.height);
  if (x || y) { state.moved = true; svg.call(zoom.translateBy, x / now.k, y / now.k); }
}

function fold(box) {
  state.moved = true;
  state.open.has(box.path) ? state.open.delete(box.path) : state.open.add(box.path);
  const before = corner(box);
  draw();
  const after = corner(box), now = d3.zoomTransform(by("canvas"));
  if (before && after) svg.call(zoom.transform, now.translate(before.x - after.x, before.y - after.y));
}

const corner = box => drawn.places.get(box.id + "|0") || drawn.places.get(box.id + "|2");

function reveal(shape) {
  state.moved = true;
  for (let box = shape.parent; box; box = box.parent) state.open.add(box.path || "");
  draw();
  const p = drawn.places.get(shape.id + "|" + shape.lane), size = canvasSize();
  const middle = drawn.width < size.width ? drawn.width / 2 : p && p.x + p.w / 2;  // of the picture, where all of it fits
  if (p) svg.call(zoom.transform, d3.zoomIdentity.translate(size.width / 2 - middle, size.height / 2 - p.y).scale(1));
}

/** Marks what is chosen, and every line that touches it: the consumers of a quantizer, through what is saved. */
function mark() {
  const scene = by("scene"), id = state.chosen, on = new Set([id]);
  if (id) for (const line of tree.lines) if (line.source === id && line.to.kind === "saved") on.add(line.target);
  scene.classList.toggle("chosen", Boolean(id));
  for (const part of scene.children) {
    const item = part.lineItem;
    if (item) part.classList.toggle("on", item.ends.includes(id) || item.sources.some(s => on.has(s)) || item.targets.includes(id));
    else part.classList.toggle("chosen", part.tagName === "rect" && part.dataset.id === id && Boolean(id));
  }
}

/** A click or Enter: a module folds or unfolds, everything is chosen. */
function press(id) {
  const part = id && tree.byId.get(id);
  if (part && part.isBox) fold(part);
  choose(id || null);
}

by("canvas").addEventListener("click", event => press(event.target.dataset && event.target.dataset.id));

const paintOf = shape => paint(tree, shape, state.color);
const LEGEND = [...PAINTS.map(cls => [cls.replace("role-", ""), cls]), ["contraction", "contraction"], ["kept", "left in float"],
  ["operator", "operator"], ["saved", "saved"], ["ends", "inputs, outputs"]];

/** An entry for everything that is there in some stage, with a box that hides it; colors of figures: in this stage. */
function legend() {
  by("legend").replaceChildren();
  const shapes = [...tree.shapes.values()].filter(shape => state.color === "role" || isThere(shape, state.stage));
  const found = new Set(shapes.map(shape => legendClass(shape, paintOf)));
  for (const [key, name] of LEGEND) {
    if (!found.has(key)) continue;
    const entry = by("legend").appendChild(document.createElement("label")), isHeat = key.startsWith("heat-");
    entry.title = isHeat ? HEAT_ENTRY : ENTRIES[key];
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = !state.hidden.has(key);
    box.id = "legend-" + key;
    box.addEventListener("change", () => { box.checked ? state.hidden.delete(key) : state.hidden.add(key); draw(); });
    entry.append(box, Object.assign(document.createElement("i"), {className: key}), PAINTS.includes(name) ? paintName(tree, name, state.color) : name);
  }
}

by("color").parentElement.hidden = !picture.watched;
by("color").value = state.color;
by("color").addEventListener("change", event => {
  state.color = event.target.value;
  state.hidden.clear();
  legend();
  draw();
});

let hits = [], hit = -1;
function search(step) {
  const text = by("search").value.trim().toLowerCase();
  hits = text ? [...tree.shapes.values()].filter(s => isThere(s, state.stage) && haystack(s).includes(text)) : [];
  hit = hits.length ? (hit + step + hits.length) % hits.length : -1;
  by("found").textContent = text ? (hits.length ? `${hit + 1}/${hits.length}` : "none") : "";
  if (hits.length) { choose(hits[hit].id); reveal(hits[hit]); }
}
const haystack = s => [s.id, s.label, s.module, s.kind, s.role, s.kept, s.details.name, s.details.op].join(" ").toLowerCase();
by("search").addEventListener("input", () => { hit = -1; search(1); });
by("search").addEventListener("keydown", event => { if (event.key === "Enter") search(event.shiftKey ? -1 : 1); });

by("stage").max = tree.count - 1;
by("stage").value = state.stage;
by("stage").addEventListener("input", event => { state.stage = Number(event.target.value); legend(); draw(); });
by("fold").addEventListener("click", () => { state.moved = true; state.open = new Set([""]); draw(); fit(); });
by("unfold").addEventListener("click", () => { state.moved = true; state.open = new Set([...tree.boxes.keys()]); draw(); });
by("fit").addEventListener("click", fit);
window.addEventListener("resize", refit);

/** The theme is that of the system until the button asks for the other one. */
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.style.colorScheme || (system.matches ? "dark" : "light")) === "dark";
const showTheme = () => by("theme").setAttribute("aria-pressed", isDark());
by("theme").addEventListener("click", () => {
  const dark = !isDark();
  document.documentElement.style.colorScheme = dark === system.matches ? "" : dark ? "dark" : "light";
  showTheme();
});
system.addEventListener("change", showTheme);
by("title").textContent = document.title = picture.title;
