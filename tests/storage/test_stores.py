"""The page of uris is made from the stores, and each store can be opened."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path

import pytest

from ray_streamer.storage.stores import STORES


def test_the_page_of_uris_is_current():
    path = Path(__file__).parents[2] / "docs" / "write_stores.py"
    spec = importlib.util.spec_from_file_location("write_stores", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() in module.PAGE.read_text(), "run make docs"


@pytest.mark.parametrize("kind", STORES, ids=lambda kind: kind.name)
def test_every_store_has_its_way_in(kind):
    assert callable(import_module(kind.module).open_store)
    assert {form.form.partition("://")[0] for form in kind.forms} <= {*kind.schemes, *(["https"] if kind.hosts else [])}
