// From a tree to primitives with coordinates. Pure: no DOM, so Python draws SVG with it too.
"use strict";

const CHAR = 6.7, LINE = 24, GAP = 14, ROW = 26, PAD = 12, HEAD = 24, CHIP = 20, MIDDLE = 190, RAIL = 8, DOT = 6;

/**
 * Primitives of the picture in one state.
 * state: {stage, open: Set of paths, hidden: Set of legend classes, color: "role" or a figure}.
 * Returns {items, width, height, places}.
 */
function layout(tree, state) {
  const paintOf = shape => paint(tree, shape, state.color), isHeat = Boolean(state.color) && state.color !== "role";
  const shown = shape => isThere(shape, state.stage) && !state.hidden.has(legendClass(shape, paintOf));
  const boxShown = box => box.parts.some(part => part.isBox ? boxShown(part) : shown(part));
  const isOpen = box => box === tree.root || state.open.has(box.path);

  function measure(part) {
    if (!part.isBox && part !== tree.root) {
      const text = label(part);
      part.size = [0, 0, 0];
      part.size[part.lane] = part.lane === 1 ? MIDDLE - 30 : CHAR * text.length + 20;
      part.high = part.lane === 1 ? CHIP : LINE;
      return part;
    }
    part.rows = null;
    if (!isOpen(part)) return measureClosed(part);
    const rows = new Map();
    for (const inner of part.parts)
      if (inner.isBox ? boxShown(inner) : shown(inner)) {
        measure(inner);
        if (!rows.has(inner.rank)) rows.set(inner.rank, {rank: inner.rank, parts: [[], [], []]});
        const row = rows.get(inner.rank);
        for (const lane of [0, 1, 2]) if (inner.size[lane]) row.parts[lane].push(inner);
      }
    part.rows = [...rows.values()].sort((a, b) => a.rank - b.rank).flatMap(splitRow);
    orderRows(part);
    const rails = part.rails = findRails(part);
    const inside = lane => Math.max(0, ...part.rows.map(row => span(row.parts[lane], lane)));
    const name = part === tree.root ? 0 : CHAR * (shortenPath(part.path || "", 40).length + 5) + 10 + 2 * RAIL * Math.max(rails[0], rails[2]);
    const has = lane => part.rows.some(row => row.parts[lane].length);
    part.size = [0, 2].map(lane => has(lane) ? Math.max(inside(lane) + 2 * PAD + 2 * RAIL * rails[lane], name) : 0);
    part.size = [part.size[0], has(1) ? MIDDLE : 0, part.size[1]];
    let high = HEAD + 6;
    for (const row of part.rows) {
      row.y = high;
      row.high = Math.max(...[0, 1, 2].map(lane => rowHigh(row.parts[lane], lane)));
      high += row.high + ROW;
    }
    part.high = high - ROW + PAD;
    return part;
  }

  function measureClosed(box) {
    const sum = box.sum = summary(box, shown, paintOf);
    sum.text = [0, 1, 2].map(lane => Object.keys(sum.paints[lane]).length || sum.kept[lane] ? "" : shorten(operatorNames(sum.operators[lane]), 24));
    sum.counts = [0, 1, 2].map(lane => placeCounts(sum, lane));
    const wide = lane => Math.max(CHAR * (shortenPath(box.name, 30).length + 4) + 16, CHAR * sum.text[lane].length + 20,
                                  sum.counts[lane].wide, 90);
    box.size = [sum.lanes[0] ? wide(0) : 0, sum.saved ? MIDDLE - 30 : 0, sum.lanes[2] ? wide(2) : 0];
    box.high = 44;
    return box;
  }

  /** Dots with their counts beside each other, and how wide they are together; offsets from the left of the box. */
  function placeCounts(sum, lane) {
    let x = 10;
    const dots = PAINTS.filter(cls => sum.paints[lane][cls]).map(cls => {
      const dot = {cls, x: x + DOT, text: String(sum.paints[lane][cls])};
      x += 2 * DOT + 4 + CHAR * dot.text.length + 10;
      return dot;
    });
    const kept = sum.kept[lane] ? sum.kept[lane] + " in float" : "";
    return {dots, kept, keptAt: x, wide: x + CHAR * kept.length + (kept ? 10 : 0)};
  }

  /** Open boxes whose saved tensors would meet in the middle get rows of their own. */
  function splitRow(row) {
    const all = [...new Set(row.parts.flat())], open = all.filter(p => p.rows && p.size[1]);
    if (!open.length || all.filter(p => p.size[1]).length < 2) return [row];
    const only = some => ({rank: row.rank, parts: row.parts.map(list => list.filter(p => some.includes(p)))});
    const rest = all.filter(p => !open.includes(p));
    return [...(rest.length ? [only(rest)] : []), ...open.map(p => only([p]))];
  }

  const span = (parts, lane) => lane === 1 ? MIDDLE : parts.reduce((sum, p) => sum + p.size[lane] + GAP, -GAP);
  const rowHigh = (parts, lane) => !parts.length ? 0 : lane === 1 && !parts[0].rows
    ? parts.length * (CHIP + 4) - 4 : Math.max(...parts.map(p => p.high));

  /** Barycenter: parts of a row in the order of what they are joined to in other rows. */
  function orderRows(box) {
    const near = new Map();
    for (const line of box.lines) {
      const [a, b] = line.ends;
      if (!(line.stages >> state.stage & 1) || a === b) continue;
      near.set(a, (near.get(a) || []).concat(b));
      near.set(b, (near.get(b) || []).concat(a));
    }
    for (const lane of [0, 2]) {
      const place = new Map();
      const note = row => row.parts[lane].forEach((p, i) => place.set(p, (i + 0.5) / row.parts[lane].length));
      box.rows.forEach(note);
      for (const rows of [box.rows, [...box.rows].reverse(), box.rows])
        for (const row of rows) {
          const key = new Map(row.parts[lane].map(p => {
            const others = (near.get(p) || []).filter(o => place.has(o) && o.rank !== p.rank).map(o => place.get(o));
            return [p, others.length ? others.reduce((x, y) => x + y) / others.length : place.get(p)];
          }));
          row.parts[lane].sort((p, q) => key.get(p) - key.get(q));
          note(row);
        }
    }
  }

  /** Lines that skip a row run beside it. Sets line.rail to a track, first fit; returns the tracks of each lane. */
  function findRails(box) {
    const used = [0, 0, 0];
    for (const lane of [0, 2]) {
      const busy = box.rows.filter(row => row.parts[lane].length).map(row => row.rank), tracks = [], skipping = [];
      const consider = (line, low, high) => {
        if (line.rail || line.from.lane !== lane || line.to.lane !== lane || !shown(line.from) || !shown(line.to)) return;
        if (busy.some(rank => low < rank && rank < high)) skipping.push([line, low, high]);
      };
      for (const line of box.lines) {
        const [a, b] = line.ends;
        if (a !== b) consider(line, Math.min(a.rank, b.rank), Math.max(a.rank, b.rank));
      }
      for (const {line, part, isAbove} of box.passing)
        isAbove ? consider(line, -Infinity, part.rank) : consider(line, part.rank, Infinity);
      for (const [line, low, high] of skipping.sort((p, q) => (p[2] - p[1]) - (q[2] - q[1]) || 0)) {
        let track = tracks.findIndex(runs => runs.every(r => r[2] === line.source || r[1] <= low || r[0] >= high));
        if (track < 0) track = tracks.length < 8 ? tracks.push([]) - 1 : 7;
        tracks[track].push([low, high, line.source]);
        line.rail = {box, track, lane};
      }
      used[lane] = tracks.length;
    }
    return used;
  }

  const items = [], places = new Map();
  const add = (type, cls, fields) => items.push({type, cls, ...fields});
  /** A rectangle that can be chosen: its key is unlike all others, its id is that of the shape or box. */
  const addNode = (cls, part, lane, fields) => add("rect", cls, {...fields, id: part.id, key: part.id + "|" + lane});

  function place(part, center, y, chip) {
    const at = lane => ({x: center[lane] - part.size[lane] / 2, y, w: part.size[lane], h: part.high});
    if (!part.isBox && part !== tree.root) { places.set(part.id + "|" + part.lane, at(part.lane)); return; }
    for (const lane of [0, 2]) if (part.size[lane]) places.set(part.id + "|" + lane, at(lane));
    if (!part.rows) {
      if (part.size[1]) places.set(part.id + "|1", {...at(1), y: chip === undefined ? y + (part.high - CHIP) / 2 : chip, h: CHIP});
      return;
    }
    for (const row of part.rows) {
      for (const lane of [0, 2]) {
        const shift = (lane ? -1 : 1) * RAIL * part.rails[lane] / 2;
        let x = center[lane] + shift - span(row.parts[lane], lane) / 2;
        for (const inner of row.parts[lane]) {
          (inner.at = inner.at || {})[lane] = x + inner.size[lane] / 2;
          x += inner.size[lane] + GAP;
        }
      }
      let chip = y + row.y + (row.parts[1].length > 1 ? 0 : undefined);
      for (const inner of new Set([...row.parts[0], ...row.parts[2], ...row.parts[1]])) {
        const isChip = !inner.isBox && inner.lane === 1;
        const top = isChip ? (row.parts[1].length > 1 ? chip : y + row.y + (LINE - CHIP) / 2) : y + row.y;
        place(inner, [0, 1, 2].map(lane => inner.at && lane !== 1 ? inner.at[lane] || center[lane] : center[1]), top,
              isNaN(chip) ? undefined : chip);
        if (inner.size[1] && !inner.rows) chip += CHIP + 4;
      }
    }
  }

  /** Where a shape is to be seen: itself, or the outermost closed box around it. */
  function seen(shape) {
    let found = shape;
    for (let box = shape.parent; box; box = box.parent) if (!isOpen(box)) found = box;
    return places.get(found.id + "|" + shape.lane) && {part: found, box: places.get(found.id + "|" + shape.lane)};
  }

  for (const line of tree.lines) line.rail = null;
  measure(tree.root);
  for (const part of tree.byId.values()) part.at = null;
  const margin = 20, left = tree.root.size[0] / 2 + margin;
  const between = tree.root.size[1] || tree.root.size[2] ? MIDDLE : 0;  // of a graph without backward only forward is there
  const right = left + tree.root.size[0] / 2 + between + tree.root.size[2] / 2;
  const middle = left + tree.root.size[0] / 2 + between / 2;
  const remeasured = [left, middle, right];
  place(tree.root, remeasured, 30);
  const width = right + tree.root.size[2] / 2 + margin, height = tree.root.high + 50;

  // lanes
  const lane = (x, w, cls, text) => {
    add("rect", "lane " + cls, {x, y: 8, w, h: height - 16, r: 10});
    add("text", "lane-name " + cls, {x: x + w / 2, y: 30, text, anchor: "middle"});
  };
  lane(left - tree.root.size[0] / 2 - 6, tree.root.size[0] + 12, "forward", "forward ↓");
  if (between) add("text", "lane-name middle", {x: middle, y: 30, text: "saved for backward", anchor: "middle"});
  if (tree.root.size[2]) lane(right - tree.root.size[2] / 2 - 6, tree.root.size[2] + 12, "backward", "backward ↑");

  // open boxes, outermost first
  const drawn = [];
  (function visit(box) {
    if (box !== tree.root) drawn.push(box);
    if (box.rows) new Set(box.rows.flatMap(row => row.parts.flat())).forEach(p => { if (p.isBox) visit(p); });
  })(tree.root);
  for (const box of drawn) if (box.rows)
    for (const side of [0, 2]) {
      const p = places.get(box.id + "|" + side);
      if (!p) continue;
      addNode("module open depth" + box.depth % 4, box, side, {...p, r: 8, title: boxWords(box, side, true)});
    }

  // lines
  const joined = new Map();
  for (const line of tree.lines) {
    if (!(line.stages >> state.stage & 1) || !shown(line.from) || !shown(line.to)) continue;
    const from = seen(line.from), to = seen(line.to);
    if (!from || !to || from.part === to.part && from.box === to.box) continue;
    const key = from.part.id + "|" + line.from.lane + "→" + to.part.id + "|" + line.to.lane;
    if (!joined.has(key)) joined.set(key, {line, from, to, count: 0, roles: new Set(), sources: [], targets: []});
    const one = joined.get(key);
    one.count++;
    one.sources.push(line.source);
    one.targets.push(line.target);
    if (line.from.role && !isHeat) one.roles.add(line.from.role);
  }
  const out = new Map(), into = new Map();
  for (const one of joined.values()) {
    const a = one.from.part.id + "|" + one.line.from.lane, b = one.to.part.id + "|" + one.line.to.lane;
    (out.get(a) || out.set(a, []).get(a)).push(one);
    (into.get(b) || into.set(b, []).get(b)).push(one);
  }
  const across = (lists, end) => lists.forEach(list => {
    const vertical = list.filter(one => one.line.from.lane === one.line.to.lane);
    vertical.sort((p, q) => p[end === "from" ? "to" : "from"].box.x - q[end === "from" ? "to" : "from"].box.x);
    vertical.forEach((one, i) => { one[end + "X"] = (i + 1) / (vertical.length + 1); });
  });
  across(out, "from");
  across(into, "to");
  for (const one of joined.values()) {
    const role = one.roles.size === 1 ? " role-" + [...one.roles][0] : "";
    const quantized = one.line.from.kind === "quantizer" ? " quantized" : "";
    const kind = one.line.from.lane === one.line.to.lane ? "flow" : "crossing";
    const cls = "line " + kind + role + quantized + (one.line.from.lane === 2 ? " up" : "");
    add("path", cls, {d: route(one), ends: [one.from.part.id, one.to.part.id], sources: one.sources, targets: one.targets});
  }

  function route(one) {
    const a = one.from.box, b = one.to.box, lanes = [one.line.from.lane, one.line.to.lane];
    const r = Math.round;
    if (lanes[0] !== lanes[1]) {
      const leftToRight = lanes[0] < lanes[1];
      const x1 = leftToRight ? a.x + a.w : a.x, x2 = leftToRight ? b.x : b.x + b.w;
      const y1 = a.y + a.h / 2, y2 = b.y + b.h / 2, bend = Math.max(20, Math.abs(x2 - x1) / 2);
      const sign = leftToRight ? 1 : -1;
      return `M${r(x1)} ${r(y1)}C${r(x1 + sign * bend)} ${r(y1)} ${r(x2 - sign * bend)} ${r(y2)} ${r(x2)} ${r(y2)}`;
    }
    const up = lanes[0] === 2, x1 = a.x + a.w * one.fromX, x2 = b.x + b.w * one.toX;
    const y1 = up ? a.y : a.y + a.h, y2 = up ? b.y + b.h : b.y, sign = up ? -1 : 1;
    const rail = one.line.rail;
    if (rail && rail.box.rows && sign * (y2 - y1) > ROW) {
      const p = places.get(rail.box.id + "|" + rail.lane);
      const inset = PAD / 2 + RAIL * (rail.box.rails[rail.lane] - rail.track - 0.5);
      const x = rail.lane === 0 ? p.x + inset : p.x + p.w - inset, side = rail.lane === 0 ? -1 : 1;
      const c = 7;
      return `M${r(x1)} ${r(y1)}V${r(y1 + sign * 3)}Q${r(x1)} ${r(y1 + sign * 10)} ${r(x1 + side * c)} ${r(y1 + sign * 10)}`
        + `H${r(x - side * c)}Q${r(x)} ${r(y1 + sign * 10)} ${r(x)} ${r(y1 + sign * (10 + c))}`
        + `V${r(y2 - sign * (12 + c))}Q${r(x)} ${r(y2 - sign * 12)} ${r(x - side * c)} ${r(y2 - sign * 12)}`
        + `H${r(x2 + side * c)}Q${r(x2)} ${r(y2 - sign * 12)} ${r(x2)} ${r(y2 - sign * 5)}V${r(y2)}`;
    }
    const bend = Math.max(10, Math.min(60, Math.abs(y2 - y1) / 2)) * sign;
    return `M${r(x1)} ${r(y1)}C${r(x1)} ${r(y1 + bend)} ${r(x2)} ${r(y2 - bend)} ${r(x2)} ${r(y2)}`;
  }

  // names of open boxes, over the lines that pass through them
  for (const box of drawn) if (box.rows)
    for (const side of [0, 2]) {
      const p = places.get(box.id + "|" + side), name = (side ? "∇ " : "") + shortenPath(box.path, 40);
      if (p) add("text", "module-name", {x: p.x + 8 + (side ? 0 : RAIL * box.rails[0]), y: p.y + 16, text: "▾ " + name, id: box.id});
    }

  // closed boxes
  for (const box of drawn) if (!box.rows) {
    for (const side of [0, 2]) {
      const p = places.get(box.id + "|" + side);
      if (!p) continue;
      addNode("module closed" + (box.sum.kept[side] ? " kept" : ""), box, side, {...p, r: 8, title: boxWords(box, side, false)});
      add("text", "module-name closed", {x: p.x + 10, y: p.y + 17, text: "▸ " + (side ? "∇ " : "") + shortenPath(box.name, 30), id: box.id});
      const counts = box.sum.counts[side];
      for (const dot of counts.dots) {
        add("circle", "dot " + dot.cls, {x: p.x + dot.x, y: p.y + 31, r: DOT, id: box.id});
        add("text", "count", {x: p.x + dot.x + DOT + 4, y: p.y + 35, text: dot.text, id: box.id});
      }
      if (box.sum.text[side]) add("text", "count operators", {x: p.x + 10, y: p.y + 35, text: box.sum.text[side], id: box.id});
      if (counts.kept) add("text", "count kept", {x: p.x + counts.keptAt, y: p.y + 35, text: counts.kept, id: box.id});
    }
    const p = places.get(box.id + "|1");
    if (p) {
      addNode("shape saved", box, 1, {...p, r: CHIP / 2, title: boxWords(box, 1, false)});
      add("text", "label saved", {x: p.x + p.w / 2, y: p.y + 14, text: savedWords(box.sum), anchor: "middle", id: box.id});
    }
  }

  // shapes
  for (const shape of tree.shapes.values()) {
    const p = seen(shape);
    if (!shown(shape) || !p || p.part !== shape) continue;
    const isNew = state.stage > 0 && !(shape.stages >> (state.stage - 1) & 1) ? " new" : "";
    const goes = state.stage + 1 < tree.count && !(shape.stages >> (state.stage + 1) & 1) ? " goes" : "";
    const role = shape.kind === "quantizer" ? " " + paintOf(shape) : shape.role && !isHeat ? " role-" + shape.role : "", again = shape.details.recomputed ? " again" : "";
    const cls = "shape " + shape.kind + role + (shape.kept ? " kept" : "") + isNew + goes + again;
    const r = shape.kind === "quantizer" ? 12 : shape.kind === "saved" ? CHIP / 2 : shape.kind === "contraction" ? 3 : 5;
    addNode(cls, shape, shape.lane, {...p.box, r, title: shapeWords(shape)});
    const y = p.box.y + p.box.h / 2 + 4;
    add("text", "label " + shape.kind + role, {x: p.box.x + p.box.w / 2, y, text: label(shape), anchor: "middle", id: shape.id});
  }
  return {items, width, height, places};
}

/** For Python: the primitives of one state. */
function scene(picture, state) {
  const tree = buildTree(picture);
  tree.count = picture.stages.length;
  const open = state.open ? new Set(state.open) : defaultOpen(tree, state.stage, state.budget);
  const {items, width, height} = layout(tree, {...state, open, hidden: new Set(state.hidden || [])});
  return {items, width, height};
}
