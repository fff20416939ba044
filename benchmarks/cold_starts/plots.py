"""How does a cold start grow with the nodes, and which setting moves it? Two figures, each as PNG and as SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from cold_starts.scenarios import NUM_NODES, STORAGES
from cold_starts.strategies import STRATEGIES
from cold_starts.studies import CONCURRENCIES, LINKS_GBIT

if TYPE_CHECKING:
    from pathlib import Path

    from cold_starts.studies import Simulated

_COLOURS = dict(zip(LINKS_GBIT, ("#d29922", "#388bfd", "#2ea043"), strict=True))


def write_plots(simulated: Simulated, folder: Path) -> None:
    """Writes both figures into a folder."""
    # The same figures make the same files; letters stay letters.
    with matplotlib.rc_context({"svg.hashsalt": "cold starts", "svg.fonttype": "none"}):
        for name, figure in (("cold_starts", by_nodes(simulated)), ("cold_starts_concurrency", by_setting(simulated))):
            figure.savefig(folder / f"{name}.png", dpi=110)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def by_nodes(simulated: Simulated) -> Figure:
    """Seconds over nodes: a row for each storage, a panel for each model, a line for each way."""
    models = list(dict.fromkeys(start.model for start in simulated.starts))
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle("Seconds until all nodes have loaded, simulated", fontsize=13)
    panels = figure.subplots(len(STORAGES), len(models), squeeze=False, sharex=True, sharey=True)
    for row, storage in zip(panels, STORAGES, strict=True):
        for panel, model in zip(row, models, strict=True):
            _ways(panel, simulated, model, storage.name)
            panel.set_title(f"{model}, {storage.name}", fontsize=11, loc="left")
        row[0].set_ylabel("seconds")
    for panel in panels[-1]:
        panel.set_xlabel("nodes, each a replica")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def by_setting(simulated: Simulated) -> Figure:
    """Seconds over requests in flight, one line for each link."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    for link in LINKS_GBIT:
        some = [setting for setting in simulated.settings if setting.link_gbit == link]
        x, y = [setting.concurrency for setting in some], [setting.seconds for setting in some]
        panel.plot(x, y, marker="o", markersize=4, color=_COLOURS[link], label=f"a link of {link} Gbit/s")
    _log_axes(panel, CONCURRENCIES)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.set_xlabel("concurrency: requests in flight on each rank")
    panel.set_ylabel("seconds")
    panel.set_title(
        f"{simulated.starts[0].model} on one node from {STORAGES[0].name}, simulated", fontsize=12, loc="left"
    )
    panel.legend(frameon=False)
    return figure


def _ways(panel: Any, simulated: Simulated, model: str, storage: str) -> None:
    for strategy in STRATEGIES:
        key = (model, storage, strategy.name)
        some = [start for start in simulated.starts if (start.model, start.storage, start.strategy) == key]
        panel.plot(
            [start.num_nodes for start in some],
            [start.seconds for start in some],
            marker="o",
            markersize=3,
            color=strategy.colour,
            linestyle=strategy.line,
            # What is dashed or dotted shows a line that lies below it.
            zorder=2 if strategy.line == "solid" else 3,
            label=f"{strategy.name}: {strategy.says.partition(';')[0].replace('`', '')}",
        )
    _log_axes(panel, NUM_NODES[::2])


def _log_axes(panel: Any, ticks: tuple[int, ...]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda seconds, _: f"{seconds:,g}")
    panel.grid(which="major", color="#dddddd", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
