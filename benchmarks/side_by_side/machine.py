"""Where, when and with what was it measured? The machine and the versions of everybody."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from side_by_side.contenders import CONTENDERS

_BESIDE = ("ray", "runai-model-streamer-s3", "numpy")


def facts() -> dict[str, Any]:
    """What a reader must know to compare: nothing that identifies the machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"Python": platform.python_version(), **_packages(), **_programs()},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in dict.fromkeys([*(contender.package for contender in CONTENDERS.values()), *_BESIDE]):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _programs() -> dict[str, str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    versions: dict[str, str] = {}
    for program, option in (("nginx", "-v"), ("radosgw", "--version")):
        found = shutil.which(program, path=path)
        if found:
            done = subprocess.run([found, option], capture_output=True, text=True, check=False, timeout=30)
            words = (done.stdout or done.stderr).replace("nginx/", "nginx/ ").split()
            versions[program] = next((word for word in words if word[0].isdigit()), "unknown")
    return versions
