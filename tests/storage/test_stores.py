"""The page of uris is made from the stores, and each store can be opened."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.storage import scheme_of
from ray_streamer.storage.stores import STORES

ROOT = Path(__file__).parents[2]


def test_the_page_of_uris_is_current():
    path = ROOT / "docs" / "write_stores.py"
    spec = importlib.util.spec_from_file_location("write_stores", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() in module.PAGE.read_text(), "run make docs"


def test_what_the_errors_say_to_install_is_there_to_be_installed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {kind.extra for kind in STORES if kind.extra} <= extras.keys()
    # The tests of each store have what it needs.
    assert all(set(extras[kind.extra]) <= set(extras["test"]) for kind in STORES if kind.extra)


def test_an_unknown_scheme_is_told_which_are_known():
    with pytest.raises(SettingsError, match="scheme ftp:// is not known") as caught:
        scheme_of("ftp://host/m")
    assert all(f"{kind.schemes[0]}://" in str(caught.value) for kind in STORES)


@pytest.mark.parametrize("kind", STORES, ids=lambda kind: kind.name)
def test_every_store_has_its_way_in(kind):
    assert callable(import_module(kind.module).open_store)
    assert {form.form.partition("://")[0] for form in kind.forms} <= {*kind.schemes, *(["https"] if kind.hosts else [])}
