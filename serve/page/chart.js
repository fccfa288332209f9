// Small line charts. A chart keeps its elements and redraws its paths, so that polling does not disturb the reader.

import { el, setText, svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 84;
const PAD = { left: 4, right: 4, top: 6, bottom: 6 };

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function range(columns) {
  const values = columns.flat().filter(isNumber);
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  return [low, high];
}

function line(points) {
  let pen = "M";
  return points
    .map((point) => {
      if (!point) { pen = "M"; return ""; }
      const text = `${pen}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
      pen = "L";
      return text;
    })
    .join("");
}

// `series`: [{label, format}]; `over` is the prefix of x values ("step ", "v"). `dots` marks each point;
// `wide` fills a whole row.
export class Chart {
  constructor(title, over, series, { dots = false, wide = series.length > 1 } = {}) {
    this.over = over;
    this.brief = over.trim().length > 1 ? "" : over;
    this.series = series;
    this.dots = dots;
    this.data = null;
    this.paths = series.map((_, index) => svg("path", { class: `line s${index}` }));
    this.marks = svg("g", {});
    this.zero = svg("line", { class: "zero", x1: 0, x2: WIDTH });
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.image = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", preserveAspectRatio: "none" },
      this.zero, this.cursor, ...this.paths, this.marks);
    this.values = series.map(() => el("b", {}));
    this.legend = el("span", { class: "legend" }, series.map((each, index) =>
      el("span", { class: `key s${index}` }, el("i", { "aria-hidden": "true" }), each.label ? `${each.label} ` : "", this.values[index])));
    this.ends = [el("span", {}), el("span", { class: "bounds" }), el("span", {})];
    this.node = el("figure", { class: wide ? "figure wide" : "figure" },
      el("figcaption", {}, el("span", {}, title), this.legend), this.image, el("div", { class: "ends" }, this.ends));
    this.title = title;
    this.image.addEventListener("pointermove", (event) => this.point(event));
    this.image.addEventListener("pointerleave", () => this.show(null));
  }

  // `x`: increasing numbers; `columns`: one list for each series, null where unknown; `marked`: an x to highlight.
  draw(x, columns, marked = null) {
    const known = x.length > 0 && columns.some((column) => column.some(isNumber));
    this.node.hidden = !known;
    if (!known) return;
    this.data = { x, columns };
    const [low, high] = range(columns);
    const across = WIDTH - PAD.left - PAD.right;
    const down = HEIGHT - PAD.top - PAD.bottom;
    const span = x.at(-1) - x[0];
    this.atX = (value) => PAD.left + (span ? ((value - x[0]) / span) * across : across / 2);
    const atY = (value) => PAD.top + ((high - value) / (high - low)) * down;
    const places = columns.map((column) => column.map((value, index) => (isNumber(value) ? [this.atX(x[index]), atY(value)] : null)));
    places.forEach((points, index) => this.paths[index].setAttribute("d", line(points)));
    const single = x.length === 1;
    this.marks.replaceChildren(...(this.dots || single ? places.flatMap((points, index) => points
      .map((point, at) => point && svg("path", { class: `dot s${index}${x[at] === marked ? " marked" : ""}`, d: `M${point[0].toFixed(1)} ${point[1].toFixed(1)}h0` }))
      .filter(Boolean)) : []));
    const zero = low < 0 && high > 0;
    this.zero.setAttribute("visibility", zero ? "visible" : "hidden");
    if (zero) for (const end of ["y1", "y2"]) this.zero.setAttribute(end, atY(0));
    const format = this.series[0].format;
    setText(this.ends[1], `${format(low)} to ${format(high)}`);
    setText(this.ends[2], `${x.length > 1 ? this.brief + x.at(-1) : ""}`);
    this.show(null);
  }

  point(event) {
    if (!this.data) return;
    const box = this.image.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const distance = (value) => Math.abs(this.atX(value) - at);
    this.show(this.data.x.reduce((best, value, index, x) => (distance(value) < distance(x[best]) ? index : best), 0));
  }

  // Shows the values at an index, or the last ones (null).
  show(index) {
    const { x, columns } = this.data;
    const at = index ?? x.length - 1;
    this.cursor.setAttribute("visibility", index === null ? "hidden" : "visible");
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.atX(x[at]));
    this.series.forEach(({ format }, each) => {
      const value = columns[each][at];
      setText(this.values[each], isNumber(value) ? format(value) : "–");
    });
    setText(this.ends[0], index === null ? `${this.brief}${x[0]}` : `${this.over}${x[at]}`);
    if (index !== null) return;
    const values = this.series.map((each, i) => `${each.label || this.title} ${this.values[i].textContent}`).join(", ");
    this.image.setAttribute("aria-label", `${this.title} from ${this.over}${x[0]} to ${this.over}${x.at(-1)}; last: ${values}`);
  }
}
