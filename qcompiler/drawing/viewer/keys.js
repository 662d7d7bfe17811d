// The keyboard: Tab enters the picture, arrows go from node to node, Enter chooses, Escape clears, + and - zoom,
// PageUp and PageDown move the picture.
"use strict";

/** A rectangle that the keyboard can reach, and that says what it is. */
function makeStop(made, item) {
  const part = tree.byId.get(item.id);
  made.setAttribute("data-key", item.key);
  made.setAttribute("tabindex", "-1");
  made.setAttribute("role", "button");
  made.setAttribute("aria-label", item.title);
  if (part.isBox) made.setAttribute("aria-expanded", String(state.open.has(part.path)));
}

const stops = () => [...by("scene").querySelectorAll("[data-key]")];
const stopAt = key => stops().find(stop => stop.dataset.key === key);

/** Makes a node the one that Tab goes to; the first one where it is not to be seen. */
function setStop(key, focus) {
  const stop = stopAt(key) || stops()[0];
  by("scene").querySelectorAll("[tabindex='0']").forEach(old => old.setAttribute("tabindex", "-1"));
  if (!stop) return;
  stop.setAttribute("tabindex", "0");
  if (focus) stop.focus({preventScroll: true});
}

/** Where a node is for the arrows: of an open box the line with its name. */
function spot(stop) {
  const [id, lane] = [stop.dataset.id, Number(stop.dataset.key.slice(stop.dataset.key.lastIndexOf("|") + 1))];
  const place = drawn.places.get(stop.dataset.key), isOpen = tree.byId.get(id).isBox && state.open.has(tree.byId.get(id).path);
  return {stop, lane, place, x: place.x + place.w / 2, y: isOpen ? place.y + 10 : place.y + place.h / 2, left: place.x};
}

/** Up and down go through a lane in the order of reading; left and right to the nearest node on that side. */
function next(from, key) {
  const here = spot(from), others = stops().filter(stop => stop !== from).map(spot);
  if (key === "ArrowDown" || key === "ArrowUp") {
    const sign = key === "ArrowDown" ? 1 : -1, after = (a, b) => sign * (a.y - b.y || a.left - b.left);
    return others.filter(o => o.lane === here.lane && after(o, here) > 0).sort(after)[0];
  }
  const sign = key === "ArrowRight" ? 1 : -1, away = o => Math.abs(o.x - here.x) + 6 * Math.abs(o.y - here.y);
  const beside = others.filter(o => o.lane === here.lane ? Math.abs(o.y - here.y) < LINE && sign * (o.x - here.x) > 0
                                                        : sign * (o.lane - here.lane) > 0);
  return beside.sort((a, b) => away(a) - away(b))[0];
}

const ZOOM = {"+": 1.25, "=": 1.25, "-": 0.8}, PAGE = {PageDown: -0.9, PageUp: 0.9};

by("canvas").addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const stop = event.target.closest("[data-key]"), key = event.key;
  if (ZOOM[key]) { state.moved = true; svg.call(zoom.scaleBy, ZOOM[key]); }
  else if (PAGE[key]) { state.moved = true; svg.call(zoom.translateBy, 0, PAGE[key] * canvasSize().height / d3.zoomTransform(by("canvas")).k); }
  else if (stop && key.startsWith("Arrow")) {
    const found = next(stop, key);
    if (found) setStop(found.stop.dataset.key, true);
  } else if (stop && (key === "Enter" || key === " ")) press(stop.dataset.id);
  else return;
  event.preventDefault();
});

by("scene").addEventListener("focusin", event => {
  const key = event.target.dataset.key;
  if (!key) return;
  if (key !== state.stop) { state.stop = key; setStop(key); }
  bring(drawn.places.get(key));
});

document.addEventListener("keydown", event => { if (event.key === "Escape") choose(null); });
