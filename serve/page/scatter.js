// Small plots of points: one number over another, with a line through them in their order, or through a cloud of them.

import { el, setText, svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 120;
const PAD = { left: 8, right: 8, top: 10, bottom: 8 };

function reach(values, include = []) {
  const all = [...values, ...include];
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

// `over` and `up` are {label, format} of the two axes.
export class Scatter {
  constructor(title, over, up) {
    this.over = over;
    this.up = up;
    this.title = title;
    this.marks = svg("g", {});
    this.path = svg("path", { class: "line s0" });
    this.level = svg("line", { class: "zero", x1: 0, x2: WIDTH });
    this.image = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart tall", role: "img", preserveAspectRatio: "none" },
      this.level, this.path, this.marks);
    this.last = el("span", { class: "legend" });
    this.ends = [el("span", {}), el("span", { class: "bounds" }), el("span", {})];
    this.node = el("figure", { class: "figure wide" },
      el("figcaption", {}, el("span", {}, title), this.last), this.image, el("div", { class: "ends" }, this.ends));
  }

  // `points`: [{x, y, low, high, name}]; `joined` draws a line through them in their order; `line`: {slope, through}, a
  // fitted line; `level`: a value of y to mark.
  draw(points, { joined = false, line = null, level = null, said = "" } = {}) {
    this.node.hidden = points.length === 0;
    if (!points.length) return;
    const ys = points.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]);
    const [left, right] = reach(points.map((point) => point.x));
    const [low, high] = reach(ys, level === null ? [] : [level]);
    const atX = (x) => PAD.left + ((x - left) / (right - left)) * (WIDTH - PAD.left - PAD.right);
    const atY = (y) => PAD.top + ((high - y) / (high - low)) * (HEIGHT - PAD.top - PAD.bottom);
    const at = (x, y) => `${atX(x).toFixed(1)} ${atY(y).toFixed(1)}`;
    this.level.setAttribute("visibility", level === null ? "hidden" : "visible");
    if (level !== null) for (const end of ["y1", "y2"]) this.level.setAttribute(end, atY(level));
    const joint = points.map((point, index) => `${index ? "L" : "M"}${at(point.x, point.y)}`).join("");
    const [from, to] = [Math.min(...points.map((point) => point.x)), Math.max(...points.map((point) => point.x))];
    const on = (x) => line.through[1] + line.slope * (x - line.through[0]);
    this.path.setAttribute("d", joined ? joint : line ? `M${at(from, on(from))}L${at(to, on(to))}` : "");
    this.marks.replaceChildren(...points.flatMap((point, index) => [
      point.high == null ? null : svg("path", { class: "reach s0", d: `M${at(point.x, point.low)}L${at(point.x, point.high)}` }),
      svg("path", { class: `dot s0${joined && index === points.length - 1 ? " marked" : ""}`, d: `M${at(point.x, point.y)}h0` },
        svg("title", {}, `${point.name}: ${this.up.label} ${this.up.format(point.y)}, ${this.over.label} ${this.over.format(point.x)}`)),
    ]).filter(Boolean));
    setText(this.last, said);
    setText(this.ends[0], this.over.format(from));
    setText(this.ends[1], `${this.up.label} ${this.up.format(low)} to ${this.up.format(high)}, over ${this.over.label}`);
    setText(this.ends[2], to > from ? this.over.format(to) : "");
    this.image.setAttribute("aria-label", `${this.title}: ${points.map((point) => `${point.name} ${this.up.format(point.y)} at ${this.over.format(point.x)}`).slice(-8).join(", ")}. ${said}`);
  }
}
