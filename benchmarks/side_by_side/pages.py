"""Which pages come of it? docs/bench/README.md with its pictures and JSON, and the summary in docs/performance.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.units import counted, human_bytes
from side_by_side.places import TITLES
from side_by_side.tables import HEADINGS, SUMMARY_HEADINGS, defeats, markdown, notes, place_rows, summary_rows

if TYPE_CHECKING:
    from pathlib import Path

    from side_by_side.results import Results

BEGIN, END = "<!-- side by side: begin -->", "<!-- side by side: end -->"
ENOUGH_ROUNDS = 5

_QUIET_LOAD_PER_CORE = 0.75
"""Everything that runs here is at most as many processes as ranks, and they come and go."""


def write_pages(results: Results, docs: Path) -> None:
    """Writes the page, its JSON and its pictures, and the summary.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from side_by_side.plots import draw

    folder = docs / "bench"
    results.save(folder / "results.json")
    draw(results, folder)
    (folder / "README.md").write_text(page(results))
    performance = docs / "performance.md"
    performance.write_text(with_summary(performance.read_text(), results))


def page(results: Results) -> str:
    """Everything, in Markdown."""
    parts = [
        "# Side by side",
        "Made by `make bench`, never by hand. What it says, and why, is in [performance.md](../performance.md).",
        *_circumstances(results),
        "## How it is measured",
        _METHOD.format(
            tp=results.tp,
            staging=human_bytes(results.facts["staging_bytes"]),
            cap=human_bytes(results.facts["memory_cap_bytes"]),
        ),
        "## At a glance",
        summary(results),
        "![Load alone](load_seconds.png)",
        "[SVG](load_seconds.svg), and as pictures: [whole call](whole_seconds.png) ([SVG](whole_seconds.svg)), "
        "[CPU](load_cpu_seconds.png) ([SVG](load_cpu_seconds.svg)), [peak memory](added_bytes.png) ([SVG](added_bytes.svg)). "
        "Every run is in [results.json](results.json).",
    ]
    for place in results.places():
        parts += [
            f"## {TITLES[place][0].upper()}{TITLES[place][1:]}",
            markdown(HEADINGS, place_rows(results, place)),
            notes(place),
        ]
    lost = defeats(results)
    parts += ["## Where others take less", "\n".join(f"- {line}" for line in lost) if lost else "Nowhere."]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """This project and the best of the others, a row for each place."""
    return markdown(SUMMARY_HEADINGS, summary_rows(results), words=(0, 2, 6))


def with_summary(text: str, results: Results) -> str:
    """A page whose lines between the marks are of these results.

    Raises:
        ValueError: The page has no such marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/performance.md has no {BEGIN} and {END}; put both where the summary belongs")
    said = "\n\n".join([*_circumstances(results), summary(results)])
    return f"{before}{BEGIN}\n{said}\n{END}{after}"


def _circumstances(results: Results) -> list[str]:
    facts, loads = results.facts, results.load_averages
    machine = (
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, "
        f"{facts['system']}. A Llama of {results.checkpoint_bytes:,} bytes in 4 files, "
        f"medians of {counted(results.num_rounds, 'round')}, {counted(round(results.elapsed_seconds / 60), 'minute')}."
    )
    if results.num_rounds < ENOUGH_ROUNDS:
        machine += f" **Fewer than {ENOUGH_ROUNDS} rounds**, so one busy moment can change an order."
    spread = f"The load average was {min(loads):.1f} to {max(loads):.1f}"
    # Some of this project's groups have twice as many ranks, and servers take part.
    if max(loads) > _QUIET_LOAD_PER_CORE * facts["cores"] + 2 * results.tp:
        spread += ", more than the ranks explain: **other work ran on the machine.** Bytes are exact; compare seconds with much care, CPU seconds with some"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [machine, f"{spread}. Versions: {versions}."]


_METHOD = """- Each run is a fresh process for each rank, {tp} ranks for everybody; this project also with other numbers. All ranks are on one machine,
  with one thread for arithmetic each, no Ray, and a cap of {cap} on what a process may allocate.
- **Whole call**: from the start of the first process until every rank has its tensors, with Python's start and all imports. **Load**: from the
  first rank that begins to load until the last one is done. Everybody has imported torch and its own modules by then.
- A load is done when one byte of every page of every tensor was read. So who leaves tensors mapped to a file reads the file, too.
- **All end with the same tensors**: the rank's parts, by name, dtype, shape and bytes, compared by checksums with what safetensors reads, after
  each run.
- In each round every contender runs once in every place. The order is shuffled anew for each round.
- Before a cold run the files are dropped from the page cache, and the kernel is asked whether it has forgotten them. Before a warm run
  it is asked whether it has them all, and they are read if it has not. The web server's files are in the page cache, the S3 server's
  objects in its memory.
- **Peak memory** is that of all ranks together beyond what they had before the load: anonymous and shared memory, results included. Pages of
  the page cache do not count, mapped or not.
- `ratio` is a contender's load divided by that of ray_streamer with as many ranks: above 1, ray_streamer is faster. Bold is the least of
  those with {tp} ranks.
- safetensors' rows on servers are a download to the disk first: by boto3 from S3, by urllib with a thread for each file from a web server.
  The first rank downloads, the others wait.
- "Run:ai streamer, tuned" has one client, 16 connections, and {staging} of memory per rank, as ray_streamer has; without "tuned"
  it has its defaults."""
