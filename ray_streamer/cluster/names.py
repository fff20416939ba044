"""What are a group and its ranks called, in `ray list actors`, the dashboard, the timeline and log prefixes?

Ray wants names that are unique in a namespace, and two loads of one model may run side by side. So each name ends in the
token of its group.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from ray_streamer.storage.uri import FILE_NAMES
from ray_streamer.units import counted

# Longer ones are cut by Ray's tables.
_MAX_MODEL_CHARACTERS = 48


@dataclass(frozen=True, slots=True)
class GroupName:
    """The name of one group of ranks.

    Attributes:
        model: What the ranks hold, in a word.
        num_ranks: How many there are.
        token: Tells groups of one model apart.
    """

    model: str
    num_ranks: int
    token: str = field(default_factory=lambda: secrets.token_hex(3))

    @property
    def label(self) -> str:
        """What messages of this process call it."""
        return f"model {self.model} ({counted(self.num_ranks, 'rank')})"

    @property
    def group(self) -> str:
        """Name of the placement group."""
        return f"ray_streamer {self.model} x{self.num_ranks} {self.token}"

    @property
    def keeper(self) -> str:
        """Name of the actor that removes the placement group after its owner."""
        return f"ray_streamer keeper of {self.model} {self.token}"

    def rank(self, rank: int, generation: int = 0) -> str:
        """Name of one rank's actor; a restarted one is of the next generation.

        >>> GroupName("llama", 4, "c0ffee").rank(3)
        'llama rank 3 of 4 c0ffee'
        """
        again = f".{generation}" if generation else ""
        return f"{self.model} rank {rank} of {self.num_ranks} {self.token}{again}"


def model_of(uri: str) -> str:
    """The word by which people know what is at a uri: its last folder.

    >>> model_of("s3://bucket/meta/llama-3-70b/"), model_of("/models/tiny/model.safetensors")
    ('llama-3-70b', 'tiny')
    """
    parts = [part for part in uri.partition("://")[2].split("/") if part] or [p for p in uri.split("/") if p]
    if len(parts) > 1 and parts[-1].endswith(FILE_NAMES):
        parts.pop()
    return "".join(c if c.isprintable() else "?" for c in parts[-1])[:_MAX_MODEL_CHARACTERS] if parts else "model"
