"""Which part of a job's log is its report? The last JSON object that stands on lines of its own; all else is for people to see.

A job has one log for standard output and standard error, so that what `--json` prints stands among the lines of progress.
"""

from __future__ import annotations

import json
from typing import Any

_OPENS, _CLOSES = "{", "}"


class JobLog:
    """A log that comes in parts.

    Attributes:
        report: The last object that was found; None before one was.
    """

    def __init__(self) -> None:
        self.report: dict[str, Any] | None = None
        self._unfinished = ""
        self._held: list[str] = []

    def take(self, text: str) -> str:
        r"""The part of the log that is to be shown now; lines are held back while they may be the report's.

        >>> log = JobLog()
        >>> log.take('loading\n{\n "seconds": 1'), log.take('\n}\ndone\n'), log.report
        ('loading\n', 'done\n', {'seconds': 1})
        """
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        return "".join(self._shown(f"{line}\n") for line in lines)

    def finish(self) -> str:
        """What is left to be shown when no more comes."""
        shown = self._shown(self._unfinished) if self._unfinished else ""
        shown += "".join(self._held)
        self._unfinished, self._held = "", []
        return shown

    def _shown(self, line: str) -> str:
        bare = line.rstrip()
        if bare == _OPENS:
            # Another one that opens before the first has closed: the first was none.
            shown, self._held = "".join(self._held), [line]
            return shown
        if not self._held:
            return line
        self._held.append(line)
        if bare != _CLOSES:
            return ""
        held, self._held = "".join(self._held), []
        try:
            self.report = json.loads(held)
        except ValueError:
            return held
        return ""
