"""Side by side: this project and other loaders, from a disk, an S3 server and a web server, in one run. `make bench`.

    python benchmarks/compare.py                            everything; prints a table for each place
    python benchmarks/compare.py --write-docs               the same, and writes docs/bench and the summary in docs/performance.md
    python benchmarks/compare.py --places s3 --only ray_streamer "Run:ai streamer" --tp 4 --rounds 3
    python benchmarks/compare.py --render results.json --write-docs     writes the pages again from what was measured

How it is measured stands in docs/bench/README.md. Contenders that are not installed (`pip install ".[bench,test]"`) are in the tables with
that reason. All results are kept as JSON after each run, so a run that is interrupted is not lost.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from side_by_side.checkpoint import make_checkpoint
from side_by_side.contenders import BY_DEFAULT, CONTENDERS
from side_by_side.machine import facts
from side_by_side.pages import write_pages
from side_by_side.places import TITLES, open_places
from side_by_side.results import Cell, Results
from side_by_side.rounds import Ground, make_cells, run_rounds
from side_by_side.tables import HEADINGS, defeats, place_rows

MIB = 1 << 20
GIB = 1 << 30


def measure(options: argparse.Namespace) -> Results:
    """Every chosen contender in every chosen place."""
    checkpoint_bytes = make_checkpoint(options.folder, layers=options.layers, hidden=options.hidden)
    with open_places(options.folder, options.places) as places:
        cells = make_cells(places, contenders=options.only, tp=options.tp, our_tps=options.our_tp)
        limits = {"staging_bytes": options.staging_mib * MIB, "memory_cap_bytes": round(options.memory_cap_gib * GIB)}
        ground = Ground.of(options.folder, places, [cell.tp for cell in cells], **limits)
        results = Results(facts=facts() | limits, checkpoint_bytes=checkpoint_bytes, tp=options.tp, cells=cells)

        def keep(cell: Cell) -> None:
            results.save(options.json)
            took = (
                cell.reason or f"{cell.runs[-1].load_seconds:.2f} s, {cell.runs[-1].whole_seconds:.2f} s with its start"
            )
            at = f"{results.elapsed_seconds:.0f} s, run {max(1, len(cell.runs))} of {options.rounds}"
            print(f"{at}: {cell.place}, {cell.contender}, tp={cell.tp}: {took}", file=sys.stderr, flush=True)

        run_rounds(results, ground, num_rounds=options.rounds, limit_seconds=options.minutes * 60, after_run=keep)
    return results


def show(results: Results) -> None:
    """A table for each place, and where others take less."""
    console = Console(width=180)
    for place in results.places():
        table = Table(title=f"{TITLES[place]}, {results.checkpoint_bytes:,} bytes, medians of {results.num_rounds}")
        for column, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if column else "left", overflow="fold")
        for row in place_rows(results, place):
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(table)
    for line in defeats(results):
        console.print(f"others take less: {line}", markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=BY_DEFAULT, help="these contenders")
    parser.add_argument("--tp", type=int, default=2, help="ranks of every contender")
    parser.add_argument(
        "--our-tp", type=int, nargs="*", default=[1, 2, 4], help="ranks of this project besides, but for web servers"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=24, help="no round is begun that would end later")
    parser.add_argument("--layers", type=int, default=2, help="about 98 MB each, and 262 MB of embeddings")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model")
    parser.add_argument(
        "--staging-mib", type=int, default=128, help="staging memory per rank, for who knows such a limit"
    )
    parser.add_argument("--memory-cap-gib", type=float, default=8, help="what each process may allocate")
    parser.add_argument(
        "--folder", type=Path, default=Path(".demo/side_by_side"), help="the checkpoint, on the disk to measure"
    )
    parser.add_argument("--json", type=Path, default=Path(".demo/side_by_side.json"), help="all results go there")
    parser.add_argument("--render", type=Path, help="measure nothing; show the results in this file")
    parser.add_argument("--write-docs", action="store_true", help="write the pages in --docs")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    results = Results.load(options.render) if options.render else measure(options)
    show(results)
    if options.write_docs:
        write_pages(results, options.docs)


if __name__ == "__main__":
    main()
