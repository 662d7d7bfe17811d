// A picture (qcompiler/sight/picture.py) as a tree of boxes, and what its parts are called. Pure: no DOM.
"use strict";

/** Boxes by module path, each with its parts (boxes and shapes) and the lines that meet in it. */
function buildTree(picture) {
  const root = {id: "", name: picture.title, parent: null, rank: 0, parts: [], lines: [], passing: [], depth: 0};
  const boxes = new Map([["", root]]), shapes = new Map();
  const box = path => {
    if (boxes.has(path)) return boxes.get(path);
    const parent = box(picture.parents[path]), name = parent.path ? path.slice(parent.path.length + 1) : path;
    const made = {id: "box " + path, path, name, parent, rank: picture.ranks["box " + path],
                  parts: [], lines: [], passing: [], depth: parent.depth + 1, isBox: true};
    boxes.set(path, made);
    parent.parts.push(made);
    return made;
  };
  for (const data of picture.shapes) {
    const shape = {...data, parent: box(data.module)};
    shape.parent.parts.push(shape);
    shapes.set(shape.id, shape);
  }
  const lines = picture.lines.map(line => ({...line, from: shapes.get(line.source), to: shapes.get(line.target)}));
  const byId = new Map([...boxes.values()].map(b => [b.id, b]).concat([...shapes]));
  for (const line of lines) {
    const [above, below] = meet(line.from, line.to);
    line.ends = [above, below];
    above.parent.lines.push(line);
    for (const [end, part] of [[line.from, above], [line.to, below]])
      for (let inner = end; inner !== part; inner = inner.parent)
        inner.parent.passing.push({line, part: inner, isAbove: (end === line.to) === (line.from.lane === 0)});
  }
  return {root, boxes, shapes, lines, byId, harms: picture.harms};
}

/** The parts of one box that two shapes stand in, or are. */
function meet(a, b) {
  const depth = x => x.isBox ? x.depth : x.parent.depth + 1;
  while (depth(a) > depth(b)) a = a.parent;
  while (depth(b) > depth(a)) b = b.parent;
  while (a.parent !== b.parent) { a = a.parent; b = b.parent; }
  return [a, b];
}

/** Opens boxes that hold contractions, from the outside inwards, while about `budget` parts are to be seen. */
function defaultOpen(tree, stage, budget) {
  const open = new Set([""]), queue = [tree.root];
  const there = box => box.parts.filter(part => isThere(part, stage));
  const multiplies = box => there(box).some(part => part.isBox ? multiplies(part) : part.kind === "contraction");
  let count = 0;
  while (queue.length) {
    const box = queue.shift(), parts = there(box);
    if (box !== tree.root && count + parts.length > budget) continue;
    count += parts.length;
    open.add(box.path || "");
    queue.push(...parts.filter(part => part.isBox && multiplies(part)));
  }
  return open;
}

function isThere(part, stage) {
  return part.isBox ? part.parts.some(inner => isThere(inner, stage)) : (part.stages >> stage & 1) === 1;
}

/** What a closed box holds: quantizers by their paint, contractions in float, operators, bytes saved; for each lane. */
function summary(box, shown, paintOf, out) {
  out = out || {lanes: [0, 0, 0], paints: [{}, {}, {}], kept: [0, 0, 0], operators: [new Set(), new Set(), new Set()], bytes: 0, saved: 0};
  for (const part of box.parts) {
    if (part.isBox) summary(part, shown, paintOf, out);
    else if (shown(part)) {
      out.lanes[part.lane]++;
      if (part.kind === "quantizer") out.paints[part.lane][paintOf(part)] = (out.paints[part.lane][paintOf(part)] || 0) + 1;
      if (part.kind === "operator") out.operators[part.lane].add(part.label);
      if (part.kept) out.kept[part.lane]++;
      if (part.kind === "saved") { out.bytes += part.bytes; out.saved++; }
    }
  }
  return out;
}

function human(size) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (size >= 1024 && unit < 3) { size /= 1024; unit++; }
  return (size >= 100 || unit === 0 ? size.toFixed(0) : size.toFixed(1)) + " " + units[unit];
}

/** The longest names first: they say most. */
const operatorNames = names => [...names].sort((a, b) => b.length - a.length).join(", ");
const shorten = (text, most) => text.length > most ? text.slice(0, most - 1) + "…" : text;
/** Of a path the end says most. */
const shortenPath = (text, most) => text.length > most ? "…" + text.slice(1 - most) : text;
const plural = (count, word) => count + " " + word + (count === 1 ? "" : "s");

/** Figure → where the color changes, from harmless to bad; those of harm come with the picture. */
const EDGES = {sqnr: [40, 30, 20, 10], clipped: [1e-12, 0.001, 0.01, 0.1], underflowed: [1e-12, 0.001, 0.01, 0.1]};
const PAINTS = ["role-weight", "role-activation", "role-gradient", "role-output", "heat-4", "heat-3", "heat-2", "heat-1", "heat-0", "heat-none"];

/** The class that colors a quantizer: `role-weight`, or `heat-0` … `heat-4` by one of its figures. */
function paint(tree, shape, color) {
  if (!color || color === "role") return "role-" + shape.role;
  const value = shape.figures[color], edges = color === "harm" ? tree.harms : EDGES[color];
  if (value === undefined) return "heat-none";
  if (value === "nan") return "heat-4";
  const number = value === "inf" ? Infinity : value === "-inf" ? -Infinity : value;
  return "heat-" + edges.filter(edge => color === "sqnr" ? number <= edge : number >= edge).length;
}

/** What a class of `paint` means. */
function paintName(tree, cls, color) {
  if (cls.startsWith("role-")) return cls.slice(5);
  if (cls === "heat-none") return "not watched";
  const edges = color === "harm" ? tree.harms : EDGES[color], step = Number(cls.slice(5)), name = color === "sqnr" ? "SQNR" : color;
  if (color === "sqnr") return step ? `${name} ≤ ${edges[step - 1]} dB` : `${name} > ${edges[0]} dB`;
  if (color === "harm") return step ? `${name} ≥ ${edges[step - 1]}` : `${name} < ${edges[0]}`;
  return step === 0 ? `${name} none` : step === 1 ? `${name} < ${100 * edges[1]} %` : `${name} ≥ ${100 * edges[step - 1]} %`;
}

/** What stands on a shape. */
function label(shape) {
  const star = shape.kind === "quantizer" ? "★ " : "", most = shape.lane === 1 ? 23 : 34;
  const isPath = ["parameter", "buffer", "output", "tangent"].includes(shape.kind);
  return star + (isPath ? shortenPath : shorten)(shape.label, most);
}

/** The entry of the legend that a shape belongs to. */
function legendClass(shape, paintOf) {
  if (shape.kind === "quantizer") return paintOf(shape).replace("role-", "");
  if (shape.kind === "contraction") return shape.kept ? "kept" : "contraction";
  if (shape.kind === "saved" || shape.kind === "operator") return shape.kind;
  return "ends";
}

