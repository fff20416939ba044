"""Writes docs/settings.md from the settings themselves; a test checks that the page is not stale."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

from ray_streamer.cli.settings import default_text
from ray_streamer.settings import ENV_PREFIX, Settings

PAGE = Path(__file__).with_name("settings.md")

_HEAD = f"""\
# Settings

One value for each setting, in this order: an argument, the environment variable `{ENV_PREFIX}NAME`, the default. In Python,
`Settings.resolve(block_bytes="4MiB")` makes the settings for `settings=...`; `concurrency`, `memory_limit` and
`node_memory_limit` are arguments of `load_sharded` as well. On the command line, `block_bytes` is `--block-bytes`.
Byte sizes accept text such as `512MiB`.

This page is made by `make docs`.

| setting | default | meaning |
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
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
