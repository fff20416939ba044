"""Where are the checkpoint's files on this disk? Where it lies, or in a copy that the first rank downloads while the others wait."""

from __future__ import annotations

import fcntl
import shutil
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from side_by_side.task import Task


class Files:
    """The files of one run, in one rank; must be made before any rank fetches.

    Attributes:
        folder: Where they are, once they are fetched.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._is_local = "://" not in task.uri
        self.folder = Path(task.uri) if self._is_local else Path(task.scratch)
        self._lock = (Path(task.scratch) / "downloading").open("w")
        if not self._is_local and task.rank == 0:
            # Held until the last file is there; it ends with this process, whatever becomes of it.
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        if task.uri.startswith("s3://"):
            import boto3  # noqa: F401

    def fetch(self) -> list[str]:
        """Brings the files here if they are not; paths of those with tensors.

        Raises:
            FileNotFoundError: The first rank could not download them.
        """
        if not self._is_local:
            if self._task.rank == 0:
                _download(self._task, self.folder)
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            else:
                fcntl.flock(self._lock, fcntl.LOCK_SH)
        paths = [self.folder / name for name in self._task.weight_files]
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"the first rank did not download {path.name}")
        return [str(path) for path in paths]


def _download(task: Task, folder: Path) -> None:
    if task.uri.startswith("s3://"):
        _from_s3(task, folder)
    else:
        with ThreadPoolExecutor(len(task.files)) as pool:
            list(pool.map(lambda name: _from_web(f"{task.uri}/{name}", folder / name), task.files))


def _from_s3(task: Task, folder: Path) -> None:
    """One file after the other; boto3 asks for parts of each in ten threads."""
    import boto3

    bucket, _, prefix = task.uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    for name in task.files:
        client.download_file(bucket, f"{prefix}/{name}", str(folder / name))


def _from_web(url: str, path: Path) -> None:
    with urllib.request.urlopen(url) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file, 1 << 20)
