"""One value for each knob: argument, then environment, then default; a bad one is blamed on where it came from."""

from __future__ import annotations

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.settings import MIB, Settings


def test_an_argument_beats_the_environment_beats_the_default(monkeypatch):
    assert Settings.resolve().concurrency == 16
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "3")
    assert Settings.resolve().concurrency == 3
    assert Settings.resolve(concurrency=None).concurrency == 3
    assert Settings.resolve(concurrency=5).concurrency == 5


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("512MiB", 512 * MIB), ("0", 0), ("-1", -1), ("1048576", MIB), (" -1 ", -1)]
)
def test_memory_limits_are_sizes_or_minus_one(monkeypatch, text, num_bytes):
    assert Settings.resolve(memory_limit=text).memory_limit == num_bytes
    monkeypatch.setenv("RAY_STREAMER_MEMORY_LIMIT", text)
    assert Settings.resolve().memory_limit == num_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", 0),
        ("memory_limit", -2),
        ("memory_limit", "much"),
        ("block_bytes", 5000),
        ("direct_io", "maybe"),
        ("no_such_knob", 1),
    ],
)
def test_a_bad_argument_is_named(name, value):
    with pytest.raises(SettingsError, match=rf"^{name}="):
        Settings.resolve(**{name: value})


def test_a_bad_variable_is_named_even_when_its_argument_was_left_out(monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "many")
    with pytest.raises(SettingsError, match=r"environment variable RAY_STREAMER_CONCURRENCY='many'"):
        Settings.resolve(concurrency=None)


def test_override_keeps_what_is_not_given(monkeypatch):
    settings = Settings.resolve(concurrency=4, block_bytes=MIB)
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "9")
    assert settings.override(memory_limit="1MiB", concurrency=None) == Settings.resolve(
        concurrency=4, block_bytes=MIB, memory_limit=MIB
    )
    with pytest.raises(SettingsError, match="concurrency=0"):
        settings.override(concurrency=0)
