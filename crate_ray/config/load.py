"""Recipes and overrides to a RunConfig, and back to YAML.

In: a recipe name or a path, `a.b=c` strings. Out: RunConfig. Overrides are YAML values, so
`--set train.steps=600` is a number and `--set data.eval=null` clears a key.
"""

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from crate_ray.config.base import ConfigError, nearest
from crate_ray.config.model import PRESETS, ModelConfig
from crate_ray.config.run import RunConfig

_YAML = (".yaml", ".yml")


# Reading a thousand configurations takes 1 s with libyaml's parser, 6 s without.
_Parser: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):  # type: ignore[misc, valid-type]
    """YAML as people write it: `3e-5` is a number, which YAML 1.1 reads as a string."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("crate_ray.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_yaml(text: str, *, where: str) -> dict[str, Any]:
    """Parses a YAML mapping.

    Raises:
        ConfigError: Not YAML, or not a mapping.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, not {type(values).__name__}")
    return values


def load_run(recipe_or_path: str, overrides: Iterable[str] = ()) -> RunConfig:
    """See `RunConfig.load`."""
    values = read_recipe(recipe_or_path)
    for item in overrides:
        apply_override(values, item)
    return RunConfig.parse(values, where=f"recipe {recipe_or_path}")


def read_recipe(recipe_or_path: str) -> dict[str, Any]:
    """What a recipe says, before defaults fill it up: nested mappings, with `recipe`, its name.

    Raises:
        ConfigError: No such recipe, or no YAML mapping.
    """
    text, name = _find(recipe_or_path)
    values = read_yaml(text, where=f"recipe {recipe_or_path}")
    values.setdefault("recipe", name)
    return values


def load_model(name: str, overrides: Iterable[str] = ()) -> ModelConfig:
    """A preset, or the model of a recipe, changed by overrides such as `model.width=512`.

    Raises:
        ConfigError: Neither a preset nor a recipe, a key that is not the model's, or values that do not fit together.
    """
    overrides = list(overrides)
    for item in overrides:
        if not item.startswith("model."):
            raise ConfigError(
                f"--set {item}: only keys of the model count here; write model.KEY=VALUE, such as model.width=512"
            )
    if name in PRESETS:
        values: dict[str, Any] = {"model": {"preset": name}}
        for item in overrides:
            apply_override(values, item)
        return ModelConfig.parse(values["model"], where=f"model {name}")
    if name in recipe_names() or Path(name).suffix in _YAML:
        return load_run(name, overrides).model
    raise ConfigError(
        f"model '{name}' is unknown{nearest(name, [*PRESETS, *recipe_names()])}; valid presets: {', '.join(sorted(PRESETS))}; "
        f"valid recipes: {', '.join(recipe_names())}, or the path of a .yaml file"
    )


def dump_yaml(config: RunConfig) -> str:
    """The resolved configuration, readable by `load_run`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _find(recipe_or_path: str) -> tuple[str, str]:
    names = recipe_names()
    if recipe_or_path in names:
        return resources.files("crate_ray.recipes").joinpath(f"{recipe_or_path}.yaml").read_text(), recipe_or_path
    path = Path(recipe_or_path)
    if path.suffix in _YAML and path.is_file():
        return path.read_text(), path.stem
    raise ConfigError(
        f"recipe '{recipe_or_path}' is unknown{nearest(recipe_or_path, names)}; "
        f"valid: {', '.join(names)}, or the path of a .yaml file"
    )


def apply_override(values: dict[str, Any], item: str) -> None:
    """Sets one key of nested mappings, in place.

    Args:
        values: Sections and their keys.
        item: `a.b=value`, the value in YAML.

    Raises:
        ConfigError: Not of that form, or the value is no YAML.
    """
    set_key(values, *parse_override(item))


def parse_override(item: str) -> tuple[str, Any]:
    """Splits `a.b=value` into its dotted key and its value, read as YAML.

    Raises:
        ConfigError: Not of that form, or the value is no YAML.
    """
    key, separator, text = item.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"--set {item}: expected key=value with a dotted key, such as train.steps=600")
    try:
        return key, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {item}: the value is not valid YAML; quote it") from None


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of nested mappings, in place, as an override does: a preset replaces the model, `steps` the `epochs`.

    Raises:
        ConfigError: A part of the key holds a value already, and no section.
    """
    *path, last = key.split(".")
    current = values
    for part in path:
        nested = current.setdefault(part, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"--set {key}={value}: '{part}' holds a value, not a section with keys of its own")
        current = nested
    if key == "model.preset":
        current.clear()  # a preset is a whole model; keys set after it adjust it
    current[last] = value
    _retire_alternative(current, last)


_ALTERNATIVES = {
    "train": "mix",
    "mix": "train",
    "lr": "base_lr",
    "base_lr": "lr",
    "steps": "epochs",
    "epochs": "steps",
    "warmup_steps": "warmup_epochs",
    "warmup_epochs": "warmup_steps",
}


def _retire_alternative(section: dict[str, Any], key: str) -> None:
    """Setting one of two exclusive keys replaces the recipe's other one."""
    if key in _ALTERNATIVES and section[key] is not None:
        section.pop(_ALTERNATIVES[key], None)
