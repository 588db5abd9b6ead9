// Asks /stats about once a second while the page is seen, and says plainly when no answer comes.

import { View } from "/ui/view.js";

const PERIOD_MS = 1000;
const PATIENCE_MS = 5000;
const KEPT = "loadstone-admin-key";

const at = (id) => document.getElementById(id);
const view = new View();
let asking = false, waitsForKey = false, timer = 0, answeredMs = 0;

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

function wantKey() {
  at("key-refused").hidden = !sessionStorage.getItem(KEPT);
  sessionStorage.removeItem(KEPT);
  waitsForKey = true;
  at("notice").hidden = true;
  at("figures").hidden = true;
  at("key-form").hidden = false;
  state("locked", "warn");
  at("key").focus();
}

// { stats }, { missed: why } or { locked: true }.
async function ask() {
  const key = sessionStorage.getItem(KEPT);
  try {
    const reply = await fetch("/stats", {
      headers: key ? { "X-Loadstone-Admin": key } : {}, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (reply.status === 401 || reply.status === 403) return { locked: true };
    return reply.ok ? { stats: await reply.json() } : { missed: `/stats gave status ${reply.status}` };
  } catch (error) {
    return { missed: error.name === "TimeoutError" ? `nothing within ${PATIENCE_MS / 1000} s` : error.message };
  }
}

async function poll() {
  clearTimeout(timer);
  if (asking || waitsForKey || document.hidden) return;
  asking = true;
  const answer = await ask();
  asking = false;
  timer = setTimeout(poll, PERIOD_MS);
  if (answer.locked) wantKey();
  else if (answer.missed) missed(answer.missed);
  else answered(answer.stats);
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEPT, at("key").value);
  at("key").value = "";
  at("key-form").hidden = true;
  waitsForKey = false;
  poll();
});
document.addEventListener("visibilitychange", poll);
poll();
