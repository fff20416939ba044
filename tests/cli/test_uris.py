"""A file of addresses is read as editors and browsers write it, and what it has of secrets is shown nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ray_streamer.cli.uris import URI

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

ADDRESS = "https://127.0.0.1:9/m/model.safetensors"
SIGNED = f"{ADDRESS}?token=planted0123456789"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param(f'"{SIGNED}"', "line 1, (not shown) has quotes or brackets around it; remove them", id="quotes"),
        pytest.param(f"# signed\n\n{SIGNED}\n'{SIGNED}',", "line 4, (not shown) has quotes", id="second-address"),
        pytest.param(f'["{SIGNED}"]', "line 1, (not shown) has quotes or brackets", id="json"),
        pytest.param(f"<{SIGNED}>", "line 1, (not shown) has quotes or brackets", id="angles"),
        pytest.param('"https://me:planted@127.0.0.1:9/m"', "line 1, (not shown) has quotes", id="quoted-user"),
        pytest.param(SIGNED.replace(":", "", 1), "line 1, (not shown) is neither a uri nor a path", id="no-colon"),
        pytest.param("me:planted@127.0.0.1/m", "line 1, (not shown) is neither a uri nor a path", id="user"),
        pytest.param("sig=planted", "line 1, (not shown) is neither a uri nor a path", id="query"),
        pytest.param("/models?sig=planted", "line 1, (not shown) is neither a uri nor a path", id="path-with-a-query"),
        pytest.param("127.0.0.1/m", "line 1, '127.0.0.1/m' is neither a uri nor a path", id="nothing-secret"),
        pytest.param("https://me:planted@127.0.0.1:9/m", "has credentials in it", id="user-of-a-uri"),
        pytest.param("hf://planted@org/model", "has credentials in it", id="user-of-the-hub"),
    ],
)
def test_a_line_that_is_no_address_is_told_by_its_number(
    invoke: Callable[..., Result], tmp_path: Path, text: str, fault: str
) -> None:
    (tmp_path / "files").write_text(text, encoding="utf-8")
    result = invoke("plan", f"@{tmp_path / 'files'}", "--tp", "1")
    told = result.output + str(result.exception)
    assert result.exit_code != 0
    assert fault in " ".join(told.split())
    assert "planted" not in told


def test_what_a_file_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[odd] name=1").mkdir()
    for lines in (
        [SIGNED],
        [SIGNED, ADDRESS],
        ["[odd] name=1"],
        ["/models/on/the/nodes"],
        ["file:/m?x=1"],
        ["S3://bucket/m"],
    ):
        for mark in ("", "\ufeff"):
            (tmp_path / "files").write_text(mark + "# told\r\n" + "\r\n".join(lines), encoding="utf-8")
            assert URI.convert("@files", None, None) == (lines if len(lines) > 1 else lines[0])
            (tmp_path / "files").write_text(mark + "\n".join(lines), encoding="utf-8")
            assert URI.convert("@files", None, None) == (lines if len(lines) > 1 else lines[0])
