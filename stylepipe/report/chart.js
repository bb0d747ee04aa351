"use strict";
// Curves over images seen, as SVG.

/** Make an element: attributes by name, functions as listeners, children as elements or plain text. */
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "circle", "text", "title", "clipPath", "defs"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Write a number for people: four digits, and no more zeros than it needs. */
function figure(value, digits = 4) {
  if (value === null || value === undefined) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-4) return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  if (size >= 10 ** digits) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

/** Write images seen as kimg. */
function kimg(images) {
  return (images / 1000).toLocaleString("en-US", { maximumFractionDigits: 3 });
}

/** Choose round numbers between two, about as many as asked for. */
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9 && found.length < 50; i++) found.push(i * step);
  return found.map((value) => Number(value.toPrecision(12)));
}

/** Choose round numbers for a logarithmic axis: powers of ten, with 2 and 5 between them where there is room. */
function logTicks(low, high) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return ticks(low, high, 4).filter((value) => value > 0);
  const every = Math.max(1, Math.ceil(decades / 6));
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    if (power % every) continue;
    for (const factor of decades < 2.5 ? [1, 2, 5] : [1]) found.push(Number(`${factor}e${power}`));
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

/** Return the mean of a curve over what came before, with weights that halve every `half` images; gaps stay. */
function smoothed(x, y, half) {
  let sum = 0, weight = 0, before = x[0];
  return y.map((value, i) => {
    if (value === null) return null;
    const fade = 0.5 ** ((x[i] - before) / half);
    before = x[i];
    sum = sum * fade + value;
    weight = weight * fade + 1;
    return sum / weight;
  });
}

/** Return the place in ascending numbers that is nearest to a value. */
function nearest(numbers, value) {
  let low = 0, high = numbers.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - numbers[low - 1] <= numbers[low] - value ? low - 1 : low;
}

const EDGE = { left: 50, right: 12, top: 10, bottom: 32 };
const HEIGHT = 200;

/**
 * One chart.
 *
 * spec: key, title, unit, dots, events [{x, text}], series [{name, switch, title, color, dash, thin, x, y, mx, my,
 *   best {x, y, label}}]; those of one `switch` are switched on and off together, in all charts.
 * shared: hidden, logarithmic (sets of switches and keys); smoothing (images, 0 for none); domain and zoom ([from, to]
 *   images); now; onHover(x or null, chart), onPick(x), onZoom([from, to] or null), onSwitch().
 */
class Chart {
  constructor(spec, shared) {
    this.spec = spec;
    this.shared = shared;
    this.svg = el("svg", { role: "img", "aria-label": `${spec.title} over kimg` });
    this.tip = el("div", { class: "tip", hidden: true });
    this.legend = el("div", { class: "legend" });
    const log = el("button", {
      title: "logarithmic or linear axis", "aria-pressed": String(shared.logarithmic.has(spec.key)),
      click: () => {
        const now = !shared.logarithmic.has(spec.key);
        if (now) shared.logarithmic.add(spec.key); else shared.logarithmic.delete(spec.key);
        log.setAttribute("aria-pressed", String(now));
        log.textContent = now ? "log" : "linear";
        this.draw();
      },
    }, shared.logarithmic.has(spec.key) ? "log" : "linear");
    this.element = el("div", { class: "card chart" },
      el("header", {}, el("h3", {}, spec.title), el("span", { class: "soft" }, spec.unit), log), this.legend, this.svg, this.tip);
    for (const series of spec.series) this.legend.append(this.switch(series));
    this.svg.addEventListener("pointermove", (event) => this.moved(event));
    this.svg.addEventListener("pointerleave", () => { this.drag = null; this.leave(); shared.onHover(null, this); });
    this.svg.addEventListener("pointerdown", (event) => { this.drag = this.at(event); });
    this.svg.addEventListener("pointerup", (event) => this.released(event));
    this.svg.addEventListener("dblclick", () => shared.onZoom(null));
    this.width = 0;
    this.observer = new ResizeObserver(() => { if (this.svg.clientWidth !== this.width) this.draw(); });
    this.observer.observe(this.svg);
  }

  /** Make the legend's button of a series. */
  switch(series) {
    const hidden = this.shared.hidden;
    return el("button", {
      title: series.title || series.name, "data-switch": series.switch,
      click: () => {
        if (hidden.has(series.switch)) hidden.delete(series.switch); else hidden.add(series.switch);
        this.shared.onSwitch();
      },
    }, el("span", { class: "swatch", style: `color: ${series.color}` }), el("span", {}, series.name));
  }

  /** Return the series that are switched on with the line to draw, sx and sy: means of buckets, smoothed if asked for. */
  shown() {
    const half = this.shared.smoothing;
    return this.spec.series.filter((series) => !this.shared.hidden.has(series.switch)).map((series) => {
      const x = series.mx || series.x, y = series.my || series.y;
      if (!half || this.spec.dots) return { ...series, sx: x, sy: y, raw: Boolean(series.mx) };
      return { ...series, sx: x, sy: smoothed(x, y, half), raw: true };
    });
  }

  draw() {
    const width = this.width = this.svg.clientWidth;
    if (!width) return;
    const { left, right, top, bottom } = EDGE, log = this.shared.logarithmic.has(this.spec.key);
    const [from, to] = this.domain = this.shared.zoom || this.shared.domain;
    this.series = this.shown();
    for (const button of this.legend.children) {
      button.setAttribute("aria-pressed", String(!this.shared.hidden.has(button.dataset.switch)));
    }
    const values = this.series.flatMap((series) => {
      const [x, y] = this.shared.smoothing ? [series.sx, series.sy] : [series.x, series.y];
      return y.filter((value, i) => value !== null && (!log || value > 0) && x[i] >= from && x[i] <= to);
    });
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!values.length) [low, high] = log ? [1, 10] : [0, 1];
    if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
    const space = log ? Math.log(high / low) * 0.05 : (high - low) * 0.05;
    if (log) [low, high] = [low / Math.exp(space), high * Math.exp(space)];
    else [low, high] = [low - space, high + space];
    const plain = (value) => top + (HEIGHT - top - bottom) * (1 - (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low)));
    this.toX = (x) => left + (width - left - right) * (x - from) / (to - from || 1);
    this.toY = (value) => value === null || (log && value <= 0) ? null : Math.max(-2000, Math.min(2000, plain(value)));
    this.fromX = (pixel) => from + (pixel - left) / (width - left - right) * (to - from);

    const floor = HEIGHT - bottom, parts = [], clip = `clip-${Chart.count = (Chart.count || 0) + 1}`;
    parts.push(el("defs", {}, el("clipPath", { id: clip },
      el("rect", { x: left - 3, y: top - 6, width: width - left - right + 6, height: floor - top + 9 }))));
    for (const value of log ? logTicks(low, high) : ticks(low, high, 4)) {
      const y = plain(value);
      parts.push(el("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }),
        el("text", { x: left - 7, y: y + 3.5, "text-anchor": "end" }, figure(value, 3)));
    }
    parts.push(el("line", { class: "axis", x1: left, x2: width - right, y1: floor, y2: floor }));
    const marks = ticks(from / 1000, to / 1000, Math.max(2, Math.floor((width - left) / 85)));
    for (const mark of marks) {
      const x = this.toX(mark * 1000);
      if (x > width - right - 34) continue;  // there stands the unit
      parts.push(el("line", { class: "axis", x1: x, x2: x, y1: floor, y2: floor + 4 }),
        el("text", { x, y: floor + 17, "text-anchor": "middle" }, kimg(mark * 1000)));
    }
    parts.push(el("text", { x: width - right, y: floor + 17, "text-anchor": "end" }, "kimg"));
    if (!values.length) {
      parts.push(el("text", { x: (left + width - right) / 2, y: (top + floor) / 2, "text-anchor": "middle" },
        this.series.length ? (log ? "nothing above 0 here" : "no finite values here") : "all switched off"));
    }
    const inner = el("g", { "clip-path": `url(#${clip})` });
    for (const series of this.series) {
      const style = `stroke: ${series.color}`, dash = { "stroke-dasharray": series.dash || null };
      if (series.raw) inner.append(el("path", { class: this.shared.smoothing ? "curve raw" : "curve all", style, d: this.path(series.x, series.y) }));
      inner.append(el("path", {
        class: series.thin ? "curve thin" : "curve", style, ...dash, "data-name": series.name, d: this.path(series.sx, series.sy),
      }));
      if (this.spec.dots && !series.thin && series.x.length <= 60) {
        inner.append(el("path", { class: "dots", style, d: this.path(series.x, series.y, true) }));
      }
    }
    for (const event of this.spec.events) {
      const x = this.toX(event.x);
      inner.append(el("line", { class: "event", x1: x, x2: x, y1: top, y2: floor }),
        el("path", { class: "event-head", d: `M${x - 4} ${top - 6}h8l-4 7z` }));
    }
    parts.push(inner);
    for (const series of this.series) if (series.best) parts.push(...this.best(series.best, width));
    this.nowLine = el("line", { class: "now", y1: top, y2: floor });
    this.crossLine = el("line", { class: "cross", y1: top, y2: floor, visibility: "hidden" });
    this.dots = el("g");
    this.zoomBox = el("rect", { class: "zoom", y: top, height: floor - top, visibility: "hidden" });
    parts.push(this.nowLine, this.crossLine, this.zoomBox, this.dots,
      el("rect", { x: 0, y: 0, width, height: HEIGHT, fill: "transparent" }));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...parts);
    this.now(this.shared.now);
  }

  /** Return a line through points that breaks at gaps; or with `apart` a dot at each. */
  path(x, y, apart = false) {
    let text = "", pen = false;
    for (let i = 0; i < x.length; i++) {
      const down = this.toY(y[i]);
      if (down === null) { pen = false; continue; }
      const place = `${this.toX(x[i]).toFixed(1)} ${down.toFixed(1)}`;
      const alone = apart || (!pen && (i + 1 >= x.length || this.toY(y[i + 1]) === null));
      text += alone ? `M${place}h0.01` : `${pen ? "L" : "M"}${place}`;
      pen = true;
    }
    return text;
  }

  best(mark, width) {
    if (mark.x < this.domain[0] || mark.x > this.domain[1]) return [];
    const x = this.toX(mark.x), y = this.toY(mark.y);
    if (y === null) return [];
    const made = [el("circle", { class: "best", cx: x, cy: y, r: 4.5 })];
    if (mark.label) {
      const anchor = x > width * 0.65 ? "end" : x < width * 0.35 ? "start" : "middle";
      const above = y > 34;
      made.push(el("text", { class: "best-label", x, y: above ? y - 11 : y + 20, "text-anchor": anchor }, mark.label));
    }
    return made;
  }

  at(event) {
    const box = this.svg.getBoundingClientRect();
    return (event.clientX - box.left) * this.width / (box.width || 1);
  }

  moved(event) {
    if (!this.toX) return;
    const pixel = this.at(event);
    if (this.drag !== null && this.drag !== undefined && event.buttons && Math.abs(pixel - this.drag) > 6) {
      const [a, b] = [Math.min(pixel, this.drag), Math.max(pixel, this.drag)];
      this.zoomBox.setAttribute("x", a);
      this.zoomBox.setAttribute("width", b - a);
      this.zoomBox.setAttribute("visibility", "visible");
    }
    const x = Math.max(this.domain[0], Math.min(this.domain[1], this.fromX(pixel)));
    this.shared.onHover(this.tell(x), this);
  }

  released(event) {
    const from = this.drag;
    this.drag = null;
    if (from === null || from === undefined || !this.toX) return;
    this.zoomBox.setAttribute("visibility", "hidden");
    const pixel = this.at(event);
    if (Math.abs(pixel - from) > 6) {
      const ends = [this.fromX(Math.min(pixel, from)), this.fromX(Math.max(pixel, from))];
      this.shared.onZoom([Math.max(ends[0], this.domain[0]), Math.min(ends[1], this.domain[1])]);
    } else this.shared.onPick(this.fromX(pixel));
  }

  /** Show the values nearest to x, and return where they are. */
  tell(x) {
    const rows = [], dots = [];
    let where = null;
    for (const series of this.series) {
      if (!series.sx.length) continue;
      const i = nearest(series.sx, x);
      if (where === null || Math.abs(series.sx[i] - x) < Math.abs(where - x)) where = series.sx[i];
      rows.push(el("tr", {}, el("td", {}, el("span", { class: "swatch", style: `color: ${series.color}` }), " ", series.name),
        el("td", {}, series.sy[i] === null ? "not finite" : figure(series.sy[i])), el("td", { class: "soft" }, this.extremes(series, i))));
      const y = this.toY(series.sy[i]);
      if (y !== null) dots.push(el("circle", { cx: this.toX(series.sx[i]), cy: y, r: 3.5, style: `fill: ${series.color}` }));
    }
    const close = this.spec.events.filter((event) => Math.abs(this.toX(event.x) - this.toX(x)) < 7);
    if (where === null) where = x;
    this.cross(where);
    this.dots.replaceChildren(...dots);
    this.tip.replaceChildren(el("b", { class: "number" }, `${kimg(Math.round(where))} kimg`),
      el("table", {}, el("tbody", {}, rows)), ...close.map((event) => el("div", { class: "alarm" }, event.text)));
    this.tip.hidden = false;
    const svg = this.svg.getBoundingClientRect(), own = this.element.getBoundingClientRect();
    const place = svg.left - own.left + this.toX(where), room = own.width;
    const side = place > room / 2 ? place - 14 - this.tip.offsetWidth : place + 14;
    this.tip.style.left = `${Math.max(-6, Math.min(side, room - this.tip.offsetWidth + 6))}px`;
    this.tip.style.top = `${svg.top - own.top + 4}px`;
    return where;
  }

  /** Return the lowest and the highest value around a bucket's mean. */
  extremes(series, i) {
    if (!series.mx || this.shared.smoothing) return null;
    const from = i ? (series.mx[i - 1] + series.mx[i]) / 2 : -Infinity;
    const to = i + 1 < series.mx.length ? (series.mx[i] + series.mx[i + 1]) / 2 : Infinity;
    const values = series.y.filter((value, k) => value !== null && series.x[k] >= from && series.x[k] <= to);
    return values.length > 1 ? `${figure(Math.min(...values), 3)} to ${figure(Math.max(...values), 3)}` : null;
  }

  leave() {
    this.tip.hidden = true;
    if (!this.toX) return;
    this.dots.replaceChildren();
    this.zoomBox.setAttribute("visibility", "hidden");
    this.cross(null);
  }

  /** Draw a line at x, or none. */
  cross(x) { this.line(this.crossLine, x); }

  /** Mark the moment of the images that are shown. */
  now(x) { this.line(this.nowLine, x); }

  line(line, x) {
    if (!line) return;
    const inside = x !== null && x !== undefined && x >= this.domain[0] && x <= this.domain[1];
    line.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) { line.setAttribute("x1", this.toX(x)); line.setAttribute("x2", this.toX(x)); }
  }

  close() { this.observer.disconnect(); }
}
