"""What does a model of transformers say where a library that it needs is not installed?"""

from __future__ import annotations

import importlib.util

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.integrations.transformers import support


@pytest.mark.parametrize("absent", ["transformers", "accelerate"])
def test_what_is_absent_is_named_with_what_installs_it(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found(name))
    with pytest.raises(
        SettingsError, match=rf'^{absent} is not installed here: pip install "ray_streamer\[transformers\]"'
    ):
        support.require_transformers()
