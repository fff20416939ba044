"""Can the output files of a command be written? Asked before the work begins, not after it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_streamer.errors import SettingsError
from ray_streamer.report.output_file import check_file

if TYPE_CHECKING:
    from collections.abc import Callable


def check_folder(path: Path) -> None:
    """Make sure that a folder, which need not exist yet, can be made and written to.

    Raises:
        OSError: It cannot.
    """
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    with tempfile.TemporaryFile(dir=nearest):
        pass


class _Output(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic since click 8.4 only
    """A path that is checked as it is parsed."""

    def __init__(self, name: str, check: Callable[[Path], None]) -> None:
        self.name = name
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        try:
            self._check(path)
        except SettingsError as error:
            self.fail(str(error), param, ctx)
        except OSError as error:
            folder = path.parent
            missing = f"; the folder {folder} does not exist" if not folder.exists() else ""
            self.fail(f"cannot write to {path}: {error.strerror or os.strerror(error.errno or 0)}{missing}", param, ctx)
        return path


OUTPUT_FILE = _Output("file", check_file)
"""A file that a command writes at its end."""


def check_page(path: Path) -> None:
    """Make sure that a page can be drawn, and written there.

    Raises:
        OSError: It cannot be written.
        SettingsError: It cannot be drawn.
    """
    from ray_streamer.report.page.document import find_plotly_js

    find_plotly_js()
    check_file(path)


OUTPUT_PAGE = _Output("file", check_page)
"""A page for a browser that a command writes at its end."""

OUTPUT_FOLDER = _Output("directory", check_folder)
"""A folder that a command makes and fills."""
