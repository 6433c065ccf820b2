"""Sweep files and overrides to a SweepConfig, and back to YAML.

In: the path of a sweep file, `a.b=c` strings, and whether its small size is asked for. Out: SweepConfig. Keys of runs are
written with dots and taken whole (`space.model.width`), so that one line says which key of a run it means.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from crate_ray.config.base import ConfigError, nearest
from crate_ray.config.domain import check_run_keys, run_keys
from crate_ray.config.load import parse_override, read_yaml
from crate_ray.config.sweep import SweepConfig

_BY_RUN_KEY = ("set", "space", "tune", "over", "perturb")
"""Mappings whose keys are dotted keys of a run."""
_REMOVABLE = ("space", "tune", "over", "perturb")
"""Mappings in which null takes an entry out."""


def load_sweep(path: str, overrides: Iterable[str] = (), *, smoke: bool = False) -> SweepConfig:
    """See `SweepConfig.load`."""
    values = _read(path)
    small = values.pop("smoke", None)
    values.setdefault("name", Path(path).stem)
    if smoke:
        values = _merge(values, _checked_smoke(path, values, small))
    for item in overrides:
        _override(values, item)
    return SweepConfig.parse(_drop_removed(values), where=f"sweep {path}")


def dump_sweep(sweep: SweepConfig) -> str:
    """The resolved sweep as YAML that `load_sweep` reads."""
    return yaml.safe_dump(_as_lists(sweep.model_dump()), sort_keys=False, allow_unicode=True)


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        folder = file.parent
        beside = sorted(str(other) for other in folder.glob("*.yaml")) if folder.is_dir() else []
        raise ConfigError(
            f"sweep '{path}' is no .yaml file{nearest(path, beside)}; "
            + (f"files there: {', '.join(beside)}" if beside else f"and {folder} has no .yaml file")
        )
    return read_yaml(file.read_text(), where=f"sweep {path}")


def _checked_smoke(path: str, values: dict[str, Any], small: Any) -> dict[str, Any]:
    if not isinstance(small, dict):
        raise ConfigError(
            f"sweep {path} has no small size: add a mapping `smoke:` whose keys replace those of the file, such as "
            "smoke: {set: {train.steps: 20}}"
        )
    return {"name": f"{values['name']}-smoke", **small}


def _merge(values: Any, changes: Any, key: str = "") -> Any:
    """Mappings key by key; a value of one key of a run is replaced whole, and so is every list."""
    if not (isinstance(values, dict) and isinstance(changes, dict)):
        return changes
    if key in _BY_RUN_KEY:
        return {**values, **changes}
    merged = dict(values)
    for name, change in changes.items():
        merged[name] = _merge(values.get(name), change, name) if name in values else change
    return merged


def _override(values: dict[str, Any], item: str) -> None:
    """Applies `a.b=c`: a key of the sweep, or one of its runs, which goes under `set`."""
    key, value = parse_override(item)
    first = key.partition(".")[0]
    if first not in SweepConfig.model_fields:
        sections = sorted({run_key.split(".")[0] for run_key in run_keys()})
        if first not in sections:
            valid = [*SweepConfig.model_fields, *sections]
            raise ConfigError(f"--set {item}: unknown key '{first}'{nearest(first, valid)}; valid: {', '.join(valid)}")
        check_run_keys("--set ", [key])
        key = f"set.{key}"
    *path, last = _split(key)
    current = values
    for part in path:
        if current.get(part) is None:
            current[part] = {}
        current = current[part]
        if not isinstance(current, dict):
            raise ConfigError(f"--set {item}: '{part}' holds a value, not a section with keys of its own")
    current[last] = value


def _split(key: str) -> list[str]:
    """The parts of a sweep's key; what follows `space` and its like is one dotted key of a run."""
    parts = key.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in _BY_RUN_KEY:
            return [*parts[: i + 1], ".".join(parts[i + 1 :])]
    return parts


def _drop_removed(values: dict[str, Any], key: str = "") -> dict[str, Any]:
    return {
        name: _drop_removed(value, name) if isinstance(value, dict) and key != "set" else value
        for name, value in values.items()
        if not (value is None and key in _REMOVABLE)
    }


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(inner) for key, inner in value.items()}
    return [_as_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value
