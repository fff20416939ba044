"""Which variables of Run:ai's streamer are read where ours are not set, and what do they mean here?"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Alias:
    """A variable of Run:ai's streamer that is read where ours is not set.

    Attributes:
        variable: Its name.
        setting: Field of `Settings` that it sets.
        note: How its meaning differs there.
        meanings: Values that are written otherwise here, None = as if it were not set; other values are taken as they are.
    """

    variable: str
    setting: str
    note: str
    meanings: Mapping[str, str | None] = field(default_factory=dict)

    def value(self) -> str | None:
        """What the variable says, in this package's words; None when it is unset or empty."""
        text = os.environ.get(self.variable) or None
        return self.meanings.get(text.lower(), text) if text else None


ALIASES = (
    Alias(
        "RUNAI_STREAMER_CONCURRENCY",
        "concurrency",
        "There: threads of a process, or clients with many requests each. Here: requests in flight per rank.",
    ),
    Alias(
        "RUNAI_STREAMER_MEMORY_LIMIT",
        "memory_limit",
        "There: host buffers of a process, or of a whole node in distributed mode; at least the largest tensor, which is "
        "also what 0 means; 40 GB unless set. Here: staging per rank, one block being enough; with `ray_streamer.compat.runai`, bytes of "
        "tensors that are read and not yet consumed.",
    ),
    Alias(
        "RUNAI_STREAMER_CHUNK_BYTESIZE",
        "block_bytes",
        "There: raised to 2 MiB for files and 5 MiB for objects. Here: any multiple of 4096.",
    ),
    Alias(
        "RUNAI_STREAMER_S3_TIMEOUT",
        "retry_deadline_seconds",
        "There: 0 leaves the time to the library below. Here: 0 in this variable counts as unset.",
        {"0": None},
    ),
    Alias("RUNAI_STREAMER_S3_ENDPOINT", "s3_endpoint_url", "The same; it comes before AWS_ENDPOINT_URL."),
    Alias(
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING",
        "s3_addressing",
        "There: virtual unless set. Here: 1 is `virtual`, 0 is `path`, unset is `auto`.",
        {"1": "virtual", "true": "virtual", "0": "path", "false": "path"},
    ),
    Alias("RUNAI_STREAMER_S3_UNSIGNED", "s3_unsigned", "The same."),
)
"""The one table of foreign names; `docs/settings.md` repeats it."""


def alias_values() -> dict[str, str]:
    """What variables of `ALIASES` say, by setting; of several for one setting, the first."""
    values: dict[str, str] = {}
    for alias in ALIASES:
        value = alias.value()
        if value is not None:
            values.setdefault(alias.setting, value)
    return values
