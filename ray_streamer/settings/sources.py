"""Where does a setting's value come from, and what is said of one that cannot be used?

One value for each knob, in this order: an explicit argument, the environment variable `RAY_STREAMER_<NAME>`, a variable
of another loader that means the same (`ALIASES`), the default. Leaf functions never read the environment; they take what they
need as arguments.
"""

from __future__ import annotations

import difflib
import logging
import os
from typing import TYPE_CHECKING, Any, Self, get_args

from pydantic import ConfigDict, SecretStr, TypeAdapter, ValidationError
from pydantic import model_validator as validates_model

from ray_streamer.errors import SettingsError
from ray_streamer.settings.load import ENV_PREFIX
from ray_streamer.settings.runai import ALIASES, alias_values
from ray_streamer.settings.stores import StoreSettings

REPLACE_RUNAI = f"{ENV_PREFIX}REPLACE_RUNAI"
"""Variable that makes the vLLM plugin answer for load format `runai_streamer`; no setting of a load."""

logger = logging.getLogger(__name__)


class Settings(StoreSettings):
    """Every knob of a load. Byte sizes also accept text such as "512MiB".

    Attributes are documented by their `description`; `ray-streamer load --help` and `docs/settings.md` repeat them.

    Raises:
        SettingsError: A value, given or from the environment, cannot be used; names each one.
    """

    model_config = ConfigDict(defer_build=False)

    if not TYPE_CHECKING:
        # Type checkers know the signature that pydantic makes of the fields.
        def __init__(self, **given: Any) -> None:
            _tell_misspelt_variables()
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise SettingsError(_explain(error, set(given))) from None

    @validates_model(mode="before")
    @classmethod
    def _from_environment(cls, given: Any) -> Any:
        """Adds what the environment says of settings that are not given."""
        return {**alias_values(), **_own_variables(), **given} if isinstance(given, dict) else given

    @classmethod
    def resolve(cls, **explicit: Any) -> Self:
        """The settings in force; arguments that are None count as not given.

        Raises:
            SettingsError: A value, given or from the environment, cannot be used; names each one.
        """
        given = {name: value for name, value in explicit.items() if value is not None}
        return cls(**given)

    @classmethod
    def of_call(cls, settings: Self | None, **explicit: Any) -> Self:
        """The settings of one call: its own arguments win over `settings`, which stand in place of the environment.

        Raises:
            SettingsError: A value cannot be used.
        """
        if settings is None:
            return cls.resolve(**explicit)
        if not isinstance(settings, cls):
            raise SettingsError(f"settings is a ray_streamer.Settings, got {type(settings).__name__}")
        return settings.override(**explicit)

    def override(self, **explicit: Any) -> Self:
        """These settings with some replaced; arguments that are None count as not given.

        Raises:
            SettingsError: A value cannot be used.
        """
        given = {name: value for name, value in explicit.items() if value is not None}
        if not given:
            return self
        replaced = type(self).resolve(**self.model_dump() | given)
        # What neither call gave stays not given.
        return type(self).model_construct(_fields_set=self.model_fields_set | given.keys(), **dict(replaced))


SECRET_SETTINGS = frozenset(
    name for name, info in Settings.model_fields.items() if SecretStr in get_args(info.annotation)
)
"""Settings that no output shows and that no command line takes, since command lines are public."""


def replaces_runai() -> bool:
    """Whether `REPLACE_RUNAI` is on in this process.

    Raises:
        SettingsError: Its value is neither yes nor no.
    """
    text = os.environ.get(REPLACE_RUNAI, "")
    try:
        return TypeAdapter(bool).validate_python(text or False)
    except ValidationError:
        raise SettingsError(f"environment variable {REPLACE_RUNAI}={text!r}: give 1, or leave it out") from None


def _own_variables() -> dict[str, str]:
    """What `RAY_STREAMER_<NAME>` says, by setting; case does not matter, and an empty variable says nothing."""
    named = {variable.upper(): text for variable, text in os.environ.items() if text}
    variables = {name: ENV_PREFIX + name.upper() for name in Settings.model_fields}
    return {name: named[variable] for name, variable in variables.items() if variable in named}


_told: set[str] = set()


def _tell_misspelt_variables() -> None:
    """Warns once of variables that look like settings and are none: they change nothing, and somebody meant them to."""
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix(ENV_PREFIX).lower()
        is_ours = variable.upper().startswith(ENV_PREFIX) and variable != REPLACE_RUNAI
        if is_ours and name not in Settings.model_fields and variable not in _told:
            _told.add(variable)
            logger.warning("environment variable %s is no setting%s", variable, _nearest(name, prefix=ENV_PREFIX))


def _nearest(name: str, *, prefix: str = "") -> str:
    """The end of a sentence about a name that is no setting: the setting that may have been meant."""
    found = difflib.get_close_matches(name.lower(), Settings.model_fields, 1)
    if not found:
        return "; docs/settings.md lists them"
    return f"; did you mean {prefix + found[0].upper() if prefix else found[0]}?"


_SIZE = 'give a number of bytes, or text such as "512MiB"'
_WORDS = {
    **dict.fromkeys(("byte_size", "byte_size_unit"), _SIZE),
    **dict.fromkeys(("bool_parsing", "bool_type"), "give true or false"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "give a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "give a number"),
}
"""What to say instead of pydantic's own words, by its kind of fault."""


def _explain(error: ValidationError, explicit: set[str]) -> str:
    lines: list[str] = []
    for fault in error.errors(include_url=False):
        said = _WORDS.get(fault["type"], fault["msg"]).removeprefix("Value error, ")
        if not fault["loc"]:
            line = said
        else:
            name = str(fault["loc"][0])
            wrong = said if name in Settings.model_fields else f"no such setting{_nearest(name)}"
            line = f"{_origin(name, explicit)}={_shown(name, fault['input'])}: {wrong}"
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)


def _origin(name: str, explicit: set[str]) -> str:
    """The argument or variable that gave a setting its value."""
    if name in explicit:
        return name
    variables = [f"{ENV_PREFIX}{name.upper()}", *(alias.variable for alias in ALIASES if alias.setting == name)]
    return f"environment variable {next((found for found in variables if os.environ.get(found)), variables[0])}"


def _shown(name: str, value: Any) -> str:
    """The value, unless it could be a secret: what belongs to a misspelt name may be one, and so may a user in a url."""
    is_secret = name in SECRET_SETTINGS or name not in Settings.model_fields or "@" in str(value)
    return "(not shown)" if is_secret else repr(value)
