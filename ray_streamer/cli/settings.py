"""How do the fields of `Settings` become options? One option each, made from name, type, default and description.

Secrets have none, since everybody on a machine sees its command lines; their variables do.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from ray_streamer.cli.command import SettingOption
from ray_streamer.settings import SECRET_SETTINGS, Settings
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic.fields import FieldInfo


def with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for every setting but secrets; the function gets the resolved `settings`."""
    shown = {name: field for name, field in Settings.model_fields.items() if name not in SECRET_SETTINGS}

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        values = {name: options.pop(name) for name in shown}
        given = {name: value for name, value in values.items() if value is not None}
        return function(*args, settings=Settings.resolve(**given), **options)

    for name, field in reversed(shown.items()):
        call = _option(name, field)(call)
    return call


def default_text(field: FieldInfo) -> str | None:
    """A setting's default as people write it; None when unset has a meaning of its own, which the description tells."""
    if field.default is None:
        return None
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return human_bytes(field.default) if isinstance(field.default, ByteSize) else str(field.default)


class _SettingType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic since click 8.4 only
    """Text that the setting's own type accepts."""

    def __init__(self, name: str, field: FieldInfo) -> None:
        self.name = name
        annotation: Any = Annotated[field.annotation, field]
        self._adapter: TypeAdapter[Any] = TypeAdapter(annotation)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, or wrong usage."""
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            self.fail(f"{value!r}: {error.errors(include_url=False)[0]['msg']}", param, ctx)


def _option(name: str, field: FieldInfo) -> Callable[..., Any]:
    default = default_text(field)
    text = f"{field.description}  [default: {default}]" if default else field.description
    flag = f"--{name.replace('_', '-')}"
    if isinstance(field.default, bool):
        negative = f"--no-{name.replace('_', '-')}"
        return click.option(f"{flag}/{negative}", name, cls=SettingOption, default=None, help=text)
    kind = _SettingType(name, field)
    return click.option(
        flag, name, cls=SettingOption, type=kind, metavar=_metavar(name, field), default=None, help=text
    )


_METAVARS = {
    "_seconds": "SECONDS",
    "_bytes": "BYTES",
    "_limit": "BYTES",
    "_bandwidth": "BYTES",
    "_percent": "PERCENT",
    "_url": "URL",
    "_bundle": "FILE",
    "_dir": "FOLDER",
}


def _metavar(name: str, field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return f"[{'|'.join(get_args(field.annotation))}]"
    default = "NUMBER" if field.annotation is int else "TEXT"
    return next((metavar for ending, metavar in _METAVARS.items() if name.endswith(ending)), default)
