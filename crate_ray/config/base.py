"""What every configuration model shares: frozen, strict, and errors a user can act on.

In: plain mappings from YAML and the command line. Out: frozen pydantic models.
Pydantic's own messages name types; ours name the key, the value, what is valid and the fix.
"""

import difflib
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA_VERSION = 1


class ConfigError(ValueError):
    """A configuration or input that the user can correct; the command line exits with code 2."""


class Frozen(BaseModel):
    """A strict, immutable configuration section."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "") -> Self:
        """Builds the section from a mapping.

        Args:
            values: Nested mapping, as YAML gives it.
            where: What is being read, for the message ("recipe digits_mae").

        Raises:
            ConfigError: One line a problem: key, value, what is valid, the fix.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            items = error.errors()
            own = [item for item in items if item["type"] == "missing" or _is_given(values, item["loc"])]
            lines = [_explain(cls, item) for item in own or items]  # a default that copies a wrong value is no second problem
            head = f"invalid configuration in {where}" if where else "invalid configuration"
            raise ConfigError(f"{head}:\n  " + "\n  ".join(lines)) from None


def nearest(word: str, valid: list[str]) -> str:
    """A hint ' (did you mean X?)', or nothing when no valid word is close."""
    match = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


def _is_given(values: Any, path: tuple[Any, ...]) -> bool:
    """Whether the user wrote the key, or something around it."""
    for part in path:
        if not isinstance(values, dict):
            return True
        if part not in values:
            return False
        values = values[part]
    return True


def _explain(root: type[BaseModel], item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        valid = sorted(_section(root, item["loc"][:-1]).model_fields)
        hint = nearest(str(item["loc"][-1]), valid)
        return f"{key}: unknown key{hint}; valid keys here: {', '.join(valid)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{key}: required and not given"
    if not key:
        return message
    if isinstance(item["input"], dict):  # keys that do not fit together: the message names them and their values
        return f"{key}: {message}"
    return f"{key} = {item['input']!r}: {message[0].lower()}{message[1:]}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The model classes that an annotation names, at any depth of unions and lists."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _section(root: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel]:
    """The model class that holds the key, following the location that pydantic gives."""
    current = root
    for part in path:
        field = current.model_fields.get(str(part))
        if field is None:
            break
        nested = _models_in(field.annotation)
        if not nested:
            break
        current = nested[0]
    return current
