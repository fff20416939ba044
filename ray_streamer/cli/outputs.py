"""Can the output files of a command be written? Asked before the work begins, not after it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_streamer.errors import SettingsError
from ray_streamer.report.output_file import check_file, is_same_file, why_unwritten

if TYPE_CHECKING:
    from collections.abc import Callable

_OUTPUTS = "ray_streamer.outputs"


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
            self._refuse_twice(path, param, ctx)
            self._check(path)
        except SettingsError as error:
            self.fail(str(error), param, ctx)
        except OSError as error:
            self.fail(f"cannot write to {path}: {why_unwritten(path, error)}", param, ctx)
        return path

    def _refuse_twice(self, path: Path, param: click.Parameter | None, ctx: click.Context | None) -> None:
        """One file for two outputs of a command would keep one of them."""
        if param is None or ctx is None:
            return
        outputs: dict[str, Path] = ctx.meta.setdefault(_OUTPUTS, {})
        for option, other in outputs.items():
            if option != param.opts[0] and is_same_file(path, other):
                self.fail(f"{path} is the file of {option}, too; give each output a file of its own", param, ctx)
        outputs[param.opts[0]] = path


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
