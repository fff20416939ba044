"""How are figures shown to people? As rich tables on stdout; sizes carry binary units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ray_streamer.units import counted, human_bytes, human_rate
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ray_streamer.planning.summary import PlanSummary
    from ray_streamer.planning.tensor_reads import TensorReads
    from ray_streamer.report.checkpoint_summary import CheckpointSummary, Share, TensorSize
    from ray_streamer.report.load_report import LoadReport
    from ray_streamer.storage.base import StorageStatistics


class _PrintableConsole(Console):
    """A console to which texts go without what a terminal would obey."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`."""
        super().print(*(printable(shown) if isinstance(shown, str) else shown for shown in objects), **options)


class _PrintableTable(Table):
    """A table whose cells hold names from outside."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """As `Table.add_row`."""
        super().add_row(
            *(printable(cell, one_line=True) if isinstance(cell, str) else cell for cell in cells), **options
        )


def new_console() -> Console:
    """A console on stdout; in a file or pipe it is wide enough for every table, however narrow the terminal."""
    # Names of tensors and files may look like markup.
    console = _PrintableConsole(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    return console


def new_table(title: str, *columns: str, num_text_columns: int = 1) -> Table:
    """A table whose first columns are text, and all others numbers."""
    table = _PrintableTable(title=printable(title), title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        is_text = number < num_text_columns
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    return table


def print_checkpoint(summary: CheckpointSummary) -> None:
    """What `inspect` found."""
    console = new_console()
    model = summary.model_type or "model_type unknown"
    console.print(
        f"{summary.uri} ({model}): {counted(summary.num_tensors, 'tensor')}, "
        f"{human_bytes(summary.checkpoint_bytes)}, {counted(len(summary.files), 'file')}",
    )
    if summary.missing:
        console.print(f"Incomplete: {'; '.join(summary.missing)}.", style="red")
    console.print(_shares_table("Files", "file", summary.files, summary.checkpoint_bytes))
    console.print(_shares_table("Dtypes", "dtype", summary.dtypes, summary.checkpoint_bytes))
    if summary.placements:
        console.print(_shares_table("Placements", "placement", summary.placements, summary.checkpoint_bytes))
        console.print(f"tp that works: {', '.join(map(str, summary.legal_tp)) or 'none'}")
    else:
        console.print("No preset for this model: give rules to plan or load it.")
        if summary.lookalikes:
            console.print(
                f"If it is one of these under a new name, try --model-type {' or '.join(summary.lookalikes)}."
            )
    if summary.largest:
        console.print(_sizes_table("Largest tensors", summary.largest))
    if summary.num_results is not None:
        console.print(f"Loads as {counted(summary.num_results, 'tensor')}.")
        console.print(_sizes_table("Largest loaded tensors", summary.results))


def _sizes_table(title: str, tensors: Sequence[TensorSize]) -> Table:
    table = new_table(title, "tensor", "dtype", "shape", "bytes", num_text_columns=2)
    for tensor in tensors:
        table.add_row(tensor.name, tensor.dtype, _shape(tensor.shape), human_bytes(tensor.num_bytes))
    return table


def print_plan(summary: PlanSummary, tensors: Sequence[TensorReads]) -> None:
    """What `plan` found; `tensors` may be empty."""
    console = new_console()
    console.print(
        f"{summary.uri}: {human_bytes(summary.read_bytes)} to read for {human_bytes(summary.needed_bytes)} "
        f"needed ({summary.amplification:.3f}x), {counted(summary.requests, 'request')} of at most "
        f"{human_bytes(summary.block_bytes)}, planned in {summary.plan_seconds:.3f} s, plan {summary.plan_hash[:12]}",
    )
    columns = ("rank", "node", "holds", "reads", "requests", "direct", "from neighbours")
    table = new_table("Ranks", *columns, num_text_columns=2)
    for rank in summary.ranks:
        sizes = (rank.result_bytes, rank.read_bytes, rank.direct_bytes, rank.from_neighbours_bytes)
        holds, reads, direct, neighbours = map(human_bytes, sizes)
        table.add_row(str(rank.rank), str(rank.node), holds, reads, str(rank.requests), direct, neighbours)
    console.print(table)
    if len(summary.nodes) > 1:
        table = new_table("Nodes", "node", "ranks", "needs", "reads", "of checkpoint", num_text_columns=2)
        for node in summary.nodes:
            first, last = min(node.ranks), max(node.ranks)
            ranks = str(first) if first == last else f"{first}-{last}"
            sizes = human_bytes(node.needed_bytes), human_bytes(node.read_bytes)
            table.add_row(str(node.node), ranks, *sizes, f"{node.checkpoint_fraction:.0%}")
        console.print(table)
    if tensors:
        console.print(_tensors_table(tensors))


def print_load(report: LoadReport, *, in_words: Callable[[str], str] = str) -> None:
    """What `load` did, and why it took that long.

    Args:
        report: Of the load.
        in_words: Puts the verdict, which speaks of Python's arguments, into the words of the place.
    """
    console = new_console()
    seconds = ", ".join(f"{phase} {spent:.2f} s" for phase, spent in report.seconds.items())
    sources = f"{human_bytes(report.bytes_read)} read from storage"
    if report.page_cache_bytes:
        sources += f", {human_bytes(report.page_cache_bytes)} out of the page cache"
    else:
        sources += f" ({report.amplification:.3f}x)"
    console.print(
        f"{report.uri}: {human_bytes(report.needed_bytes)} in {report.reading_seconds:.2f} s "
        f"({human_rate(1e9 * report.gigabytes_per_second)}), {sources}; {seconds}",
    )
    if hardships := _hardships(report.storage):
        console.print(f"On the way: {hardships}.")
    console.print(f"Summed over the blocks of all ranks: {_spent_on_blocks(report)}.")
    columns = ("rank", "seconds", "read", "page cache", "delivered", "requests", "peak staging / limit")
    table = new_table("Ranks", *columns)
    shown_node = ""
    for node, rank in zip(report.nodes, report.ranks, strict=True):
        if node != shown_node:
            table.add_row(node, style="bold")
            shown_node = node
        table.add_row(
            f"  {rank.rank}",
            f"{sum(rank.seconds.values()):.2f}",
            human_bytes(rank.bytes_read),
            human_bytes(rank.page_cache_bytes),
            human_bytes(rank.bytes_delivered),
            str(rank.num_requests),
            f"{human_bytes(rank.peak_staging_bytes)} / {human_limit(rank.memory_limit)}",
        )
    console.print(table)
    if report.verdict is not None:
        console.print(f"Verdict: {in_words(report.verdict.text)}")
    for sentence in report.findings.untold:
        console.print(sentence)


def _spent_on_blocks(report: LoadReport) -> str:
    """What the time of blocks went into; blocks pass through these at the same time, so the sum is longer than the load."""
    receive_seconds = sum(rank.read_seconds - rank.first_byte_seconds for rank in report.ranks)
    parts = (
        (sum(rank.wait_seconds for rank in report.ranks), "waiting for a slot"),
        (sum(rank.first_byte_seconds for rank in report.ranks), "waiting for the first byte"),
        (receive_seconds, "receiving"),
        (sum(rank.copy_seconds for rank in report.ranks), "copying"),
        (sum(rank.first_touch_seconds for rank in report.ranks), "page faults"),
    )
    return ", ".join(f"{max(0.0, seconds):.2f} s {what}" for seconds, what in parts)


def _hardships(storage: StorageStatistics) -> str:
    """What went wrong and was made good; empty when all went well."""
    counts = (
        (storage.num_retries, "retries"),
        (storage.num_throttled, "answers to slow down"),
        (storage.num_hedges, "late answers asked for twice"),
        (storage.num_cuts, "late bodies cut"),
    )
    told = [f"{count} {what}" for count, what in counts if count]
    if told:
        told.append(f"{human_bytes(storage.wasted_bytes)} thrown away")
    return ", ".join(told)


def human_limit(memory_limit: int) -> str:
    """A memory limit as people read it."""
    return "none" if memory_limit < 0 else human_bytes(memory_limit)


def _shares_table(title: str, column: str, shares: Sequence[Share], all_bytes: int) -> Table:
    table = new_table(title, column, "tensors", "bytes", "share")
    for share in shares:
        fraction = share.num_bytes / all_bytes if all_bytes else 0.0
        table.add_row(share.name, str(share.num_tensors), human_bytes(share.num_bytes), f"{fraction:.1%}")
    return table


def _tensors_table(tensors: Sequence[TensorReads]) -> Table:
    table = new_table("Tensors that cost most", "tensor", "why", "shape", "held", "read", num_text_columns=2)
    for tensor in tensors:
        sizes = human_bytes(tensor.result_bytes), human_bytes(tensor.read_bytes)
        table.add_row(tensor.name, f"{tensor.strategy}: {tensor.reason}", _shape(tensor.shape), *sizes)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
