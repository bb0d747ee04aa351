// The page as a whole: what it says, in which order, and how it follows a run that goes on.

const POLL_MS = 3000;
const MAX_SMOOTHING = 0.1;  // half-life, as a share of the run
const COLORS = 8;

const memory = { images: { seen: null, stacked: false, playing: false }, hidden: new Set(), logarithmic: new Set(), smoothing: 0, zoom: null, open: new Set() };
let report = JSON.parse(document.getElementById("data").textContent);
let charts = [], viewer = null, pressed = false;

const color = (number) => `var(--c${number % COLORS})`;
const dash = (number) => [null, "5 3", "1.5 3.5", "8 3 2 3"][Math.floor(number / COLORS) % 4];
const several = () => report.runs.length > 1;

function render() {
  for (const chart of charts) chart.close();
  charts = [];
  if (viewer) viewer.close();
  const shared = sharedByCharts();
  viewer = new Viewer(report, memory.images, (x) => {
    shared.now = x;
    for (const chart of charts) chart.now(x);
  }, report.runs.map((_, number) => color(number)));
  document.getElementById("report").replaceChildren(...[
    head(), alarms(), problems(),
    el("h2", {}, "Images"), viewer.element, clips(),
    metrics(shared), comparison(), curves(shared), texts("Log", "log", (run) => run.log.join("\n"), "last lines of log.txt"),
    texts("Settings", "config", (run) => run.config, "config.yaml"),
    el("footer", {}, `Made by stylepipe ${report.version} `, time(report.made)),
  ].filter(Boolean));
  for (const chart of charts) chart.draw();
}

function sharedByCharts() {
  const ends = report.runs.flatMap((run) => [run.seen, ...Object.values(run.curves).flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]])])
    .concat(report.metrics.flatMap((metric) => metric.runs.filter(Boolean).flatMap((run) => run.latest.x)));
  const last = Math.max(1, ...ends), first = Math.min(...ends.filter((x) => x > 0), last);
  const domain = [first > 0.3 * last && first < last ? first : 0, last];
  return {
    hidden: memory.hidden, logarithmic: memory.logarithmic, domain,
    get smoothing() { return memory.smoothing ** 2 * MAX_SMOOTHING * (domain[1] - domain[0]); },
    get zoom() { return memory.zoom; },
    now: null,
    onHover: (x, from) => { for (const chart of charts) if (chart !== from) chart.cross(x); },
    onPick: (x) => { if (viewer.moments.length) { viewer.stop(); viewer.go(nearest(viewer.moments, x)); } },
    onSwitch: () => { for (const chart of charts) chart.draw(); },
    onZoom: (zoom) => {
      memory.zoom = zoom;
      const button = document.getElementById("unzoom");
      if (button) button.hidden = !zoom;
      for (const chart of charts) { chart.leave(); chart.draw(); }
    },
  };
}

function time(seconds) {
  const date = new Date(seconds * 1000);
  return el("time", { datetime: date.toISOString() }, date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }));
}

function runName(run, number) {
  return el("span", {}, el("span", { class: "swatch", style: `color: ${color(number)}` }), " ", run.name);
}

function duration(seconds) {
  if (seconds >= 2 * 86400) return `${(seconds / 86400).toFixed(1)} days`;
  if (seconds >= 5400) return `${(seconds / 3600).toFixed(1)} h`;
  return seconds >= 90 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds)} s`;
}

function progress(run) {
  if (!run.total) return `${kimg(run.seen)} kimg`;
  const left = run.total - run.seen, share = Math.min(run.seen / run.total, 1);
  const rest = left > 0 && run.speed ? `, ${duration(left / 1000 * run.speed)} to go at this speed` : "";
  return `${kimg(run.seen)} of ${kimg(run.total)} kimg (${figure(share * 100, 3)} %)${rest}`;
}

function written(run) {
  return run.written ? ["last written ", time(run.written)] : ["nothing written yet"];
}

function head() {
  if (several()) {
    const labels = [...new Set(report.runs.flatMap((run) => run.facts.map(([label]) => label)))];
    const rows = labels.map((label) => el("tr", {}, el("th", {}, label), report.runs.map((run) =>
      el("td", {}, (run.facts.find((fact) => fact[0] === label) || [])[1] || "\u2013"))));
    return el("header", {}, el("h1", {}, `${report.runs.length} runs`),
      el("div", { class: "card scroll", style: "margin-top: 20px" }, el("table", { id: "facts" },
        el("thead", {}, el("tr", {}, el("th", {}), report.runs.map((run, number) => el("th", { title: run.path }, runName(run, number))))),
        el("tbody", {}, el("tr", {}, el("th", {}, "Images seen"), report.runs.map((run) => el("td", { class: "number" }, progress(run)))), rows,
          el("tr", {}, el("th", {}, "Last written"), report.runs.map((run) => el("td", {}, run.written ? time(run.written) : "\u2013"))),
          el("tr", {}, el("th", {}, "Folder"), report.runs.map((run) => el("td", { class: "path soft small" }, run.path)))))));
  }
  const run = report.runs[0];
  return el("header", {}, el("h1", {}, run.name), el("p", { class: "soft small path" }, run.path),
    run.total && el("div", { class: "bar" }, el("i", { style: `width: ${Math.min(100, 100 * run.seen / run.total)}%` })),
    el("p", { class: "number" }, progress(run), el("span", { class: "soft" }, "; ", written(run))),
    el("dl", { class: "facts", id: "facts" }, run.facts.map(([label, value]) =>
      el("div", { class: value.length > 34 ? "wide" : null }, el("dt", {}, label), el("dd", {}, value)))));
}

function alarms() {
  const lines = report.runs.flatMap((run) => run.events.map((event) =>
    el("li", {}, el("b", { class: "number" }, `${kimg(event.x)} kimg`), ` ${several() ? `${run.name}: ` : ""}`, event.text)));
  return lines.length ? el("div", { class: "card alarms", id: "alarms" }, el("h3", {}, lines.length === 1 ? "1 alarm" : `${lines.length} alarms`), el("ul", {}, lines)) : null;
}

function problems() {
  const lines = report.runs.flatMap((run) => run.problems.map((text) => el("li", { class: "path" }, several() ? `${run.name}: ${text}` : text)));
  return lines.length ? el("div", { class: "card problems small", id: "problems" }, el("h3", {}, "Left out of this page"), el("ul", {}, lines)) : null;
}

function clips() {
  const found = report.runs.filter((run) => run.clip);
  if (!found.length) return null;
  return el("div", {}, el("h4", {}, "Between latents"), el("div", { class: "card viewer" }, el("div", { class: "pictures", style: "margin-top: 0", id: "clips" },
    found.map((run) => el("figure", {}, el("figcaption", {}, several() && el("b", {}, run.name), `${kimg(run.clip.x)} kimg`),
      el("img", { src: report.pictures[run.clip.picture], alt: "interpolation between latents", style: "cursor: default; width: auto; max-width: 100%" }))))));
}

function metrics(shared) {
  if (!report.metrics.length) return null;
  const rows = report.metrics.flatMap((metric) => {
    const told = metric.runs.map((run) => run && run.best && run.best.y);
    const values = told.filter((value) => typeof value === "number");
    const winner = metric.best === "highest" ? Math.max(...values) : Math.min(...values);
    const name = [metric.metric, el("span", { class: "soft" }, metric.best ? `, ${metric.best} is best` : ""),
      metric.differs && el("div", { class: "soft small" }, metric.differs)];
    return metric.runs.map((run, number) => ({ run, number })).filter(({ run }) => run).map(({ run, number }, i, all) => el("tr", {},
      i === 0 && el("th", { rowspan: all.length, title: metric.settings.map((one) => one.join(" ")).join("\n") }, name),
      several() && el("td", {}, runName(report.runs[number], number)),
      el("td", { class: "figure" }, figure(run.latest.y)), el("td", { class: "figure" }, kimg(run.latest.x)),
      el("td", { class: `figure ${values.length > 1 && run.best && run.best.y === winner ? "winner" : ""}` }, run.best ? figure(run.best.y) : "\u2013"),
      el("td", { class: "figure" }, run.best ? kimg(run.best.x) : "\u2013"), el("td", { class: "mono network" }, run.best ? run.best.network : "\u2013")));
  });
  const table = el("div", { class: "card scroll" }, el("table", { id: "metrics" },
    el("thead", {}, el("tr", {}, el("th", {}, "Metric"), several() && el("th", {}, "Run"), el("th", { class: "figure" }, "Latest"), el("th", { class: "figure" }, "at kimg"),
      el("th", { class: "figure" }, "Best"), el("th", { class: "figure" }, "at kimg"), el("th", {}, "Best network"))), el("tbody", {}, rows)));
  const made = report.metrics.map((metric) => {
    const series = metric.runs.flatMap((run, number) => !run ? [] : (several() ? metric.results.slice(0, 1) : metric.results).map((result, i) => ({
      ...run.curves[result], name: several() ? report.runs[number].name : result,
      switch: several() ? `run ${number}` : `${metric.metric} ${result}`, color: color(several() ? number : i), thin: i > 0,
      best: i === 0 && run.best ? { x: run.best.x, y: run.best.y, label: several() ? "" : `best ${figure(run.best.y)} at ${kimg(run.best.x)}` } : null,
    })));
    return add(shared, {
      key: `metric ${metric.metric} ${JSON.stringify(metric.settings)}`, title: metric.metric,
      unit: metric.differs || (metric.best ? `${metric.best} is best` : ""), dots: true, series,
    });
  });
  return el("section", {}, el("h2", {}, "Metrics"), table, el("div", { class: "charts", style: "margin-top: 16px" }, made));
}

function comparison() {
  if (!several()) return null;
  const known = report.runs.filter((run) => run.config).length;
  const body = report.differences.length
    ? el("div", { class: "card scroll" }, el("table", { id: "differences" },
      el("thead", {}, el("tr", {}, el("th", {}, "Option"), report.runs.map((run, number) => el("th", {}, runName(run, number))))),
      el("tbody", {}, report.differences.map((row) => el("tr", {}, el("th", { class: "mono" }, row.option),
        row.values.map((value) => el("td", { class: "mono" }, value === null ? "\u2013" : value)))))))
    : el("p", { class: "soft" }, known > 1 ? "The runs have the same settings." : "The settings of fewer than two runs are known.");
  return el("section", {}, el("h2", {}, "Differences of settings"), body);
}

function add(shared, spec) {
  const events = report.runs.flatMap((run) => run.events.map((event) => ({ x: event.x, text: several() ? `${run.name}: ${event.text}` : event.text })));
  const chart = new Chart({ events, ...spec }, shared);
  charts.push(chart);
  return chart.element;
}

/** Tell whether curves are one number throughout. */
function constant(found) {
  const all = found.flatMap((curve) => curve.y);
  return found.every((curve) => curve.y.length > 2) && all[0] !== null && all.every((value) => value === all[0]);
}

function curves(shared) {
  const still = [], blocks = [];
  for (const group of report.groups) {
    const of = (key) => report.runs.map((run, number) => ({ number, curve: Object.hasOwn(run.curves, key) ? run.curves[key] : null })).filter((one) => one.curve);
    const keys = group.keys.filter((key) => {
      if (!constant(of(key).map((one) => one.curve))) return true;
      still.push(`${key} ${figure(of(key)[0].curve.y[0])}`);
      return false;
    });
    if (!keys.length) continue;
    const short = shortNames(keys);
    if (several()) {
      blocks.push(el("h4", {}, group.title), el("div", { class: "charts" }, keys.map((key, i) => add(shared, {
        key, title: short[i], unit: group.unit,
        series: of(key).map(({ number, curve }) => ({ ...curve, name: report.runs[number].name, switch: `run ${number}`, color: color(number), dash: dash(number) })),
      }))));
    } else {
      blocks.push(add(shared, {
        key: group.title, title: group.title, unit: group.unit,
        series: keys.map((key, i) => ({ ...of(key)[0].curve, name: short[i], switch: key, title: key, color: color(i), dash: dash(i) })),
      }));
    }
  }
  const level = el("output", { for: "smoothing" });
  const say = () => { level.textContent = memory.smoothing ? `over ${figure(memory.smoothing ** 2 * MAX_SMOOTHING * 100, 2)} % of it` : "off"; };
  say();
  const tools = el("div", { class: "toolbar" },
    el("label", {}, "Smoothing", el("input", {
      type: "range", id: "smoothing", min: 0, max: 1, step: 0.02, value: memory.smoothing,
      input: (event) => { memory.smoothing = Number(event.target.value); say(); for (const chart of charts) chart.draw(); },
    }), level),
    el("button", { id: "all-log", click: () => everywhere(true) }, "all log"), el("button", { id: "all-linear", click: () => everywhere(false) }, "all linear"),
    el("button", { id: "unzoom", hidden: !memory.zoom, click: () => shared.onZoom(null) }, "whole run"),
    el("span", {}, "Drag to zoom; click to see the images of that moment."));
  const body = blocks.length ? (several() ? el("div", {}, blocks) : el("div", { class: "charts" }, blocks)) : el("p", { class: "soft" }, "No statistics yet.");
  return el("section", {}, el("h2", {}, "Curves"), blocks.length ? tools : null, body,
    still.length ? el("p", { class: "soft small path", id: "constant", style: "margin-top: 14px" }, `The same throughout: ${still.join(", ")}.`) : null);
}

function everywhere(logarithmic) {
  for (const chart of charts) {
    if (logarithmic) memory.logarithmic.add(chart.spec.key); else memory.logarithmic.delete(chart.spec.key);
  }
  render();
}

/** Leave out of keys what is the same at the beginning of all of them, and at their ends if two parts are left. */
function shortNames(keys) {
  const parts = keys.map((key) => key.split("/"));
  if (keys.length === 1) return [parts[0].slice(1).join("/") || keys[0]];
  let first = 0, last = 0;
  const least = Math.min(...parts.map((part) => part.length));
  while (first < least - 1 && parts.every((part) => part[first] === parts[0][first])) first++;
  while (last < least - first - 2 && parts.every((part) => part[part.length - 1 - last] === parts[0][parts[0].length - 1 - last])) last++;
  return parts.map((part) => part.slice(first, part.length - last).join("/"));
}

function texts(title, kind, text, what) {
  const found = report.runs.filter((run) => text(run));
  if (!found.length) return null;
  return el("section", {}, el("h2", {}, title), found.map((run) => {
    const key = `${kind} ${run.name}`;
    const pre = el("pre", { class: kind }, text(run));
    return el("details", {
      open: memory.open.has(key),
      toggle: (event) => { if (event.target.open) { memory.open.add(key); pre.scrollTop = kind === "log" ? pre.scrollHeight : 0; } else memory.open.delete(key); },
    }, el("summary", {}, several() ? `${run.name} ` : "", el("span", { class: "soft" }, what)), pre);
  }));
}

function notice(text) {
  const box = document.getElementById("notice");
  box.textContent = text;
  box.hidden = !text;
}

/** Ask the server for what is new, and show it where nobody is in the middle of something. */
async function poll() {
  const marked = window.getSelection();
  const busy = pressed || document.hidden || (marked && !marked.isCollapsed) || (viewer && viewer.dialog.open);
  try {
    const answer = await (await fetch("version.json", { cache: "no-store" })).json();
    notice(answer.problem || "");
    if (answer.version !== report.made && !busy) {
      const fresh = await (await fetch("data.json", { cache: "no-store" })).json();
      const focused = document.activeElement && document.activeElement.id, top = window.scrollY;
      report = fresh;
      render();
      if (focused && document.getElementById(focused)) document.getElementById(focused).focus({ preventScroll: true });
      window.scrollTo(0, top);
    }
  } catch {
    notice("The server is gone; this page shows what it said last.");
  }
  setTimeout(poll, POLL_MS);
}

document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement && event.target.id !== "moment";
  if (event.altKey || event.ctrlKey || event.metaKey || typing) return;
  if ((event.key === "Home" || event.key === "End") && event.target.id !== "moment") return;  // those scroll
  if (viewer.key(event.key)) event.preventDefault();
});
document.addEventListener("pointerdown", () => { pressed = true; });
for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { pressed = false; });

render();
if (report.live) setTimeout(poll, POLL_MS);
