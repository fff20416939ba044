"""Writes docs/settings.md from the settings themselves; a test checks that the page is not stale."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

from ray_streamer.cli.settings import default_text
from ray_streamer.settings import ALIASES, ENV_PREFIX, REPLACE_RUNAI, Settings

PAGE = Path(__file__).with_name("settings.md")

_HEAD = f"""\
# Settings

- **Precedence**: an argument, the environment variable `{ENV_PREFIX}NAME`, a variable of Run:ai's streamer (below), the default.
- **Python**: `settings=Settings.resolve(block_bytes="4MiB")`. `concurrency`, `memory_limit` and `node_memory_limit` are also arguments of
  `load_sharded`, `load_rank`, `stream_rank` and `plan`, and win over `settings=`.
- **Command line**: `--block-bytes 4MiB`. Secrets have no option.
- **Environment**: `{ENV_PREFIX}BLOCK_BYTES=4MiB`. A variable `{ENV_PREFIX}...` that is no setting is a warning that names the nearest one.

Byte sizes accept text such as `512MiB`. A value that cannot be used is an error that names where it came from. [s3.md](s3.md) describes how S3 is
reached.

This page is made by `make docs`.

| setting | default | meaning |
|---|---|---|
"""

_ALIAS_HEAD = f"""
## Variables of Run:ai's streamer

Whoever moves from Run:ai Model Streamer can keep the environment: these variables are read where `{ENV_PREFIX}NAME` is not set.
`AWS_*` variables mean what they mean to boto3. Others of `RUNAI_STREAMER_*` have no counterpart and are not read; among them
`RUNAI_STREAMER_OBJ_CONCURRENCY`, which counts clients that keep many requests each, where `concurrency` counts requests.

`{REPLACE_RUNAI}=1` makes the vLLM plugin answer for load format `runai_streamer`: see [vllm.md](vllm.md).

| variable | setting | difference |
|---|---|---|
"""


def render() -> str:
    """The page."""
    rows: list[str] = []
    for name, field in Settings.model_fields.items():
        meaning = field.description or ""
        if get_origin(field.annotation) is Literal:
            meaning += f" One of {', '.join(f'`{choice}`' for choice in get_args(field.annotation))}."
        rows.append(f"| `{name}` | {default_text(field) or 'unset'} | {meaning} |\n")
    aliases = [f"| `{alias.variable}` | `{alias.setting}` | {alias.note} |\n" for alias in ALIASES]
    return _HEAD + "".join(rows) + _ALIAS_HEAD + "".join(aliases)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
