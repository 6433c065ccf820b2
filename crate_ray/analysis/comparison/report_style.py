"""How the HTML report looks: from 360 pixels on, in light and dark, on paper.

In: nothing. Out: a style sheet. Colours of the families are the same in both schemes, so that a picture means the same in each;
the rest are variables, which the pictures use as well.
"""

STYLE = """\
:root {
  --font: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  --paper: #ffffff; --ink: #1f2328; --muted: #59636e; --grid: #e6e6e6; --raised: #f4f5f7; --link: #0550ae;
  --urgent: #9a3b00; --urgent-paper: #fff4ec;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e7eaee; --muted: #a1abb6; --grid: #343a42; --raised: #1f242a; --link: #79b8ff;
    --urgent: #ffb38a; --urgent-paper: #33231a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--font); }
main { overflow-wrap: anywhere; max-width: 70rem; margin: 0 auto; padding: 1.5rem clamp(0.75rem, 4vw, 2rem) 4rem; }
h1 { font-size: clamp(1.25rem, 1rem + 1.6vw, 1.8rem); line-height: 1.3; margin: 0.2rem 0 0.7rem; text-wrap: pretty; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.6rem 0 0.8rem; padding-top: 0.7rem; border-top: 1px solid var(--grid); }
p, ul { max-width: 46rem; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 0.9em; }
code { background: var(--raised); border-radius: 3px; padding: 0 0.2em; }
pre { overflow-x: auto; background: var(--raised); border-radius: 6px; padding: 0.8rem 1rem; }
pre code { overflow-wrap: normal; background: none; padding: 0; }
.title { margin: 0; color: var(--muted); }
.lead { margin: 0 0 1.2rem; color: var(--muted); }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0.8rem; margin: 0; }
.verdicts > div:nth-child(n + 4) { grid-column: 1 / -1; }
.verdicts > div { background: var(--raised); border-radius: 6px; padding: 0.8rem 1rem; }
dt { font-weight: 600; }
dd { margin: 0.25rem 0 0; }
.urgent { list-style: none; margin: 1rem 0 0; padding: 0.7rem 1rem; border-left: 4px solid var(--urgent);
  border-radius: 3px; background: var(--urgent-paper); max-width: none; }
.urgent strong { color: var(--urgent); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; list-style: none; margin: 1.4rem 0 0; padding: 0; max-width: none;
  font-size: 0.92rem; }
nav a { display: inline-block; padding: 0.2rem 0; }
figure { margin: 1.2rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg.wide { max-width: 54rem; }
figure svg.narrow { display: none; max-width: 26rem; margin: 0 auto; }
figcaption { color: var(--muted); font-size: 0.9rem; max-width: 46rem; margin-top: 0.4rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; border: 1px solid var(--grid); border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { overflow-wrap: break-word; border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.86rem;
  line-height: 1.4; }
caption { caption-side: top; text-align: left; padding: 0.6rem 0.7rem; color: var(--muted); }
th, td { padding: 0.4rem 0.7rem; text-align: left; vertical-align: top; border-top: 1px solid var(--grid); }
td { max-width: 24rem; min-width: 7rem; }
td.number { min-width: 3.5rem; }
thead th { background: var(--raised); vertical-align: bottom; min-width: 4rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.long { min-width: 14rem; max-width: 30rem; }
th[scope="row"], thead th:first-child { position: sticky; left: 0; background: var(--paper); font-weight: 600;
  min-width: 9rem; max-width: 14rem; overflow-wrap: anywhere; }
thead th:first-child { background: var(--raised); }
th[scope="row"].long { min-width: 16rem; max-width: 22rem; }
details { margin: 0.6rem 0; max-width: 46rem; }
summary { cursor: pointer; }
details p { color: var(--muted); font-size: 0.9rem; }
@media screen and (max-width: 40rem) {
  figure svg.wide { display: none; }
  figure svg.narrow { display: block; }
  th[scope="row"], th[scope="row"].long, thead th:first-child { min-width: 8rem; max-width: 9rem; }
}
@media print {
  @page { size: A4; margin: 14mm; }
  :root { --paper: #ffffff; --ink: #000000; --muted: #444444; --grid: #cccccc; --raised: #f2f2f2; --link: #000000;
    --urgent: #9a3b00; --urgent-paper: #ffffff; color-scheme: light; }
  body { font-size: 10pt; }
  main { overflow-wrap: anywhere; max-width: none; padding: 0; }
  nav { display: none; }
  h2 { break-after: avoid; margin-top: 1.6rem; }
  figure, .verdicts > div, tr { break-inside: avoid; }
  figure svg.wide { max-width: 15.5cm; max-height: 22cm; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 6.6pt; }
  th, td, td.long, td.number, thead th { padding: 0.15rem 0.25rem; min-width: 0; }
  td.number { white-space: normal; }
  th[scope="row"], th[scope="row"].long, thead th:first-child { position: static; min-width: 0; max-width: none;
    overflow-wrap: break-word; }
  details::details-content { content-visibility: visible; block-size: auto; }
  pre, pre code { white-space: pre-wrap; overflow-wrap: anywhere; }
}
"""
