"""How the page looks."""

CSS = """
:root {
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2125; --soft: #5c646c; --faint: #8b939b; --line: #e4e2dd;
  --best: #0b6e5f; --best-soft: #0b6e5f26; --other: #a9b1b8; --half: #c9ced3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e8eaec; --soft: #a7afb7; --faint: #7d858d; --line: #2d3238;
    --best: #4fc3ad; --best-soft: #4fc3ad2e; --other: #66707a; --half: #4a525a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 800px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; line-height: 1.3; margin: 48px 0 4px; overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 32px 0 2px; }
p { margin: 0 0 14px; color: var(--soft); overflow-wrap: anywhere; }
.note { font-size: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px; margin: 22px 0; }
.card p:last-child { margin-bottom: 0; }
.card h2 { margin-top: 0; }
.card code + p { margin-top: 12px; }
.figures { display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 14px 0 16px; padding: 0; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dt { font-size: 13px; color: var(--soft); }
.figures dd { margin: 0; font-size: 26px; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures div:first-child dd { color: var(--best); }
code {
  display: block; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--ink);
  background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; -webkit-user-select: all; cursor: copy;
}
code span { white-space: nowrap; }
ol.sizes { list-style: none; margin: 14px 0 0; padding: 0; }
ol.sizes li { margin: 0 0 14px; }
ol.sizes span { font-variant-numeric: tabular-nums; }
ol.sizes .size { font-weight: 600; }
ol.sizes .mark { color: var(--best); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 10px 0; }
th, td { text-align: right; padding: 5px 0 5px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
td:first-child, td:nth-child(7) { white-space: normal; overflow-wrap: anywhere; }
tr.best td:first-child { color: var(--best); font-weight: 600; }
details { border-top: 1px solid var(--line); margin-top: 20px; }
summary { cursor: pointer; padding: 12px 0; font-weight: 600; overflow-wrap: anywhere; }
summary span { font-weight: 400; color: var(--soft); }
svg { display: block; width: 100%; height: auto; margin: 8px 0 0; overflow: visible; }
svg text { font-family: inherit; font-size: 12px; fill: var(--ink); }
svg .label { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
svg .tick { fill: var(--soft); }
svg .faint { fill: var(--faint); font-size: 11px; }
svg .group { fill: var(--soft); font-weight: 600; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .value { font-variant-numeric: tabular-nums; fill: var(--soft); }
svg .best-label { font-weight: 600; fill: var(--best); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--faint); }
svg .leader { stroke: var(--other); stroke-width: .75; }
svg .front { fill: none; stroke: var(--best); stroke-width: 1.5; stroke-dasharray: 1 3; stroke-linecap: round; }
svg .best { fill: var(--best); stroke: var(--paper); }
svg .other { fill: var(--other); stroke: var(--paper); }
svg .ring { fill: none; stroke: var(--best); stroke-width: 1.5; }
svg .bar { fill: var(--other); }
svg .bar.chosen { fill: var(--best); }
svg .cut { fill: var(--paper); }
svg .whisker { stroke: var(--other); stroke-width: 1.5; }
svg .whisker.chosen { stroke: var(--best); }
svg .half { fill: var(--half); }
svg .half.chosen { fill: var(--best); fill-opacity: .45; }
svg .median { stroke: var(--ink); stroke-width: 2; }
svg .worst { fill: none; stroke: var(--soft); }
svg .beyond { fill: var(--soft); }
.narrow { display: none; }
.narrow svg { max-width: 440px; }
@media (max-width: 799px) {
  main { padding-top: 24px; }
  .wide, .wide-cell { display: none; }
  .narrow { display: block; }
  .card { padding: 16px; }
  th, td { padding-left: 8px; }
  .figures { gap: 10px 24px; }
  .figures dd { font-size: 21px; }
}
@media print { details > * { display: block; } }
"""
