"""What is one rank told? Everything that it needs for one load, as JSON on its standard input."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from side_by_side.parts import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One rank's part of one run.

    Attributes:
        loader: A name of `loaders.LOADERS`.
        uri: The checkpoint, in its place.
        files: Names of the checkpoint's files.
        scratch: An empty folder of this run, for downloads.
        port: Of this machine, where the ranks of torch's process group meet.
        rank: This rank.
        world_size: Ranks, all on one node.
        session: Name of this run.
        windows: What of each tensor the rank holds.
        staging_bytes: Staging memory per rank, for who knows such a limit.
        memory_cap_bytes: What the process may allocate.
    """

    loader: str
    uri: str
    files: list[str]
    scratch: str
    port: int
    rank: int
    world_size: int
    session: str
    windows: Windows
    staging_bytes: int
    memory_cap_bytes: int

    @property
    def weight_files(self) -> list[str]:
        """Those with tensors."""
        return [name for name in self.files if name.endswith(".safetensors")]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Task:
        """The task of a line."""
        return cls(**json.loads(line))
