"""Writes the tables of docs/stores.md from the rows of the stores themselves; a test checks that the page is not stale."""

from __future__ import annotations

from pathlib import Path

from ray_streamer.storage.stores import STORES, StoreKind, UriForm

PAGE = Path(__file__).with_name("stores.md")
BEGIN, END = "<!-- uris: begin -->", "<!-- uris: end -->"


def table() -> str:
    """The table of uris, between its markers."""
    rows = [
        f"| `{form.form}` | {form.meaning} | {form.credentials} | {_install(kind, form)} |"
        for kind in STORES
        for form in kind.forms
    ]
    head = ["| uri | what it is | credentials | what to install |", "|---|---|---|---|"]
    return "\n".join([BEGIN, *head, *rows, END])


def _install(kind: StoreKind, form: UriForm) -> str:
    return f"`pip install '.[{kind.extra}]'`" if kind.extra and form.needs_extra else ""


def main() -> None:
    """Put the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + table() + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
