"""How a report looks: light or dark as the reader has it, on a phone, a desk and paper.

The colours of models (`--m0` and on) are told apart by people who see fewer of them, and each has its own shape of mark besides.
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #fff; --text: #1c2126; --muted: #545d67; --line: #d8dde3; --tint: #f3f5f8; --tint2: #e8ecf1; --accent: #1559ad;
  --good: #0f6b3c; --bad: #b3261e; --plate: #fff;
  --m0: #4a5560; --m1: #b8500f; --m2: #1763b8; --m3: #7a3f98; --m4: #0b7a68; --m5: #8a6400; --m6: #b02a5e; --m7: #3d6e1a }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --text: #e9ecef; --muted: #a9b2bc; --line: #353c44; --tint: #1c2025; --tint2: #262c33; --accent: #8bbcf5;
  --good: #6fd39b; --bad: #ff8f85; --plate: #14171b;
  --m0: #b3bdc7; --m1: #f29a5c; --m2: #74b2f5; --m3: #cb9be6; --m4: #50c8b0; --m5: #ddb84e; --m6: #f584ad; --m7: #9ccc6b } }
* { box-sizing: border-box }
html { scroll-padding-top: 12px; -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 1440px; padding: 0 16px 48px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; overflow-wrap: anywhere }
header { padding: 28px 0 8px }
h1 { font-size: 26px; line-height: 1.2; margin: 0 }
h2 { font-size: 20px; line-height: 1.25; margin: 0 0 4px }
h3 { font-size: 15px; margin: 20px 0 6px }
p { margin: 6px 0; max-width: 75ch }
a { color: var(--accent) }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px }
main:focus { outline: none }
.skip { position: absolute; left: -9999px }
.skip:focus { left: 12px; top: 8px; padding: 8px 14px; background: var(--page); border: 1px solid var(--accent); z-index: 2 }
.about, .note, .missing { color: var(--muted); font-size: 13.5px }
.about { max-width: none; margin: 4px 0 0 }
.lead { color: var(--muted); margin-bottom: 14px }
.verdict { font-size: 18px; line-height: 1.45; margin: 8px 0 4px; padding: 14px 18px; border-left: 4px solid var(--accent);
  background: var(--tint); border-radius: 0 8px 8px 0; max-width: none }
.good { color: var(--good) }
.bad { color: var(--bad); font-weight: 600 }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 16px; padding: 0; font-size: 14px }
nav a { display: inline-block; padding: 4px 0 }
section { padding: 34px 0 6px }
section + section { border-top: 1px solid var(--line); margin-top: 26px }
.missing { padding-left: 18px }

.scroll { overflow: auto; border: 1px solid var(--line); border-radius: 8px; margin: 10px 0 }
.tall { max-height: 70vh }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 10px; text-align: left; vertical-align: top; white-space: nowrap; border-bottom: 1px solid var(--line) }
tbody tr:last-child > * { border-bottom: 0 }
thead th { color: var(--muted); font-weight: 600; font-size: 12.5px; line-height: 1.3; vertical-align: bottom; background: var(--tint);
  position: sticky; top: 0; white-space: normal; overflow-wrap: normal }
tbody th { font-weight: 600 }
tr > :first-child { position: sticky; left: 0; background: var(--page); z-index: 1 }
thead tr > :first-child { background: var(--tint); z-index: 2 }
.number { text-align: right }
small { display: block; color: var(--muted); font-weight: 400; font-size: 12px }
#measured td { white-space: normal }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0 0 14px; font-size: 14px }
dt { color: var(--muted) }
dd { margin: 0 }
details { margin: 10px 0 }
summary { cursor: pointer; color: var(--accent); padding: 4px 0; width: fit-content; max-width: 100% }
.phases { margin: 6px 0 12px; padding-left: 22px; font-size: 14px }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 22px 26px; margin: 16px 0;
  align-items: start }
.pictures { display: grid; gap: 16px 12px; align-items: start; grid-template-columns:
  repeat(auto-fill, minmax(max(145px, min(250px, (100% - (var(--n) - 1) * 12px) / var(--n))), 1fr)) }
.pictures p { font-size: 12.5px; color: var(--muted); margin: 4px 0; line-height: 1.35 }
figure { margin: 0; min-width: 0 }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 6px; line-height: 1.35 }
.chart { display: block; width: 100%; height: auto; overflow: visible }
.key { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 6px 0; padding: 0; font-size: 13px }
.key svg { vertical-align: -2px }
.chart text { font-size: 11px; fill: var(--text) }
.chart .tick, .chart .label { fill: var(--muted) }
.chart .label { font-size: 11px }
.chart .group { font-weight: 600; fill: var(--muted) }
.chart .end { fill: var(--c); font-weight: 600 }
.chart .on-part { fill: var(--page); font-weight: 600 }
.grid { stroke: var(--line); stroke-width: 1 }
.axis { stroke: var(--muted); stroke-width: 1 }
.border { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 3 3 }
.band0 { fill: none }
.band1 { fill: var(--tint2) }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round }
.mark { fill: var(--c); stroke: var(--page); stroke-width: .8 }
.part { fill: var(--c) }

.picture { display: block; width: 100%; height: auto; border-radius: 6px }
.heat .pixels { filter: grayscale(1) opacity(.55) }
.cell { stroke: #fff; stroke-width: .5; stroke-opacity: .7 }
.box-right, .box-wrong, .box-missed, .box-truth { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.box-right { stroke: #35c26b }
.box-wrong { stroke: #ff7a1a; stroke-dasharray: 6 3 }
.box-missed { stroke: #ff3d6e; stroke-dasharray: 2 3 }
.box-truth { stroke: #fff }
.plate { stroke: none }
.plate.box-right { fill: #0e5a2d }
.plate.box-wrong { fill: #8a3a00 }
.plate.box-truth { fill: #222 }
.plate-text { fill: #fff; font-weight: 600; font-family: system-ui, sans-serif }
.found { font-size: 12.5px; line-height: 1.4; margin: 6px 0; padding-left: 24px; color: var(--muted) }
.found b { font-weight: 600; color: var(--text) }
.found .wrong i { color: var(--bad); font-style: normal }
.found .right { color: var(--text) }
.key .box-truth { stroke: var(--text) }
.scales { display: flex; flex-wrap: wrap; gap: 4px 26px; font-size: 13px; color: var(--muted); margin: 14px 0 0; max-width: none }
.scales i { display: inline-block; width: 110px; height: 11px; border-radius: 3px; vertical-align: -1px; margin: 0 4px }
.graph { max-height: 80vh; background: var(--page) }
.graph svg { display: block; margin: 0 auto; font-size: 13px }

@media (min-width: 1180px) {
  body { display: grid; grid-template-columns: 210px minmax(0, 1fr); column-gap: 40px; padding: 0 28px 60px }
  header { grid-column: 1 / -1 }
  nav ol { position: sticky; top: 18px; flex-direction: column; gap: 2px; margin-top: 12px }
}
@media (max-width: 480px) {
  h1 { font-size: 22px }
  .verdict { font-size: 16.5px; padding: 12px 14px }
  th, td { padding: 6px 9px }
  tbody th { white-space: normal; min-width: 9.5em }
  dl { grid-template-columns: 1fr }
  dd { margin-bottom: 6px }
}
@media print {
  nav, .skip { display: none }
  body { display: block; max-width: none; font-size: 11pt }
  .scroll, .tall, .graph { max-height: none; overflow: visible; border: 0 }
  .graph svg { max-width: 100%; height: auto }
  table { font-size: 8.5pt }
  small { font-size: 7.5pt }
  th, td { padding: 3px 4px }
  th, td:not(.number) { white-space: normal }
  tr > :first-child, thead th { position: static }
  figure, tr { break-inside: avoid }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""
