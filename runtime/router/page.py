"""The page at /: ranks, load, decisions, expected and served LAR of the last hour, drawn anew every
two seconds from /semmoe/status. One file: no script, font or picture from elsewhere.
"""

CONTENT_SECURITY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>semmoe route</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1f; --muted: #66666e; --line: #d9d9de; --paper: #fff; --a: #1f6fb2; --b: #c2571a;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --muted: #a0a0aa; --line: #3a3a42; --paper: #17171b; --a: #6db3ee; --b: #f0a16b; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 1.8rem 0 .4rem; } .muted { color: var(--muted); }
.bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); } th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child { text-align: left; } .words td, .words th { text-align: left; }
.bar { display: inline-block; height: .7rem; background: var(--a); vertical-align: middle; } svg { width: 100%; height: 12rem; }
.numbers { display: flex; flex-wrap: wrap; gap: 2rem; margin: 1rem 0; } .numbers b { display: block; font-size: 1.5rem; }
#finding { border-left: 4px solid var(--bad); padding: .4rem .8rem; } .key::before { content: ''; display: inline-block; width: 1rem;
  height: .2rem; margin-right: .4rem; vertical-align: middle; background: currentColor; } .ka { color: var(--a); } .kb { color: var(--b); }
</style></head><body>
<h1>semmoe route</h1><p id="about" class="muted"></p><p id="state" role="status"></p><p id="finding" hidden></p>
<div class="numbers" id="numbers"></div>
<h2>Local activations, last hour</h2><p><span class="key ka">expected</span> &nbsp; <span class="key kb">served</span></p>
<svg id="lar" viewBox="0 0 600 160" preserveAspectRatio="none" role="img" aria-label="expected and served LAR by minute"></svg>
<h2>Ranks</h2><table><thead><tr><th>rank</th><th>requests</th><th>in flight</th><th>tokens in flight</th><th></th></tr></thead>
<tbody id="ranks"></tbody></table>
<h2>Upstreams</h2><table class="words"><thead><tr><th>URL</th><th>state</th><th>in flight</th><th>errors</th></tr></thead>
<tbody id="upstreams"></tbody></table>
<h2>Decisions</h2><table><thead><tr><th>decision</th><th>requests</th><th>share</th></tr></thead><tbody id="decisions"></tbody></table>
<h2>Also counted</h2><table class="words"><tbody id="counts"></tbody></table>
<script>
"use strict";
const at = id => document.getElementById(id);
const row = cells => { const tr = document.createElement("tr");
  for (const cell of cells) { const td = document.createElement("td");
    if (cell instanceof Node) td.append(cell); else td.textContent = cell; tr.append(td); } return tr; };
const fill = (id, rows) => at(id).replaceChildren(...rows.map(row));
const percent = value => value === null ? "-" : (100 * value).toFixed(1) + " %";
const listed = counts => Object.entries(counts).map(([k, n]) => k + " " + n).join(", ") || "none";
function number(name, value) { const div = document.createElement("div"), b = document.createElement("b");
  b.textContent = value; div.append(b, name); return div; }
function bar(share) { const span = document.createElement("span"); span.className = "bar";
  span.style.width = 12 * share + "rem"; return span; }
function line(minutes, key, color) {
  const points = minutes.filter(m => m[key] !== null).map(m => (600 - 10 * m.ago) + "," + (155 - 150 * m[key]).toFixed(1));
  const path = document.createElementNS("http://www.w3.org/2000/svg", points.length > 1 ? "polyline" : "circle");
  if (points.length > 1) path.setAttribute("points", points.join(" "));
  else if (points.length) {
    const [x, y] = points[0].split(","); path.setAttribute("cx", x - 4); path.setAttribute("cy", y); path.setAttribute("r", 3); }
  path.setAttribute("fill", points.length > 1 ? "none" : color); path.setAttribute("stroke", color); path.setAttribute("stroke-width", 2);
  path.setAttribute("vector-effect", "non-scaling-stroke"); return path; }
function show(s) {
  at("about").textContent = [s.plan, s.engine, s.ranks.length + " ranks", "band " + s.band].join(" \\u00b7 ");
  at("state").textContent = s.draining ? "draining" : s.ready ? "in service" : "no upstream is in service";
  at("state").className = s.ready ? "muted" : "bad";
  at("finding").hidden = !s.finding; at("finding").textContent = s.finding || "";
  const sum = counts => Object.values(counts).reduce((a, b) => a + b, 0), all = sum(s.decisions);
  at("numbers").replaceChildren(number("requests", all), number("in flight", s.upstreams.reduce((a, u) => a + u.in_flight, 0)),
    number("expected at home", percent(s.expected_lar)), number("served at home", percent(s.served_lar)));
  at("lar").replaceChildren(line(s.minutes, "expected", "var(--a)"), line(s.minutes, "served", "var(--b)"));
  const most = Math.max(1, ...s.ranks.map(r => r.tokens));
  fill("ranks", s.ranks.map(r => [r.rank + (r.up ? "" : " (out)"), r.requests, r.in_flight, r.tokens, bar(r.tokens / most)]));
  fill("upstreams", s.upstreams.map(u => [u.url, u.up ? "in service" : "out, probed", u.in_flight, listed(u.errors)]));
  fill("decisions", Object.entries(s.decisions).map(([name, n]) => [name, n, percent(all ? n / all : null)]));
  fill("counts", [["prompts without ids", listed(s.unknown)], ["refused", listed(s.refused)], ["sent again", listed(s.retries)],
    ["answers", listed(s.ends)], ["recorded", listed(s.recorded)], ["left to the engine", s.unpinned]]);
}
async function draw() {
  try { show(await (await fetch("semmoe/status")).json()); }
  catch (error) { at("state").textContent = "the router does not answer"; at("state").className = "bad"; }
  setTimeout(draw, 2000);
}
draw();
</script></body></html>
"""
