"""Can a report be written to this path? Asked before the work whose result it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def check_file(path: Path) -> None:
    """Opens a file for writing and leaves it as it was.

    Raises:
        OSError: It cannot be written.
    """
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        path.unlink()
