// From the document of /stats to the page. Everything is set as text, never as HTML: names come from clients.

import { Chart } from "/ui/chart.js";

export const SPAN_S = 300;

const at = (id) => document.getElementById(id);
const write = (id, text) => { at(id).textContent = text; };

function node(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// -- values in words

const number = (v) => {
  if (v == null) return "–";
  if (Number.isInteger(v) || v >= 100) return Math.round(v).toLocaleString("en");
  return String(+v.toPrecision(v >= 10 ? 3 : 2));
};
const percent = (v) => (v == null ? "–" : `${number(v * 100)} %`);

function seconds(s) {
  if (s == null) return "–";
  if (s === 0) return "0";
  if (s < 1) return `${+(s * 1000).toPrecision(3)} ms`;
  if (s < 120) return `${+s.toPrecision(3)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

const words = (name) => name.replaceAll("_", " ");
const plural = (n, one) => `${number(n)} ${one}${n === 1 ? "" : "s"}`;

// -- parts

function bar(id, value, bound) {
  fill(at(id), value, bound);
  at(id).parentElement.hidden = bound == null;
}

function fill(inner, value, bound) {
  inner.style.width = `${Math.min(100, bound ? (100 * value) / bound : value ? 100 : 0)}%`;
  inner.classList.toggle("full", bound != null && value >= bound);
}

function ofBound(id, value, bound) {
  at(id).replaceChildren(number(value), node("small", "", bound == null ? " no bound" : ` of ${number(bound)}`));
}

function rows(id, made, columns, none) {
  const empty = node("td", "none", none);
  empty.colSpan = columns;
  at(id).replaceChildren(...(made.length ? made : [node("tr", "", empty)]));
}

function row(name, ...cells) {
  const head = node("th", "left", name);
  head.scope = "row";
  return node("tr", "", head, ...cells.map((cell) => (cell instanceof Node ? cell : node("td", "", cell))));
}

function facts(id, table, none) {
  const entries = Object.entries(table).filter(([, value]) => value != null && value !== "");
  at(id).replaceChildren(...entries.flatMap(([name, value]) => [node("dt", "", words(name)), node("dd", "", value)]));
  if (!entries.length) at(id).replaceChildren(node("dd", "", none));
}

function cards(stats) {
  const { limits, last_minute: minute, recent, ttft_s: ttft, latency_s: latency } = stats;
  ofBound("in-flight", stats.in_flight, stats.capacity);
  bar("in-flight-bar", stats.in_flight, stats.capacity);
  write("in-flight-note", stats.oldest_in_flight_s == null ? "idle" : `the oldest for ${seconds(stats.oldest_in_flight_s)}`);
  ofBound("queued", stats.queued, limits.max_queue);
  bar("queued-bar", stats.queued, limits.max_queue);
  write("queued-note", stats.retry_after_s == null ? "" : `a refused client is told to wait ${seconds(stats.retry_after_s)}`);
  write("rate", number(minute.requests_per_s));
  write("rate-note", `${number(minute.ok_per_s)} ok · ${number(minute.refused_per_s)} refused · ${number(minute.output_tokens_per_s)} tokens/s, over the last minute`);
  write("refused", percent(recent.refusal_rate));
  write("refused-note", `over five minutes; ${number(stats.refused)} since the start`);
  write("ttft", seconds(ttft.p50));
  write("ttft-note", `median · p95 ${seconds(ttft.p95)} · p99 ${seconds(ttft.p99)}`);
  write("latency", seconds(latency.mean));
  write("latency-note", `mean · p50 ${seconds(latency.p50)} · p95 ${seconds(latency.p95)} · p99 ${seconds(latency.p99)}`);
}

// The four figures that the deployment guide says to watch.
function thresholds(stats) {
  const kv = stats.upstreams.map((upstream) => upstream.kv_use).filter((use) => use != null);
  const memory = kv.length ? Math.max(...kv) : stats.resources.gpu?.memory;
  const source = kv.length ? "KV cache of the fullest upstream" : memory == null ? "neither is known to this gate" : "memory of this machine's fullest GPU";
  const told = [
    ["GPU memory or KV cache", "显存或 KV 缓存", memory, 0.9, percent, source],
    ["Queue length", "请求队列长度", stats.queued, 5, number, "waiting now"],
    ["Failures", "请求失败率", stats.admitted ? stats.recent.error_rate : null, 0.01, percent, `over five minutes; ${percent(stats.error_rate)} since the start`],
    ["Mean response time", "平均响应时间", stats.latency_s.mean, 5, seconds, "over five minutes"],
  ];
  at("thresholds").replaceChildren(...told.map(([name, zh, value, limit, show, note]) => {
    const tone = value == null ? "" : value < limit ? "good" : "warn";
    const word = { "": "not known · 未知", good: "✓ OK · 正常", warn: "▲ too high · 超标" }[tone];
    const chinese = node("span", "", ` · ${zh}`);
    chinese.lang = "zh";
    return node("div", `threshold ${tone}`,
      node("h3", "", name, chinese),
      node("p", "value", show(value), node("span", "", word)),
      node("p", "", `below ${show(limit)}; ${note}`));
  }));
}

const TONES = { up: "good", down: "bad", "open circuit": "bad" };

function upstreams(stats) {
  rows("upstreams", stats.upstreams.map((upstream) => {
    const inner = node("i");
    fill(inner, upstream.in_flight, upstream.limit);
    const load = node("td", "left", node("div", "bar", inner), `${number(upstream.in_flight)} / ${upstream.limit == null ? "∞" : number(upstream.limit)}`);
    const state = node("td", "left", node("span", `word ${TONES[upstream.state] ?? "warn"}`, upstream.state));
    if (upstream.reason) state.append(node("small", "", upstream.reason));
    const set = upstream.configured_limit == null ? "none" : number(upstream.configured_limit);
    return row(upstream.name, state, load, set, number(upstream.weight), percent(upstream.kv_use),
      number(upstream.requests), number(upstream.failed), number(upstream.output_tokens));
  }), 9, "No upstream.");
}

function tables(stats) {
  const ended = Object.values(stats.outcomes).reduce((sum, count) => sum + count, 0);
  const met = Object.entries(stats.outcomes).filter(([, count]) => count);
  rows("outcomes", met.map(([name, count]) => row(words(name), number(count), percent(count / ended))), 3, "Nothing has ended yet.");
  write("outcomes-note", `${number(stats.received)} received = ${number(ended)} ended + ${number(stats.in_flight)} in flight + ${number(stats.queued)} queued.`);
  const kinds = { "Time to first token": stats.ttft_s, "Response time": stats.latency_s, "Wait in the queue": stats.queue_wait_s };
  rows("latencies", Object.entries(kinds).map(([name, kind]) =>
    row(name, ...["mean", "p50", "p95", "p99"].map((key) => seconds(kind[key])), number(kind.n))), 6, "");
  const { busiest, span_s } = stats.clients;
  rows("clients", busiest.map((client) => row(client.client, number(client.requests), number(client.ok),
    number(client.refused), number(client.failed), number(client.output_tokens))), 6, "No client yet.");
  write("clients-note", `By requests that ended in the last ${seconds(span_s)}; at most twenty are shown.`);
}

function settings(stats) {
  const { cpu, memory, gpu } = stats.resources;
  facts("resources", {
    "Processor": percent(cpu), "Memory": percent(memory),
    "GPU": gpu ? `memory ${percent(gpu.memory)}, busy ${percent(gpu.use)}` : "none",
  }, "");
  const { per_client: quotas, ...limits } = stats.limits;
  const named = Object.fromEntries(Object.entries(quotas ?? {}).map(([key, value]) => [`${key} (per client)`, value]));
  const shown = Object.entries({ ...limits, ...named }).map(([key, value]) => [key, value == null ? null : number(value)]);
  facts("limits", Object.fromEntries(shown), "No bound at all.");
  const { level: levels, ...evidence } = stats.evidence ?? {};
  const plain = Object.fromEntries(Object.entries(evidence).map(([key, value]) => [key, value == null ? null : String(value)]));
  if (levels?.length) plain.measured_at_concurrency = levels.map((level) => level.concurrency).join(", ");
  facts("evidence", plain, "None: these limits were written by hand or are the defaults.");
}

// -- charts

const CHARTS = [
  { title: "In flight and queue", zh: "并发与队列", show: number, least: 4, curves: [
    { key: "capacity", label: "capacity", tone: "mark" }, { key: "in_flight", label: "in flight", tone: "first" },
    { key: "queued", label: "queued", tone: "second" }] },
  { title: "Requests per second", zh: "每秒请求", show: number, least: 1, curves: [
    { key: "received", label: "received", tone: "first" }, { key: "refused", label: "refused", tone: "second" },
    { key: "failed", label: "failed", tone: "third" }] },
  { title: "Time to first token", zh: "首 token 延迟", show: seconds, least: 0.01, curves: [
    { key: "ttft_p50", label: "p50", tone: "first" }, { key: "ttft_p99", label: "p99", tone: "third" }] },
  { title: "Response time", zh: "响应时间", show: seconds, least: 0.01, curves: [
    { key: "latency_p50", label: "p50", tone: "first" }, { key: "latency_p99", label: "p99", tone: "third" }] },
];

export class View {
  constructor() {
    this.points = [];
    this.last = null;
    this.charts = CHARTS.map((chart) => new Chart(chart, SPAN_S));
    at("charts").append(...this.charts.map((chart) => chart.figure));
    write("address", location.host);
  }

  show(stats, nowS) {
    at("figures").hidden = false;
    write("version", stats.version);
    write("uptime", seconds(stats.uptime_s));
    write("received", plural(stats.received, "request"));
    at("warnings").hidden = !stats.warnings.length;
    at("warnings").replaceChildren(...stats.warnings.map((warning) => node("li", "", warning)));
    cards(stats);
    thresholds(stats);
    upstreams(stats);
    tables(stats);
    settings(stats);
    this.keep(stats, nowS);
    for (const chart of this.charts) chart.update(this.points);
  }

  // Rates are differences of two answers, over the gate's own clock; a gate that was started again has none at first.
  keep(stats, nowS) {
    const passedS = this.last ? stats.uptime_s - this.last.uptime_s : 0;
    const rate = (key) => (passedS > 0 ? Math.max(0, stats[key] - this.last[key]) / passedS : null);
    this.points.push({
      atS: nowS, in_flight: stats.in_flight, queued: stats.queued, capacity: stats.capacity,
      received: rate("received"), refused: rate("refused"), failed: rate("failed"),
      ttft_p50: stats.ttft_s.p50, ttft_p99: stats.ttft_s.p99,
      latency_p50: stats.latency_s.p50, latency_p99: stats.latency_s.p99,
    });
    while (this.points[0].atS < nowS - SPAN_S) this.points.shift();
    this.last = stats;
  }
}
