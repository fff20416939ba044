"""Draws the imports between the packages into docs/architecture.md, from the code itself: `make docs`.

The drawing and the figures stand between two markers; everything else on that page is written by hand.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ray_streamer"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: begin -->", "<!-- imports: end -->"


class Room(NamedTuple):
    """One package, or one module beside the packages."""

    name: str
    modules: list[Path]
    imports: set[str]


def rooms() -> list[Room]:
    """Every package of the project, and what it imports of the others, also for types alone."""
    by_name: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            by_name.setdefault(name, []).append(path)
    return [
        Room(name, modules, set().union(*(_imports(path) for path in modules)) - {name})
        for name, modules in by_name.items()
    ]


def _imports(path: Path) -> set[str]:
    found = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        )
    ]  # fmt: skip
    return {name.split(".")[1] for name in found if name.startswith("ray_streamer.")}


def drawing() -> str:
    """The arrows as a Mermaid graph: direct imports, less those that a longer way already shows."""
    found = rooms()
    direct = {room.name: room.imports for room in found}
    lines = ["```mermaid", "graph BT"]
    for room in found:
        lines += [f"  {room.name} --> {other}" for other in sorted(_shortest(room.name, direct))]
    return "\n".join([*lines, "```"])


def _shortest(name: str, direct: dict[str, set[str]]) -> set[str]:
    reached_later = {beyond for other in direct[name] for beyond in _reached(other, direct)}
    return direct[name] - reached_later


def _reached(name: str, direct: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(direct[name])
    while waiting:
        other = waiting.pop()
        if other not in reached:
            reached.add(other)
            waiting.extend(direct[other])
    return reached


def figures() -> str:
    """Modules and lines of each room, its longest module and its longest function."""
    lines = ["| package | modules | lines | longest module | longest function |", "|---|---|---|---|---|"]
    for room in rooms():
        sizes = {path: path.read_text().count("\n") for path in room.modules}
        longest = max(sizes, key=lambda path: sizes[path])
        function, length = max(
            (found for path in room.modules for found in _functions(path)), key=lambda found: found[1], default=("-", 0)
        )
        shown = longest.relative_to(PACKAGE).as_posix()
        lines.append(
            f"| `{room.name}` | {len(sizes)} | {sum(sizes.values())} | `{shown}` {sizes[longest]} | `{function}` {length} |"
        )
    return "\n".join(lines)


def _functions(path: Path) -> list[tuple[str, int]]:
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def main() -> None:
    """Write the page anew."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{drawing()}\n\n{figures()}\n{END}{after}")


if __name__ == "__main__":
    main()
