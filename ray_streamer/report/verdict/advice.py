"""Which one setting would have helped, and what would the load have taken then? Each candidate is replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from ray_streamer.errors import BudgetError
from ray_streamer.extent import PAGE_BYTES
from ray_streamer.planning.limits import (
    AS_MUCH_AS_USEFUL,
    MAX_BLOCK_BYTES,
    MIN_BLOCK_BYTES,
    fit_block_bytes,
    useful_slots,
)
from ray_streamer.report.verdict.other_settings import under_settings
from ray_streamer.report.verdict.replay import replay_seconds
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.report.verdict.model import NodeModel

_LEAST_GAIN = 0.1
"""Share of the load's time. A smaller gain is no advice: loads differ by as much without a change."""

_AS_GOOD = 0.05
"""Share of the load's time. A smaller change is preferred when a larger one gains no more than this beyond it."""

MAX_CONCURRENCY = 1024
"""Of any storage."""


class Knobs(NamedTuple):
    """The settings that shape a load, as they are in force on each rank.

    Attributes:
        concurrency: Reads in flight.
        memory_limit: Staging bytes.
        block_bytes: Largest request that is asked for; a small memory limit makes it smaller.
    """

    concurrency: int
    memory_limit: int
    block_bytes: int

    def of_blocks(self, block_bytes: int) -> Self:
        """The same, as far as they explain blocks of this size, which a rank of another node may have made smaller."""
        is_explained = _is_possible(self) and self.used_block_bytes == block_bytes
        return self if is_explained else self._replace(block_bytes=block_bytes)

    @property
    def used_block_bytes(self) -> int:
        """Largest request after the memory limit."""
        return fit_block_bytes(
            memory_limit=self.memory_limit, block_bytes=self.block_bytes, concurrency=self.concurrency
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A change of settings, and what it would bring.

    Attributes:
        settings: Names and values, as `Settings` takes them; one of them, or two that only help together.
        seconds: What the load would have taken.
        instead_of_seconds: What it took.
    """

    settings: dict[str, int]
    seconds: float
    instead_of_seconds: float

    @property
    def text(self) -> str:
        """The settings as arguments of Python."""
        return ", ".join(
            f'{name}="{human_bytes(value).replace(" ", "")}"'
            if name in ("memory_limit", "block_bytes")
            else f"{name}={value}"
            for name, value in self.settings.items()
        )


def find_advice(
    model: NodeModel,
    knobs: Knobs,
    *,
    measured_seconds: float,
    replayed_seconds: float,
    cpu_seconds: float = 0.0,
    max_concurrency: int = MAX_CONCURRENCY,
) -> Advice | None:
    """The smallest change of settings that helps about as much as any; None when none helps.

    Args:
        model: Of the load.
        knobs: Those of the load.
        measured_seconds: What it took.
        replayed_seconds: What its replay takes.
        cpu_seconds: What its ranks would take if all that held them were the node's CPUs.
        max_concurrency: More reads in flight bring nothing.
    """
    if not _is_possible(knobs):
        return None
    for candidates in (_single(knobs, max_concurrency), _double(knobs, max_concurrency)):
        # What the replay does not explain of this load will be there again.
        unexplained = measured_seconds - replayed_seconds
        found = [
            (max(unexplained + _replayed_with(model, changed), _cpu_bound(cpu_seconds, knobs, changed)), changed)
            for changed in candidates
            if _is_possible(changed)
        ]
        best = min((seconds for seconds, _ in found), default=measured_seconds)
        if measured_seconds - best >= _LEAST_GAIN * measured_seconds:
            seconds, changed = next(each for each in found if each[0] <= best + _AS_GOOD * measured_seconds)
            settings = {name: value for name, value in changed._asdict().items() if value != getattr(knobs, name)}
            return Advice(settings=settings, seconds=seconds, instead_of_seconds=measured_seconds)
    return None


def _replayed_with(model: NodeModel, knobs: Knobs) -> float:
    block_bytes = knobs.used_block_bytes
    other = under_settings(
        model,
        num_readers=knobs.concurrency,
        num_slots=useful_slots(memory_limit=knobs.memory_limit, block_bytes=block_bytes, concurrency=knobs.concurrency),
        block_bytes=block_bytes,
    )
    return replay_seconds(other)


def _cpu_bound(cpu_seconds: float, knobs: Knobs, changed: Knobs) -> float:
    """What the CPUs allow: as many requests cost as much CPU, fewer and larger ones less."""
    return cpu_seconds * min(1.0, knobs.used_block_bytes / changed.used_block_bytes)


def _is_possible(knobs: Knobs) -> bool:
    try:
        return knobs.used_block_bytes > 0
    except BudgetError:
        return False


def _single(knobs: Knobs, max_concurrency: int) -> Iterator[Knobs]:
    """One setting changed, the smallest changes first."""
    yield knobs._replace(concurrency=_doubled(knobs, max_concurrency))
    yield from (knobs._replace(memory_limit=limit) for limit in _larger_limits(knobs))
    for block_bytes in (knobs.block_bytes * 2, knobs.block_bytes // 2):
        if MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES and block_bytes % PAGE_BYTES == 0:
            yield knobs._replace(block_bytes=block_bytes)


def _double(knobs: Knobs, max_concurrency: int) -> Iterator[Knobs]:
    """Two settings changed that need each other: more reads at once, and a slot for each."""
    doubled = _doubled(knobs, max_concurrency)
    if knobs.memory_limit < doubled * knobs.used_block_bytes:
        yield knobs._replace(concurrency=doubled, memory_limit=doubled * knobs.used_block_bytes)


def _doubled(knobs: Knobs, max_concurrency: int) -> int:
    # One doubling at a time: what the storage gives beyond that, nobody has seen.
    return max(knobs.concurrency, min(2 * knobs.concurrency, max_concurrency))


def _larger_limits(knobs: Knobs) -> list[int]:
    """Memory limits that give every read in flight a slot: of the size of today, and of the one that is asked for."""
    limits = {
        2 * knobs.memory_limit,
        knobs.concurrency * knobs.used_block_bytes,
        2 * knobs.concurrency * knobs.used_block_bytes,
        knobs.concurrency * knobs.block_bytes,
    }
    return sorted(limit for limit in limits if limit > knobs.memory_limit != AS_MUCH_AS_USEFUL)
