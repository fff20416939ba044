"""How are the doctor's findings shown to people? What stands in the way first, then what was measured, then what to expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.report.tables import new_console, new_table
from ray_streamer.units import counted, human_bytes, human_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from ray_streamer.doctor.examine import Examination

_ORDER = ("error", "warning", "good")


def print_examination(examination: Examination, *, in_words: Callable[[str], str]) -> None:
    """Shows everything.

    Args:
        examination: What was found.
        in_words: Puts advice that speaks of Python's arguments into the words of the place.
    """
    console = new_console()
    for level in _ORDER:
        for finding in examination.findings:
            if finding.level == level:
                words = [f"{level:7} {finding.subject}: {finding.found}", finding.why, finding.advice]
                console.print(in_words("\n        ".join(word for word in words if word)))
    console.print(_memory_table(examination))
    if examination.storage:
        console.print(_storage_table(examination))
    for line in _expected(examination):
        console.print(in_words(line))


def _memory_table(examination: Examination) -> Table:
    memory = examination.memory
    table = new_table("This node", "what", "measured")
    table.add_row("copy, one thread", f"{memory.copy_bytes_per_second / 1e9:.2f} GB/s")
    table.add_row("first touch of fresh memory, one thread", f"{memory.touch_bytes_per_second / 1e9:.2f} GB/s")
    table.add_row("a word to another process and back", f"{memory.exchange_seconds * 1e6:.0f} us")
    if memory.gpu_bytes_per_second is not None:
        table.add_row("pinned memory to the GPU", f"{memory.gpu_bytes_per_second / 1e9:.2f} GB/s")
    return table


def _storage_table(examination: Examination) -> Table:
    table = new_table("Storage", "request", "in flight", "GB/s", "first byte, ms", "receive, ms")
    for each in examination.storage:
        table.add_row(
            human_bytes(each.block_bytes),
            str(each.num_streams),
            f"{each.bytes_per_second / 1e9:.2f}",
            f"{each.first_byte_seconds * 1e3:.1f}",
            f"{each.receive_seconds * 1e3:.1f}",
        )
    return table


def _expected(examination: Examination) -> list[str]:
    prediction = examination.prediction
    if prediction is None:
        return []
    ranks = counted(examination.num_ranks, "rank")
    told = [
        f"Expected: {human_bytes(prediction.read_bytes)} into {ranks} on this node in {prediction.seconds:.2f} s, once the ranks "
        f"have started{_spread(examination)}; bound by: {prediction.bound}."
    ]
    if prediction.best_settings:
        settings = ", ".join(f"{name}={value}" for name, value in prediction.best_settings.items())
        told.append(f"With {settings}: {prediction.best_seconds:.2f} s instead of {prediction.seconds:.2f} s.")
    if fleet := prediction.fleet:
        told.append(
            f"On {counted(fleet.num_nodes, 'node')} like this one at the same time, from a storage that serves "
            f"{human_rate(fleet.storage_rate)} to all: {human_bytes(fleet.read_bytes)} in {fleet.seconds:.2f} s."
        )
    return told


def _spread(examination: Examination) -> str:
    """How far the rehearsals were apart: loads will be, too."""
    if len(examination.rehearsed_seconds) < 2:
        return ""
    shortest, *_, longest = examination.rehearsed_seconds
    return f" ({shortest:.2f} to {longest:.2f} s in {counted(len(examination.rehearsed_seconds), 'try', 'tries')})"
