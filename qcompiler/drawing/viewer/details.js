// What is chosen: its details beside the picture.
"use strict";

function choose(id) {
  state.chosen = id;
  const part = tree.byId.get(id), panel = by("details");
  panel.replaceChildren();
  if (part && part.isBox) table(panel, part.path, boxDetails(part));
  else if (part) table(panel, part.details.name || part.label, {kind: part.kind, meaning: MEANINGS[part.kind], node: part.id, module: part.module, ...part.details});
  if (part && part.figures && Object.keys(part.figures).length) table(panel, "debugger, " + plural(picture.watched, "step"), part.figures);
  mark();
  if (!state.moved) fit();  // beside the panel
  const place = id && state.stop && state.stop.startsWith(id + "|") && drawn.places.get(state.stop);
  if (place) bring(place);
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
