// Asks /stats about once a second while the page is seen, and says plainly when no answer comes.

import { View } from "/ui/view.js";

const PERIOD_MS = 1000;
const PATIENCE_MS = 5000;

const at = (id) => document.getElementById(id);
const view = new View();
let asking = false, timer = 0, answeredMs = 0;

function state(word, tone) {
  at("state").textContent = word;
  at("state").className = `state ${tone}`;
}

function missed(reason) {
  const ago = answeredMs ? `has not answered for ${Math.round((Date.now() - answeredMs) / 1000)} s` : "does not answer";
  at("notice").textContent = `The gate ${ago}: ${reason}. Asking again every second.`;
  at("notice").hidden = false;
  document.body.classList.add("stale");
  state("no answer", "bad");
}

function answered(stats) {
  answeredMs = Date.now();
  at("notice").hidden = true;
  document.body.classList.remove("stale");
  const up = stats.upstreams.filter((upstream) => upstream.up).length;
  if (stats.draining) state("draining", "warn");
  else if (!up) state("no upstream is up", "bad");
  else if (up < stats.upstreams.length) state(`${up} of ${stats.upstreams.length} upstreams up`, "warn");
  else state("live", "good");
  document.title = `${stats.in_flight} in flight, ${stats.queued} queued · Loadstone gate`;
  view.show(stats, answeredMs / 1000);
}

// { stats } or { missed: why }. Where the gate wants its admin key the browser has asked for it before this page came.
async function ask() {
  try {
    const reply = await fetch(`${location.origin}/stats`, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    return reply.ok ? { stats: await reply.json() } : { missed: `/stats gave status ${reply.status}` };
  } catch (error) {
    return { missed: error.name === "TimeoutError" ? `nothing within ${PATIENCE_MS / 1000} s` : error.message };
  }
}

async function poll() {
  clearTimeout(timer);
  if (asking || document.hidden) return;
  asking = true;
  const answer = await ask();
  asking = false;
  timer = setTimeout(poll, PERIOD_MS);
  if (answer.missed) missed(answer.missed);
  else answered(answer.stats);
}

document.addEventListener("visibilitychange", poll);
poll();
