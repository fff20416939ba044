"""In which order? Round by round, every contender in every place once, shuffled anew for each round; results are kept after each run."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_streamer.testing.s3_server import free_port
from side_by_side.checkpoint import expected_digest, windows_of
from side_by_side.contenders import CONTENDERS, OURS
from side_by_side.group import ContenderError, Group
from side_by_side.places import KINDS, Place
from side_by_side.results import Cell, Results
from side_by_side.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from side_by_side.parts import Windows

LIMIT_SECONDS = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all runs share.

    Attributes:
        folder: The checkpoint on this disk.
        places: Where it is besides.
        staging_bytes: Staging memory per rank, for who knows such a limit.
        memory_cap_bytes: What one process may allocate.
        windows: By number of ranks, what of each tensor each rank holds.
        expected: By number of ranks, the digests of their tensors.
    """

    folder: Path
    places: Mapping[str, Place | str]
    staging_bytes: int
    memory_cap_bytes: int
    windows: Mapping[int, list[Windows]]
    expected: Mapping[int, list[str]]

    @classmethod
    def of(
        cls,
        folder: Path,
        places: Mapping[str, Place | str],
        tps: Sequence[int],
        *,
        staging_bytes: int,
        memory_cap_bytes: int,
    ) -> Ground:
        """For loads by so many ranks."""
        windows = {tp: windows_of(folder, tp) for tp in sorted(set(tps))}
        return cls(
            folder=folder,
            places=places,
            staging_bytes=staging_bytes,
            memory_cap_bytes=memory_cap_bytes,
            windows=windows,
            expected={tp: [expected_digest(folder, rank) for rank in ranks] for tp, ranks in windows.items()},
        )

    def group(self, cell: Cell, place: Place, scratch: Path) -> Group:
        """The ranks of one run of a cell."""
        contender, session, port = CONTENDERS[cell.contender], secrets.token_hex(8), free_port()
        tasks = [
            Task(
                loader=contender.loader,
                uri=place.uri,
                files=sorted(path.name for path in self.folder.iterdir()),
                scratch=str(scratch),
                port=port,
                rank=rank,
                world_size=cell.tp,
                session=session,
                windows=windows,
                staging_bytes=self.staging_bytes,
                memory_cap_bytes=self.memory_cap_bytes,
            )
            for rank, windows in enumerate(self.windows[cell.tp])
        ]
        return Group(
            tasks=tasks,
            environment={
                name: value.format(staging_bytes=self.staging_bytes)
                for name, value in {**place.environment, **contender.environment}.items()
            },
            bytes_sent=place.bytes_sent,
            log=scratch / "log",
            limit_seconds=LIMIT_SECONDS,
        )


def make_cells(
    places: Mapping[str, Place | str], *, contenders: Sequence[str], tp: int, our_tps: Sequence[int]
) -> list[Cell]:
    """Who runs where: everybody with `tp` ranks; none is left out, but gets a reason.

    This project also runs with `our_tps`, but for web servers, whose bodies come the same way as those of an S3 server: five rounds of all of it
    take 25 minutes.
    """
    cells: list[Cell] = []
    for name, place in places.items():
        for contender in (CONTENDERS[chosen] for chosen in CONTENDERS if chosen in contenders):
            is_absent = place if isinstance(place, str) else None
            reason = is_absent or contender.refusal(name, KINDS[name])
            all_ranks = sorted({tp, *our_tps}) if contender is OURS and KINDS[name] != "web" else [tp]
            cells += [Cell(place=name, contender=contender.name, tp=ranks, reason=reason) for ranks in all_ranks]
    return cells


def run_rounds(
    results: Results, ground: Ground, *, num_rounds: int, limit_seconds: float, after_run: Callable[[Cell], None]
) -> None:
    """Measures until there are enough rounds, or another one would not end in time.

    Args:
        results: Gets the runs; a contender that fails gets the reason, and is not run again.
        ground: What all runs share.
        num_rounds: How many are wanted.
        limit_seconds: For all of them; the first is made in any case.
        after_run: Called with the cell whose run has ended.
    """
    started = time.monotonic()
    results.load_averages.append(os.getloadavg()[0])
    for number in range(num_rounds):
        before = time.monotonic()
        order = [cell for cell in results.cells if not cell.reason]
        random.Random(number).shuffle(order)
        for cell in order:
            _measure(cell, ground)
            results.elapsed_seconds = time.monotonic() - started
            after_run(cell)
        results.load_averages.append(os.getloadavg()[0])
        if results.elapsed_seconds + time.monotonic() - before > limit_seconds:
            break


def _measure(cell: Cell, ground: Ground) -> None:
    """One run of a cell, or the reason why there are none."""
    place = ground.places[cell.place]
    assert isinstance(place, Place)
    place.prepare()
    # On the checkpoint's disk: downloads go there.
    scratch = Path(tempfile.mkdtemp(prefix="run-", dir=ground.folder.parent))
    try:
        run, digests = ground.group(cell, place, scratch).measure()
    except ContenderError as error:
        _give_up(cell, str(error))
    else:
        if digests == ground.expected[cell.tp]:
            cell.runs.append(run)
        else:
            _give_up(cell, "loaded other tensors than safetensors reads")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _give_up(cell: Cell, reason: str) -> None:
    """Who failed once has no figures: a median of the other runs would hide it."""
    cell.reason = f"{reason} (in run {len(cell.runs) + 1})" if cell.runs else reason
    cell.runs.clear()
