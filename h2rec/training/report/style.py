"""The style sheet of the report. Series colours are told apart with any colour vision, in light and in dark."""

STYLE = """
:root {
  --page: #f6f7f9; --panel: #ffffff; --ink: #1b2330; --muted: #5d6878; --grid: #dfe3e9; --best: #fff1c9;
  --up: #0b6b4b; --down: #a8400a; --accent: #c24f00;
  --series-0: #0072b2; --series-1: #e69f00; --series-2: #009e73; --series-3: #d55e00; --series-4: #cc79a7;
  --series-5: #56b4e9; --series-6: #6b5b95;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161d; --panel: #1b212b; --ink: #e8ecf2; --muted: #a2adbd; --grid: #343d4b; --best: #4a3c12;
    --up: #55d6a4; --down: #ffa06b; --accent: #ff9a57;
    --series-0: #4ba3e0; --series-1: #f2bd4b; --series-2: #35c79c; --series-3: #ff7f3f; --series-4: #e5a3c8;
    --series-5: #9ad5f7; --series-6: #b8a9e0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
header { margin-bottom: 20px; }
h1, h2, h3, p, figure { margin: 0; }
h1 { font-size: 32px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 20px; line-height: 1.3; margin-bottom: 14px; }
h3 { font-size: 15px; font-weight: 600; margin: 18px 0 8px; }
h2 + h3 { margin-top: 0; }
.brand { color: var(--accent); font-weight: 700; letter-spacing: 0.02em; }
.facts, .reading, small, .count { color: var(--muted); }
.facts { margin-top: 4px; }
section { background: var(--panel); border: 1px solid var(--grid); border-radius: 12px; padding: 22px 24px;
  margin-bottom: 20px; }
section > p { margin-top: 10px; }
.reading { font-size: 15px; max-width: 76ch; margin-top: 14px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; margin-bottom: 20px; }
.pair section { margin-bottom: 0; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 24px; }
.cards { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; }
.card { border-left: 4px solid var(--grid); padding-left: 16px; }
.card h3 { margin: 0; color: var(--muted); }
.card .number { font-size: 34px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.card .gain { font-weight: 600; min-height: 1.55em; }
.card .gain span + span { color: var(--muted); font-weight: 400; }
.card .count { font-size: 14px; }
.up { color: var(--up); }
.down { color: var(--down); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child { text-align: left; }
thead th { color: var(--muted); font-size: 14px; vertical-align: bottom; padding-block: 4px; }
thead .group { text-align: center; color: var(--ink); font-weight: 600; border-left: 1px solid var(--grid); }
.group small { font-weight: 400; margin-left: 8px; }
tbody tr { border-top: 1px solid var(--grid); }
tbody th { font-weight: 500; }
thead tr:last-child th { text-align: right; }
thead tr:only-child th:first-child { text-align: left; }
.edge { border-left: 1px solid var(--grid); }
td small { display: block; font-size: 13px; line-height: 1.3; }
strong { font-weight: 700; background: var(--best); border-radius: 4px; padding: 1px 5px; margin-right: -5px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
details { border-top: 1px solid var(--grid); }
details:last-of-type { border-bottom: 1px solid var(--grid); }
summary { padding: 9px 2px; cursor: pointer; }
details .scroll { padding-bottom: 12px; }
.settings { display: grid; grid-template-columns: 1fr 1fr; column-gap: 40px; margin: 0; }
.settings div { display: flex; justify-content: space-between; gap: 20px; padding: 5px 0;
  border-bottom: 1px solid var(--grid); }
dt { color: var(--muted); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 760px) {
  main { padding: 20px 12px 40px; }
  h1 { font-size: 26px; }
  section { padding: 18px 16px; border-radius: 10px; }
  .pair, .figures, .settings { grid-template-columns: 1fr; }
  .cards { grid-template-columns: 1fr; }
  .wide { min-width: 640px; }
  th, td { padding: 8px 7px; }
  .results th:first-child { position: sticky; left: 0; background: var(--panel); }
  .results tbody th { white-space: normal; min-width: 108px; }
  .results .swatch { margin-right: 6px; }
  .results thead tr:last-child th:first-child { position: static; }
}
@media print { body { background: none; } section { break-inside: avoid; } }
"""
