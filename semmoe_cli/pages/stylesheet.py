"""The style of a page: light and dark, phone and print. Percent signs are doubled, because colours
are put in."""

STYLE = """
:root { %(light)s --soft: #f4f6f8; --good: #00795a; --watch: #9a5b00; --bad: #b3261e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { %(dark)s --soft: #1d2127; --good: #3cc79a; --watch: #e6b450; --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { border-bottom: 1px solid var(--grid); padding-bottom: 1.5rem; }
.kicker { margin: 0 0 .4rem; color: var(--muted); font-size: .9rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; letter-spacing: -.01em; text-wrap: balance; overflow-wrap: anywhere; }
.level { display: inline-block; font-size: .8rem; font-weight: 600; padding: .12rem .6rem; border: 1px solid currentColor;
  border-radius: 1rem; margin-bottom: .8rem; }
.good { color: var(--good); } .watch { color: var(--watch); } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem 1.5rem; margin: 0; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; unicode-bidi: isolate; }
section { padding-top: 2.2rem; }
.lead { font-size: 1.02rem; max-width: 52rem; }
nav { margin: .9rem 0 0; font-size: .9rem; } nav a { color: var(--plan); margin-right: 1.2rem; }
.part { margin: 3rem 0 -1.2rem; max-width: none; font-size: .85rem; letter-spacing: .06em; text-transform: uppercase; color: var(--muted);
  border-top: 2px solid var(--grid); padding-top: .8rem; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem; margin: 1rem 0 .6rem; }
.tile { border: 1px solid var(--grid); border-radius: 8px; padding: .7rem .85rem; background: var(--soft); break-inside: avoid; }
.tile strong { display: block; font-size: 1.45rem; line-height: 1.2; font-weight: 650;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile strong.words { font-size: 1.1rem; } .tile span { color: var(--muted); font-size: .8rem; }
.tile small { display: block; color: var(--muted); font-size: .8rem; line-height: 1.35; margin-top: .25rem; }
.explorer .pick { margin: .4rem 0; }
.explorer select { font: inherit; color: var(--ink); background: var(--soft); border: 1px solid var(--grid); border-radius: 5px;
  padding: .1rem .4rem; }
.explorer .row { display: grid; grid-template-columns: 9rem 1fr; gap: .6rem; align-items: center; font-size: .8rem; margin: .12rem 0; }
.explorer .row span { overflow-wrap: anywhere; text-align: right; color: var(--muted); line-height: 1.15; }
svg.strip { display: block; width: 100%%; height: 1.05rem; background: var(--soft); } svg.strip rect { fill: var(--plan); }
.explorer .ranks rect { fill: var(--muted); } .explorer output { display: block; min-height: 1.5em; font-size: .875rem; }
h2 { font-size: 1.2rem; line-height: 1.35; margin: 0 0 .6rem; text-wrap: balance; }
h3 { font-size: .95rem; margin: 1.4rem 0 .35rem; }
p { margin: .5rem 0; max-width: 46rem; } .hint, figcaption { color: var(--muted); font-size: .875rem; }
figure { margin: 1rem 0 .5rem; overflow-x: auto; } figcaption { max-width: 46rem; }
svg.plot { display: block; width: 100%%; height: auto; } svg.narrow { display: none; }
svg.plot text { font-family: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .8rem 0; min-width: 60%%; }
th { text-align: right; font-weight: 600; color: var(--muted); font-size: .8rem; border-bottom: 1px solid var(--muted);
  vertical-align: bottom; }
td { text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; unicode-bidi: isolate; }
td.name { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 24rem; }
td small { color: var(--muted); font-size: .78rem; }
th, td { padding: .34rem .7rem .34rem 0; } td:last-child, th:last-child { padding-right: 0; }
th.name, td.name, .words th, .words td { text-align: left; }
td:not(.name) + .name, th:not(.name) + .name { padding-left: 1.6rem; }
.stacked td small { display: block; line-height: 1.2; } .stacked td { vertical-align: top; }
.words td { white-space: normal; vertical-align: top; } .words td:first-child { white-space: nowrap; }
td.best { font-weight: 650; } td.best::before { content: "\\2022\\00a0"; color: var(--plan); }
pre { background: var(--soft); border: 1px solid var(--grid); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--grid); color: var(--muted); font-size: .85rem; }
@media screen and (max-width: 40rem) { main { padding: 1.4rem .9rem 3rem; } h1 { font-size: 1.35rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  svg.broad { display: none; } svg.narrow { display: block; } .explorer .row { grid-template-columns: 1fr; gap: .05rem; }
  .explorer .row span { text-align: left; } }
@media (max-width: 56rem) { td small { display: block; line-height: 1.2; } td { vertical-align: top; } }
@media print { :root { %(light)s --soft: #f4f6f8; } body { font-size: 11pt; } main { max-width: none; padding: 0; }
  nav, .pick { display: none; } section { padding-top: 1.1rem; } .part { margin-top: 1.4rem; } .wide { overflow: visible; }
  table { font-size: 8pt; } th, td { padding-right: .4rem; } tr, figure, pre, .tiles { break-inside: avoid; }
  h2, h3 { break-inside: avoid; } h2, h3, .part { break-after: avoid; }
  svg.plot { max-height: 20rem; } header svg.plot { max-height: none; } }
"""
