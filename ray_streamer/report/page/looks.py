"""How does the page look, and what draws its charts? Style and script, in which nothing of a report stands."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --quiet: #59636e; --back: #ffffff; --card: #f6f8fa; --line: #d1d9e0; --mark: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --quiet: #9198a1; --back: #0d1117; --card: #151b23; --line: #3d444d; --mark: #4493f8 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .25rem }
p { margin: .25rem 0 .75rem; max-width: 62rem }
.quiet { color: var(--quiet); font-size: .9rem }
.skip { position: absolute; left: -100rem }
.skip:focus { position: static }
a { color: var(--mark) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .5rem 0 1rem; font-size: .9rem }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; border-radius: 3px }
.verdict { border-left: 4px solid var(--mark); background: var(--card); padding: .75rem 1rem; margin: 1rem 0; border-radius: 0 6px 6px 0;
  overflow-wrap: anywhere }
.verdict p { margin: .25rem 0 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem; margin: 1rem 0 }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .75rem }
dt { color: var(--quiet); font-size: .8rem }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.chart { width: 100% }
.scroll { overflow: auto; max-height: 26rem; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
thead th { position: sticky; top: 0; background: var(--card) }
tbody tr:last-child td { border-bottom: 0 }
summary { cursor: pointer; color: var(--quiet); font-size: .9rem; margin: .25rem 0 .5rem }
footer { margin: 2.5rem 0 1rem; border-top: 1px solid var(--line); padding-top: .5rem }
@media print { nav, summary { display: none } }
"""
"""Narrow windows get the same page: charts and tables are as wide as there is room, wide tables scroll by themselves."""

SCRIPT = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const isDark = matchMedia("(prefers-color-scheme: dark)");
  const isNarrow = matchMedia("(max-width: 40rem)");
  const options = { responsive: true, displayModeBar: false, displaylogo: false };

  function layoutOf(figure) {
    const style = getComputedStyle(document.documentElement);
    const [text, line, card] = ["--text", "--line", "--card"].map(name => style.getPropertyValue(name).trim());
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, tickfont: { size: isNarrow.matches ? 11 : 13 } };
    return {
      ...figure.layout,
      height: figure.height,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      dragmode: false,
      font: { color: text, family: "inherit", size: 13 },
      hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text } },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal" },
      margin: { l: isNarrow.matches ? 44 : 60, r: 12, t: 44, b: 48 },
      xaxis: { ...axis, ...figure.layout.xaxis },
      yaxis: { ...axis, ...figure.layout.yaxis },
    };
  }

  function draw() {
    return Promise.all(figures.map(figure => Plotly.react(`chart-${figure.key}`, figure.traces, layoutOf(figure), options)));
  }

  for (const query of [isDark, isNarrow]) query.addEventListener("change", draw);
  draw().then(() => { document.documentElement.dataset.drawn = figures.length; });
})();
"""
"""Draws the charts, and draws them again when the window becomes dark, light, narrow or wide."""
