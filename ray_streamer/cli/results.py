"""What are tensors called, in which dtype are they kept, and which lie in one? The options that say it, as one types them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ray_streamer.cli.parsed import Parsed
from ray_streamer.errors import ShardingError
from ray_streamer.sharding.cast import CASTABLE
from ray_streamer.sharding.fuse import STANDARD_FUSIONS, checked_fusions
from ray_streamer.sharding.rename import renaming

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.sharding.fuse import FuseLike

STANDARD = "standard"
"""What `--fuse` alone means."""


def parse_fusion(text: str) -> tuple[str, tuple[str, ...]]:
    """A fused module's name and those of its modules.

    >>> parse_fusion("qkv=q,k,v")
    ('qkv', ('q', 'k', 'v'))

    Raises:
        ValueError: It is no such thing; says what one looks like.
    """
    name, separator, modules = text.partition("=")
    names = tuple(module.strip() for module in modules.split(","))
    if not separator or not name or not all(names) or len(set(names)) < max(2, len(names)):
        raise ValueError(
            f"{text!r} is neither {STANDARD!r} nor NAME=MODULE,MODULE with two or more modules, such as "
            "qkv_proj=q_proj,k_proj,v_proj"
        )
    return name, names


def parse_dtype(text: str) -> tuple[str, str]:
    """A glob of tensor names, `*` when none is given, and the dtype of those.

    >>> parse_dtype("bfloat16"), parse_dtype("*.bias=float32")
    (('*', 'bfloat16'), ('*.bias', 'float32'))

    Raises:
        ValueError: The dtype is none to which tensors are cast, or the glob is empty.
    """
    glob, separator, dtype = text.rpartition("=")
    if dtype not in CASTABLE or (separator and not glob):
        raise ValueError(f"{text!r} is neither DTYPE nor GLOB=DTYPE; dtypes are {', '.join(CASTABLE)}")
    return (glob or "*"), dtype


def parse_renaming(text: str) -> tuple[str, str]:
    r"""A regular expression and its replacement, which may be empty.

    >>> parse_renaming(r"^model\.=")
    ('^model\\.', '')

    Raises:
        ValueError: There is no `=`, or the expression or the replacement is none.
    """
    expression, separator, replacement = text.rpartition("=")
    if not separator or not expression:
        raise ValueError(f"{text!r} is not EXPRESSION=REPLACEMENT, such as '^model\\.='")
    try:
        renaming([(expression, replacement)])
    except ShardingError as error:
        raise ValueError(f"{text!r} is not EXPRESSION=REPLACEMENT: {error.__cause__}") from None
    return expression, replacement


def _fusions(ctx: click.Context, param: click.Parameter, said: Sequence[Any]) -> FuseLike:
    """What `fuse=` means in Python."""
    if not said:
        return False
    given = [fusion for fusion in said if fusion != STANDARD]
    if not given:
        return True
    pairs = [*(STANDARD_FUSIONS.items() if len(given) < len(said) else ()), *given]
    _refuse_twice([name for name, _ in pairs], ctx, param)
    _refuse_twice([module for _, modules in pairs for module in modules], ctx, param)
    return checked_fusions(dict(pairs))


def _dtypes(ctx: click.Context, param: click.Parameter, said: Sequence[tuple[str, str]]) -> Any:
    """What `dtype=` means in Python; a dtype for all comes after those of single globs."""
    _refuse_twice([glob for glob, _ in said], ctx, param)
    return dict(sorted(said, key=lambda pair: pair[0] == "*")) or None


def _refuse_twice(names: Sequence[str], ctx: click.Context, param: click.Parameter) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise click.BadParameter(f"{twice[0]!r} is given twice", ctx=ctx, param=param)


RESULT_OPTIONS = (
    click.option(
        "--fuse",
        type=Parsed("name=module,module", lambda text: text if text == STANDARD else parse_fusion(text)),
        is_flag=False,
        flag_value=STANDARD,
        multiple=True,
        callback=_fusions,
        help="Load several modules into one, as engines keep them. Without a value, after URI: q_proj, k_proj and v_proj into "
        "qkv_proj, gate_proj and up_proj into gate_up_proj. With values: these; may be given again.",
    ),
    click.option(
        "--dtype",
        type=Parsed("[glob=]dtype", parse_dtype),
        multiple=True,
        callback=_dtypes,
        help=f"Cast floating tensors while they load, to {', '.join(CASTABLE)}. With a glob of tensor names: only those; may be "
        "given again, the first match decides.",
    ),
    click.option(
        "--rename",
        type=Parsed("expression=replacement", parse_renaming),
        multiple=True,
        callback=lambda _ctx, _param, said: list(said) or None,
        help=r"Replace what a regular expression finds in tensor names, such as '^model\.='; may be given again, applied in "
        "turn.",
    ),
)
"""`--fuse`, `--dtype` and `--rename`."""
