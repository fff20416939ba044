"""Which texts does a store's XML hold, where only a few matter?

Parsed as it comes, without a tree: a hostile answer costs no more memory than what is kept of it. Document types, which could make a little
text into a lot, are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar
from xml.parsers import expat

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

_MAX_DEPTH = 16


class XmlPage:
    """One answer; a subclass says what it wants, and takes it.

    Attributes:
        ROOT: Name of the outermost element.
        WANTED: Elements whose texts are taken, each by the names from the root to it.
        path: The element that is being read.
    """

    ROOT: ClassVar[str]
    WANTED: ClassVar[Set[tuple[str, ...]]]

    def __init__(self) -> None:
        self.path: tuple[str, ...] = ()
        self._text: list[str] | None = None

    def feed(self, body: bytes) -> None:
        """Reads the whole answer.

        Raises:
            ValueError: It is none of these.
        """
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = self._refuse_document_type
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._add
        try:
            parser.Parse(body, True)
        except expat.ExpatError as error:
            raise ValueError(f"no XML: {expat.ErrorString(error.code)}, line {error.lineno}") from None

    def name_of(self, name: str) -> str:
        """An element's name, as `ROOT` and `WANTED` have it."""
        return name

    def begin(self, attributes: Mapping[str, str]) -> None:
        """The element at `path` begins."""

    def take(self, text: str) -> None:
        """The wanted element at `path` has this text."""

    def end(self) -> None:
        """The element at `path` ends."""

    def _refuse_document_type(self, *_: object) -> None:
        raise ValueError("a document type")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self.path += (self.name_of(name),)
        if self.path[0] != self.ROOT or len(self.path) > _MAX_DEPTH:
            raise ValueError(f"no {self.ROOT}")
        self.begin(attributes)
        self._text = [] if self.path in self.WANTED else None

    def _add(self, text: str) -> None:
        if self._text is not None:
            self._text.append(text)

    def _end(self, _: str) -> None:
        if self._text is not None:
            self.take("".join(self._text))
        self.end()
        self._text = None
        self.path = self.path[:-1]
