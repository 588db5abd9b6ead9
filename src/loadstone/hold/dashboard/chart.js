// One chart over the last minutes, drawn as SVG: colours come from the style sheet, so light and dark need no redraw.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190, LEFT = 58, RIGHT = 8, TOP = 10, BOTTOM = 22;
const GAP_S = 5;

const shape = (tag, attributes = {}, text = "") => {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
};

const html = (tag, className = "", text = "") => {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
};

// Steps of 1, 2 or 5 times a power of ten, about four of them up to the greatest value.
function ticks(greatest) {
  const rough = Math.max(greatest, 1e-6) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  return Array.from({ length: Math.max(1, Math.ceil(greatest / step - 1e-9)) + 1 }, (_, i) => i * step);
}

export class Chart {
  // curves: [{ key, label, tone }]; `show` writes a value; `least` is the smallest top of the y axis.
  constructor({ title, zh, curves, show, least }, spanS) {
    this.curves = curves;
    this.show = show;
    this.least = least;
    this.spanS = spanS;
    this.points = [];
    this.pointedS = null;
    this.figure = html("figure");
    const caption = html("figcaption", "", title);
    const chinese = html("span", "", zh);
    chinese.lang = "zh";
    caption.append(chinese);
    this.svg = shape("svg", { role: "img", "aria-label": `${title}, the last five minutes` });
    this.values = curves.map(() => html("b"));
    const legend = html("p", "legend");
    curves.forEach((curve, i) => {
      const entry = html("span");
      entry.append(html("i", curve.tone), curve.label, this.values[i]);
      legend.append(entry);
    });
    this.figure.append(caption, this.svg, legend);
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  // points: [{ atS, <key>: number | null }], oldest first.
  update(points) {
    this.points = points;
    this.draw();
  }

  point(x) {
    const width = this.svg.clientWidth - LEFT - RIGHT;
    this.pointedS = x == null ? null : this.endS() - this.spanS * (1 - (x - LEFT) / width);
    this.draw();
  }

  endS() {
    return this.points.length ? this.points.at(-1).atS : 0;
  }

  pointed() {
    if (this.pointedS == null) return this.points.at(-1);
    const away = (point) => Math.abs(point.atS - this.pointedS);
    return this.points.reduce((best, point) => (away(point) < away(best) ? point : best), this.points[0]);
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!width || !this.points.length) return;
    const seen = this.points.flatMap((point) => this.curves.map((curve) => point[curve.key] ?? 0));
    const steps = ticks(Math.max(this.least, ...seen));
    const x = (atS) => LEFT + (width - LEFT - RIGHT) * (1 - (this.endS() - atS) / this.spanS);
    const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value / steps.at(-1));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...this.grid(steps, x, y, width), ...this.curves.map((curve) => this.path(curve, x, y)));
    const at = this.pointed();
    if (this.pointedS != null) this.svg.append(this.line(x(at.atS), y(0), x(at.atS), TOP, "cursor"));
    this.curves.forEach((curve, i) => { this.values[i].textContent = at[curve.key] == null ? "–" : this.show(at[curve.key]); });
  }

  line(x1, y1, x2, y2, className) {
    return shape("line", { x1, y1, x2, y2, class: className });
  }

  grid(steps, x, y, width) {
    const rows = steps.flatMap((value) => [
      this.line(LEFT, y(value), width - RIGHT, y(value), "grid"),
      shape("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, this.show(value)),
    ]);
    const columns = [];
    for (let ago = 0; ago <= this.spanS; ago += 60) {
      const at = x(this.endS() - ago);
      const anchor = ago === 0 ? "end" : "middle";
      columns.push(this.line(at, y(0), at, TOP, "grid"));
      columns.push(shape("text", { x: at, y: HEIGHT - 6, "text-anchor": anchor }, ago ? `−${ago / 60} min` : "now"));
    }
    return [...rows, ...columns];
  }

  // Broken where nothing is known: no value, or the page did not ask.
  path(curve, x, y) {
    let drawn = "", lastS = null;
    for (const point of this.points) {
      const value = point[curve.key];
      if (value == null) { lastS = null; continue; }
      const joined = lastS != null && point.atS - lastS < GAP_S;
      const place = `${x(point.atS).toFixed(1)} ${y(value).toFixed(1)}`;
      drawn += joined ? `L${place}` : `M${place}L${place}`;
      lastS = point.atS;
    }
    return shape("path", { d: drawn, class: curve.tone });
  }
}
