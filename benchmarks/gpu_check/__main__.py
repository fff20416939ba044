"""One command that says what this project does on a GPU: is it right, how fast, and where is the time?

    make gpu-check
    make gpu-check GPU_CHECK_ARGS="--megabytes 8000 --cold-folder /mnt/nvme/check --json gpu.json"

Needs the repository, torch, numpy, pyarrow and safetensors; neither Ray nor an installation. Without a GPU, or with `--fake`,
everything runs on a CUDA runtime that has none: that proves the script, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

NEEDED = ("torch", "numpy", "pyarrow", "safetensors")
SHARED_MEMORY = Path("/dev/shm")


def find_missing() -> list[str]:
    """Packages that do not import."""
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


def warm_folder(megabytes: int) -> Path:
    """Shared memory where there is room for the files, else the folder of temporary ones, whose files the page cache holds."""
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * megabytes * 1_000_000
    return SHARED_MEMORY if has_room else Path(tempfile.gettempdir())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All checks, each printed when it is done."""
    import copies
    import correctness
    import loads
    import peers
    import sharing
    import storage
    import torch
    from ground import Ground
    from plans import write_llama
    from table import show

    ground = Ground(options.fake or not torch.cuda.is_available(), options.megabytes)
    warm = options.folder or warm_folder(options.megabytes)
    result: dict[str, Any] = {"machine": ground.describe() | {"folder": str(warm)}}
    show("machine", result["machine"])
    if ground.is_fake:
        print("\nNO MEASUREMENT: no GPU is used, what follows proves only that the check itself runs.")
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=warm))
    try:
        checks = {
            "correctness": lambda: correctness.check(ground, folder / "kinds"),
            "copies": lambda: copies.check(ground),
            "loads": lambda: loads.check(ground, write_llama(folder / "llama", options.megabytes)),
            "sharing": lambda: sharing.check(ground, folder / "llama", num_processes=options.processes),
            "storage": lambda: storage.check(seconds=options.storage_seconds),
            "peers, warm": lambda: peers.check(ground, folder / "llama", state="warm"),
        }
        if options.cold_folder is not None:
            cold = write_llama(options.cold_folder, options.megabytes)
            checks["peers, cold"] = lambda: peers.check(ground, cold, state="cold")
        for name, check in checks.items():
            result[name] = check()
            show(name, result[name])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def faults(result: dict[str, Any]) -> list[str]:
    """Tensors that are wrong."""
    return result["correctness"]["wrong"] + [name for row in result["sharing"] for name in row["wrong"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", action="store_true", help="use no GPU: no measurement")
    parser.add_argument("--megabytes", type=int, default=4000, help="size of the checkpoint")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4], help="ranks that share the GPU")
    parser.add_argument(
        "--folder", type=Path, help="where warm files are written and removed again; unset = shared memory, or /tmp"
    )
    parser.add_argument("--cold-folder", type=Path, help="on a disk: compare with files out of the page cache, too")
    parser.add_argument("--storage-seconds", type=float, default=1.0, help="of each row of the storage's table")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    missing = find_missing()
    if missing:
        print(
            f"gpu-check needs {', '.join(missing)}, which {sys.executable} does not have: pip install them",
            file=sys.stderr,
        )
        return 2
    result = run(options)
    text = json.dumps(result, indent=2)
    if options.json is not None:
        options.json.write_text(text + "\n")
    else:
        print(text)
    if faults(result):
        print(f"WRONG BYTES: {faults(result)[:10]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
