"""How does a test get a checkpoint without a download? Files in Hugging Face layout, of any tensors.

`write_checkpoint` writes any list of tensors; the layouts of real models are in `ray_streamer.testing.layouts` and may be
imported from here too. Contents are reproducible bytes that depend on seed and tensor name alone, so that a test knows them
without reading. As floats they may be NaN: compare bytes.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.dtypes import DTYPE_CODES
from ray_streamer.testing.layouts import (
    ModelLayout,
    TensorSpec,
    deepseek_v3_layout,
    llama_layout,
    mixtral_layout,
    phi3_layout,
    qwen3_moe_layout,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "ModelLayout",
    "TensorSpec",
    "deepseek_v3_layout",
    "llama_layout",
    "mixtral_layout",
    "phi3_layout",
    "qwen3_moe_layout",
    "serialize_header",
    "tensor_content",
    "write_checkpoint",
]

_CHUNK_BYTES = 256 << 10


def write_checkpoint(
    folder: Path | str,
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    *,
    num_files: int = 1,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    index: bool = True,
    sparse: bool = False,
) -> Path:
    """Write a checkpoint in Hugging Face layout.

    Args:
        folder: Made when it does not exist.
        tensors: (name, dtype, shape) of each tensor; neighbours share a file.
        num_files: 1 gives `model.safetensors`; more are cut by size and named `model-00001-of-00004.safetensors`.
        seed: Same seed, same bytes.
        config: Written as `config.json`.
        index: Whether several files get a `model.safetensors.index.json`.
        sparse: Whether data is a hole in the file, which reads as zeros and takes no disk.

    Returns:
        The folder.

    Raises:
        ValueError: There are fewer tensors than files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(*tensor) for tensor in tensors]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(_split_by_size(specs, num_files), start=1):
        name = "model.safetensors" if num_files == 1 else f"model-{number:05}-of-{num_files:05}.safetensors"
        _write_shard_file(folder / name, group, seed=seed, sparse=sparse)
        weight_map |= {spec.name: name for spec in group}
    if index and num_files > 1:
        total_bytes = sum(spec.num_bytes for spec in specs)
        document = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def serialize_header(tensors: Iterable[TensorSpec], metadata: dict[str, str] | None = None) -> bytes:
    """The first bytes of a shard file, up to its data, as safetensors writes them: wide dtypes first, then by name."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    stop = 0
    for spec in sorted(tensors, key=_file_order):
        start, stop = stop, stop + spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_content(spec: TensorSpec, *, seed: int) -> bytes:
    """The bytes that `write_checkpoint` gives this tensor."""
    return b"".join(_content_chunks(spec, seed))


def _file_order(spec: TensorSpec) -> tuple[int, str]:
    return -DTYPE_CODES[spec.dtype], spec.name


def _split_by_size(specs: list[TensorSpec], num_files: int) -> Iterator[list[TensorSpec]]:
    """Cut the list into `num_files` groups of neighbours, none of them empty, of about equal bytes."""
    if not 1 <= num_files <= max(1, len(specs)):
        raise ValueError(f"{len(specs)} tensors cannot fill num_files={num_files}")
    total_bytes = sum(spec.num_bytes for spec in specs)
    group: list[TensorSpec] = []
    done_bytes, file = 0, 1
    for position, spec in enumerate(specs):
        group.append(spec)
        done_bytes += spec.num_bytes
        must_cut = len(specs) - position - 1 == num_files - file
        if file < num_files and (must_cut or done_bytes * num_files >= total_bytes * file):
            yield group
            group, file = [], file + 1
    yield group


def _write_shard_file(path: Path, specs: list[TensorSpec], *, seed: int, sparse: bool) -> None:
    head = serialize_header(specs, {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(head)
        if sparse:
            stream.truncate(len(head) + sum(spec.num_bytes for spec in specs))
            return
        for spec in sorted(specs, key=_file_order):
            for chunk in _content_chunks(spec, seed):
                stream.write(chunk)


def _content_chunks(spec: TensorSpec, seed: int) -> Iterator[memoryview]:
    generator = np.random.SFC64([seed, zlib.crc32(spec.name.encode())])
    for start in range(0, spec.num_bytes, _CHUNK_BYTES):
        num_bytes = min(_CHUNK_BYTES, spec.num_bytes - start)
        yield generator.random_raw(-(-num_bytes // 8)).data.cast("B")[:num_bytes]
