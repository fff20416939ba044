"""What does a cold start of a large model cost, on one node or on a thousand, and what bounds it? Simulated, and checked with small loads.

    python benchmarks/simulate.py                                   # simulate, and print the page
    python benchmarks/simulate.py --measure                         # also make the small loads; a quarter of an hour in all
    python benchmarks/simulate.py --measure --write-docs docs       # page, plots and JSON go there

Without `--measure` the page keeps the measured loads that the JSON there has. Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cold_starts.measured import Checked, check_here
from cold_starts.page import write_page
from cold_starts.studies import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "cold_starts"


def describe_machine(load_averages: Sequence[float]) -> str:
    """On what the small loads were made."""
    return (
        f"{os.cpu_count()} CPUs, which server, proxy, all ranks and other work shared: load average {min(load_averages):.0f} to "
        f"{max(load_averages):.0f}."
    )


def measured_before(folder: Path | None) -> tuple[list[Checked], str]:
    """Small loads of an earlier run."""
    file = folder and folder / f"{NAME}.json"
    if not file or not file.exists():
        return [], ""
    said = json.loads(file.read_text(encoding="utf-8"))
    checked = [
        Checked(
            name=each["name"],
            predicted_seconds=each["predicted_seconds"],
            measured_seconds=tuple(each["measured_seconds"]),
        )
        for each in said["checked"]
    ]
    return checked, said["machine"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates, measures when asked, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="make the small loads")
    parser.add_argument("--rounds", type=int, default=5, help="of small loads")
    parser.add_argument("--write-docs", type=Path, metavar="FOLDER", help="write page, plots and JSON there")
    options = parser.parse_args(arguments)
    checked, machine = measured_before(options.write_docs)
    if options.measure:
        before = os.getloadavg()[0]
        checked = check_here(num_rounds=options.rounds)
        machine = describe_machine([before, os.getloadavg()[0]])
    simulated = simulate(lambda line: print(line, file=sys.stderr, flush=True))
    page = write_page(simulated, checked, machine)
    if options.write_docs is None:
        print(page)
        return
    folder = options.write_docs
    (folder / f"{NAME}.md").write_text(page, encoding="utf-8")
    said = simulated.as_dict() | {"checked": [asdict(each) for each in checked], "machine": machine}
    (folder / f"{NAME}.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    from cold_starts.plots import write_plots

    write_plots(simulated, folder)


if __name__ == "__main__":
    main()
