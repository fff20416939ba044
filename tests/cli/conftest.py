"""A small checkpoint, and the command line in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from ray_streamer.cli import main
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama: 21 tensors, 4 files, about 8 MB, a vocabulary that does not divide by 2."""
    layout = llama_layout(256, 2, 8, 4, 1024, 4001)
    return write_checkpoint(tmp_path_factory.mktemp("llama"), layout.tensors, num_files=4, config=layout.config)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Runs `ray-streamer` with these arguments."""

    def run(*args: Any) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args])

    return run
