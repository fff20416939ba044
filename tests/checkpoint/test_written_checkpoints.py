"""The checkpoints that tests, demo and benchmarks write: real headers, real layouts, reproducible bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.checkpoint.folder_hints import INDEX_NAME
from ray_streamer.checkpoint.json_files import CONFIG_NAME
from ray_streamer.dtypes import DTYPES, dtype_named
from ray_streamer.testing.checkpoints import (
    TensorSpec,
    deepseek_v3_layout,
    llama_layout,
    mixtral_layout,
    phi3_layout,
    qwen3_moe_layout,
    serialize_header,
    tensor_content,
    write_checkpoint,
)

SPECS = [TensorSpec("z.weight", "BF16", (4, 8)), TensorSpec("a.weight", "U8", (7,)), TensorSpec("b", "BF16", ())]


def as_safetensors_writes(specs: list[TensorSpec], contents: list[bytes]) -> bytes:
    buffers = [np.frombuffer(content, np.uint8) for content in contents]
    return bytes(
        safetensors.serialize(
            {
                spec.name: safetensors.TensorSpec(
                    dtype=dtype_named(spec.dtype).torch_name,
                    shape=dtype_named(spec.dtype).torch_shape(spec.shape),
                    data_ptr=buffer.ctypes.data,
                    data_len=buffer.nbytes,
                )
                for spec, buffer in zip(specs, buffers, strict=True)
            },
            {"format": "pt"},
        )
    )


@st.composite
def spec_lists(draw: st.DrawFn) -> list[TensorSpec]:
    names = draw(st.lists(st.text('abAB.01_-"\\\n\u00e9\U0001f600', max_size=6), unique=True, max_size=8))
    # The F6 types have no name in safetensors' Python writer.
    dtypes = st.sampled_from([dtype.name for dtype in DTYPES if not dtype.name.startswith("F6")])
    shapes = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3).map(lambda shape: (*shape, 2))
    return [TensorSpec(name, draw(dtypes), draw(shapes)) for name in names if name != "__metadata__"]


@given(spec_lists())
def test_bytes_are_those_that_safetensors_writes(specs):
    contents = [tensor_content(spec, seed=3) for spec in specs]
    expected = as_safetensors_writes(specs, contents)
    head = serialize_header(specs, {"format": "pt"})
    assert expected[: len(head)] == head
    assert len(expected) == len(head) + sum(map(len, contents))


def test_written_file_is_the_one_that_safetensors_writes(tmp_path):
    write_checkpoint(tmp_path, SPECS, seed=3)
    expected = as_safetensors_writes(SPECS, [tensor_content(spec, seed=3) for spec in SPECS])
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_content_depends_on_seed_and_name_only():
    spec = TensorSpec("w", "F32", (100_000,))
    content = tensor_content(spec, seed=1)
    assert len(content) == spec.num_bytes
    assert content == tensor_content(TensorSpec("w", "U8", (400_000,)), seed=1)
    assert content[:5] == tensor_content(TensorSpec("w", "U8", (5,)), seed=1)
    assert content != tensor_content(spec, seed=2)
    assert content != tensor_content(spec._replace(name="v"), seed=1)
    # No two of its 4 KiB pages are equal, so a page in the wrong place shows.
    assert len({content[start : start + 4096] for start in range(0, 397_312, 4096)}) == 97


def test_split_checkpoint_has_the_layout_of_the_hub(tmp_path):
    layout = llama_layout(hidden=64, layers=3, heads=4, kv_heads=2, intermediate=128, vocab=300)
    write_checkpoint(tmp_path, layout.tensors, num_files=4, seed=9, config=layout.config)
    shards = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", *shards, "model.safetensors.index.json"]
    document = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert document["metadata"] == {"total_size": layout.total_bytes}
    sizes = [(tmp_path / name).stat().st_size for name in shards]
    assert max(sizes) < 1.5 * min(sizes)
    found: dict[str, str] = {}
    for name in shards:
        for tensor, value in safetensors.torch.load_file(tmp_path / name).items():
            found[tensor] = name
            content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            spec = next(spec for spec in layout.tensors if spec.name == tensor)
            assert content == tensor_content(spec, seed=9)
            assert tuple(value.shape) == spec.shape
    assert found == document["weight_map"]
    assert set(found) == {spec.name for spec in layout.tensors}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.data())
def test_every_file_gets_a_tensor_and_every_tensor_a_file(tmp_path_factory, sizes, data):
    num_files = data.draw(st.integers(1, len(sizes)))
    folder = tmp_path_factory.mktemp("split")
    write_checkpoint(folder, [(f"t{n}", "U8", (size,)) for n, size in enumerate(sizes)], num_files=num_files)
    names = [list(safetensors.torch.load_file(path)) for path in sorted(folder.glob("*.safetensors"))]
    assert len(names) == num_files
    assert all(names)
    assert sorted(name for file in names for name in file) == sorted(f"t{n}" for n in range(len(sizes)))


def test_more_files_than_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 tensors cannot fill num_files=2"):
        write_checkpoint(tmp_path, [("a", "U8", (1,))], num_files=2)
    with pytest.raises(ValueError, match="num_files=0"):
        write_checkpoint(tmp_path, [("a", "U8", (1,))], num_files=0)


def test_without_index(tmp_path):
    write_checkpoint(tmp_path, SPECS, num_files=2, index=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_sparse_files_take_no_disk(tmp_path):
    write_checkpoint(tmp_path, [("a", "F32", (1 << 28,))], sparse=True)
    status = (tmp_path / "model.safetensors").stat()
    assert status.st_size > 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.get_slice("a").get_shape() == [1 << 28]


@pytest.mark.parametrize(
    ("layout", "num_tensors", "total_bytes"),
    [
        (llama_layout(4096, 32, 32, 8, 14336, 128256), 291, 16_060_522_496),
        (llama_layout(8192, 80, 64, 8, 28672, 128256), 723, 141_107_412_992),
        (mixtral_layout(4096, 32, 32, 8, 14336, 32000), 995, 93_405_585_408),
        (qwen3_moe_layout(2048, 48, 32, 4, 768, 151936), 18867, 61_064_245_248),
        (deepseek_v3_layout(), 91_991, 688_574_839_360),
    ],
    ids=["llama-3-8b", "llama-3-70b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"],
)
def test_layouts_have_the_counts_and_sizes_of_published_checkpoints(layout, num_tensors, total_bytes):
    assert len({spec.name for spec in layout.tensors}) == len(layout.tensors) == num_tensors
    assert layout.total_bytes == total_bytes


SIZES = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 130}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(llama_layout(**SIZES, intermediate=96), id="llama"),
        pytest.param(llama_layout(**SIZES, intermediate=96, tied=True), id="llama-tied"),
        pytest.param(phi3_layout(**SIZES, intermediate=96), id="phi3"),
        pytest.param(mixtral_layout(**SIZES, intermediate=96, experts=4), id="mixtral"),
        pytest.param(qwen3_moe_layout(**SIZES, moe_intermediate=32, experts=4, head_dim=32), id="qwen3-moe"),
    ],
)
def test_layouts_have_the_names_and_shapes_that_transformers_saves(tmp_path, layout):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**layout.config, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    saved = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert saved == {spec.name: ("torch.bfloat16", spec.shape) for spec in layout.tensors}


def test_deepseek_v3_is_opened_with_one_read_for_each_file(tmp_path, recording):
    layout = deepseek_v3_layout()
    write_checkpoint(tmp_path, layout.tensors, num_files=163, config=layout.config, sparse=True)
    storage = recording(str(tmp_path))
    index = open_checkpoint(str(tmp_path), storage)
    assert len(index) == 91_991
    assert len(index.files) == 163
    assert index.total_bytes == layout.total_bytes
    assert max(file.size_bytes for file in index.files) < 5.0e9
    assert Counter(storage.heads) == Counter([file.path for file in index.files] + [INDEX_NAME, CONFIG_NAME])
    assert storage.ranges == []


def test_needs_neither_torch_nor_ray():
    program = (
        "import sys; import ray_streamer.testing.checkpoints, ray_streamer.checkpoint; "
        "sys.exit(len({'ray', 'torch', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
