// The page around the picture: zoom, folding, search, legend, details, and the slider through the passes.
"use strict";

const picture = JSON.parse(document.getElementById("picture").textContent);
const tree = buildTree(picture);
tree.count = picture.stages.length;
const SVG = "http://www.w3.org/2000/svg", by = id => document.getElementById(id);
const state = {stage: tree.count - 1, open: null, hidden: new Set(), chosen: null, color: picture.watched ? "harm" : "role"};
state.open = defaultOpen(tree, state.stage, 60);
const svg = d3.select("#canvas"), zoom = d3.zoom().scaleExtent([0.02, 4]);
let drawn;

svg.call(zoom.on("zoom", event => by("scene").setAttribute("transform", event.transform))).on("dblclick.zoom", null);

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
  if (item.title) made.appendChild(document.createElementNS(SVG, "title")).textContent = item.title;
  return made;
}

function draw() {
  drawn = layout(tree, state);
  const parts = document.createDocumentFragment();
  for (const item of drawn.items) {
    const made = element(item);
    if (item.ends) made.lineItem = item;
    parts.appendChild(made);
  }
  by("scene").replaceChildren(parts);
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

function fit() {
  const size = by("canvas").getBoundingClientRect(), scale = Math.min(1, size.width / drawn.width);
  svg.call(zoom.transform, d3.zoomIdentity.translate((size.width - drawn.width * scale) / 2, 0).scale(scale));
}

function fold(box) {
  state.open.has(box.path) ? state.open.delete(box.path) : state.open.add(box.path);
  const before = corner(box);
  draw();
  const after = corner(box), now = d3.zoomTransform(by("canvas"));
  if (before && after) svg.call(zoom.transform, now.translate(before.x - after.x, before.y - after.y));
}

const corner = box => drawn.places.get(box.id + "|0") || drawn.places.get(box.id + "|2");

function reveal(shape) {
  for (let box = shape.parent; box; box = box.parent) state.open.add(box.path || "");
  draw();
  const p = drawn.places.get(shape.id + "|" + shape.lane), size = by("canvas").getBoundingClientRect();
  if (p) svg.call(zoom.transform, d3.zoomIdentity.translate(size.width / 2 - p.x - p.w / 2, size.height / 2 - p.y).scale(1));
}

function choose(id) {
  state.chosen = id;
  const part = tree.byId.get(id), panel = by("details");
  panel.replaceChildren();
  if (part && part.isBox) table(panel, part.path, boxDetails(part));
  else if (part) table(panel, part.details.name || part.label, {kind: part.kind, node: part.id, module: part.module, ...part.details});
  if (part && part.figures && Object.keys(part.figures).length) table(panel, "debugger, " + plural(picture.watched, "step"), part.figures);
  mark();
}

function boxDetails(box) {
  const sum = summary(box, shape => isThere(shape, state.stage), paintOf), counts = {};
  for (const lane of sum.paints) for (const cls in lane) {
    const name = "quantizers, " + paintName(tree, cls, state.color);
    counts[name] = (counts[name] || 0) + lane[cls];
  }
  return {kind: "module", ...counts, "left in float": sum.kept[0] + sum.kept[2], "saved for backward": human(sum.bytes)};
}

function table(panel, title, rows) {
  const heading = panel.appendChild(document.createElement("h2"));
  heading.textContent = title;
  const body = panel.appendChild(document.createElement("table"));
  for (const [name, value] of Object.entries(rows)) {
    if (value === "" || value === null || value === undefined) continue;
    const row = body.insertRow();
    row.insertCell().textContent = name.replaceAll("_", " ");
    row.insertCell().textContent = show(name, value);
  }
}

function show(name, value) {
  if (name.includes("bytes")) return value.toLocaleString("en") + " (" + human(value) + ")";
  if (name === "shape") return "[" + value.join(", ") + "]";
  if (name === "consumers") return value.map(id => { const s = tree.shapes.get(id); return s ? s.details.name || s.label : id; }).join(", ");
  if (typeof value === "number") return String(Number(value.toPrecision(4)));
  return Array.isArray(value) ? value.join(", ") : String(value);
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

by("canvas").addEventListener("click", event => {
  const id = event.target.dataset && event.target.dataset.id, part = id && tree.byId.get(id);
  if (part && part.isBox) fold(part);
  choose(id || null);
});

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
    const entry = by("legend").appendChild(document.createElement("label")), box = document.createElement("input");
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
  if (hits.length) { reveal(hits[hit]); choose(hits[hit].id); }
}
const haystack = s => [s.id, s.label, s.module, s.kind, s.role, s.kept, s.details.name, s.details.op].join(" ").toLowerCase();
by("search").addEventListener("input", () => { hit = -1; search(1); });
by("search").addEventListener("keydown", event => { if (event.key === "Enter") search(event.shiftKey ? -1 : 1); });

by("stage").max = tree.count - 1;
by("stage").value = state.stage;
by("stage").addEventListener("input", event => { state.stage = Number(event.target.value); legend(); draw(); });
by("fold").addEventListener("click", () => { state.open = new Set([""]); draw(); fit(); });
by("unfold").addEventListener("click", () => { state.open = new Set([...tree.boxes.keys()]); draw(); });
by("fit").addEventListener("click", fit);
by("title").textContent = document.title = picture.title;

legend();
draw();
fit();
document.body.dataset.ready = "true";
