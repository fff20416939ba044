"""Names that a terminal would obey: of folders, files, tensors and models, they come out escaped, in tables, logs and errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import save_file

from ray_streamer.testing.checkpoints import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

CLEAR = "\x1b[2J\x1b]0;title\x07"
NAMES = [f"a{CLEAR}.weight", "b\r\nforged line.weight", "c\u202egnp.weight", "d\x9b31m.weight", "[red]e[/red].weight"]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    import numpy as np

    folder = tmp_path / f"model{CLEAR}"
    folder.mkdir()
    save_file({name: np.ones((4, 4), np.float32) for name in NAMES}, folder / f"x{CLEAR}.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": f"llama{CLEAR}"}))
    return folder


def check(result: Result) -> None:
    shown = result.output
    assert CLEAR not in shown
    assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(shown)
    assert "\nforged line" not in shown


@pytest.mark.parametrize("options", [(), ("-vv",)])
def test_tables_and_logs(invoke: Callable[..., Result], hostile: Path, options: tuple[str, ...]) -> None:
    inspected = invoke("inspect", hostile, *options)
    planned = invoke("plan", hostile, "--tp", 2, "--rule", "*=split:0", "--top", 5, *options)
    for result in (inspected, planned):
        assert result.exit_code == 0, result.output
        check(result)
        assert r"a\x1b[2J\x1b]0;title\x07.weight" in result.output
        assert "[red]e[/red].weight" in result.output


@pytest.mark.parametrize("options", [(), ("-v",)])
@pytest.mark.parametrize("command", [("inspect",), ("plan", "--tp", "3", "--rule", "*=split:0"), ("plan", "--tp", "2")])
def test_errors(
    invoke: Callable[..., Result], hostile: Path, command: tuple[Any, ...], options: tuple[str, ...]
) -> None:
    if command[0] == "inspect":
        (hostile / f"x{CLEAR}.safetensors").write_bytes(b"\xff" * 100)
    result = invoke(*command, hostile, *options)
    assert result.exit_code == 1
    check(result)
    assert r"model\x1b[2J" in result.output


def test_json_is_escaped_by_json(invoke: Callable[..., Result], hostile: Path) -> None:
    result = invoke("inspect", hostile, "--json")
    check(result)
    assert {tensor["name"] for tensor in json.loads(result.output)["largest"]} == set(NAMES)


def test_inspect_says_what_is_missing(invoke: Callable[..., Result], tmp_path: Path) -> None:
    tensors = [(f"model.layers.{number}.self_attn.o_proj.weight", "F32", (8, 8)) for number in (0, 2)]
    config = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4}
    write_checkpoint(tmp_path, tensors, config=config)
    assert (
        "Incomplete: 1 of the 3 layers of config.json is missing, such as layer 1."
        in invoke("inspect", tmp_path).output
    )
    told = ["1 of the 3 layers of config.json is missing, such as layer 1"]
    assert json.loads(invoke("inspect", tmp_path, "--json").output)["missing"] == told
    assert json.loads(invoke("inspect", tmp_path / "model.safetensors", "--json").output)["missing"] == []


def test_inspect_of_one_tensor_in_one_file(invoke: Callable[..., Result], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [("a", "F32", (8, 8))])
    assert "1 tensor, 256 B, 1 file\n" in invoke("inspect", tmp_path).output
