"""The values that one key of a sweep takes, and the keys of a run that a sweep may name.

In: entries such as `{grid: [128, 256]}` under dotted keys such as `model.width`. Out: frozen Domains; a refusal of keys that no
run has, of cycles and of dependents on a key that is not there.
"""

import functools
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Self, get_args

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from crate_ray.config.base import ConfigError, Frozen, nearest
from crate_ray.config.run import RunConfig

Amount = Annotated[float, Field(gt=0)]
SAME_FLOPS_KEY = "train.steps"


class Domain(Frozen):
    """The values that one key takes: exactly one of the seven kinds."""

    grid: tuple[Any, ...] | None = Field(None, min_length=1, description="every one of these values")
    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="one of these values, drawn by the search")
    uniform: tuple[float, float] | None = Field(None, description="[lowest, highest]")
    loguniform: tuple[Amount, Amount] | None = Field(None, description="[lowest, highest], uniform in the logarithm")
    quantized: tuple[float, float, Amount] | None = Field(
        None, description="[lowest, highest, step]; whole where all three are"
    )
    num: int | None = Field(None, ge=2, description="of uniform and loguniform in a grid search: so many values, evenly spaced")
    of: str | None = Field(None, description="another key of the space: this one depends on it")
    times: float | None = Field(None, gt=0, description="with `of`: its value times this")
    map: dict[Any, Any] | None = Field(None, min_length=1, description="with `of`: this one's value for each of its values")
    same_flops_as: dict[str, Any] | None = Field(
        None,
        min_length=1,
        description="of train.steps: as many as cost the training FLOPs of the point with these keys instead",
    )

    @property
    def kind(self) -> str:
        """Which of the kinds it is."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def is_dependent(self) -> bool:
        """Whether other keys decide its value."""
        return self.kind in ("of", "same_flops_as")

    @property
    def is_endless(self) -> bool:
        """Whether its values cannot be listed."""
        return self.kind in ("uniform", "loguniform") and self.num is None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; found {', '.join(given) or 'none'}")
        if self.of is None and (self.times is not None or self.map is not None):
            raise ValueError("times and map say how a key depends on another one: give that key as `of`")
        if self.times is not None and self.map is not None:
            raise ValueError("give times or map, not both")
        if self.num is not None and given[0] not in ("uniform", "loguniform"):
            raise ValueError(f"num counts the values of uniform and loguniform; {given[0]} has its own")
        return self

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A sweep file shows the kind that was chosen, not the six that were not."""
        return {key: value for key, value in handler(self).items() if value is not None}

    @field_validator("grid", "choice")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value is not None and len({repr(v) for v in value}) < len(value):
            raise ValueError("a value stands there twice; list each once")
        return value

    @field_validator("uniform", "loguniform", "quantized")
    @classmethod
    def _not_empty(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"the range is empty: give [lowest, highest] with lowest < highest, not {list(value[:2])}")
        return value


_KINDS = ("grid", "choice", "uniform", "loguniform", "quantized", "of", "same_flops_as")


@functools.cache
def run_keys() -> tuple[str, ...]:
    """The dotted keys of a run that a sweep may set: all but its name and the name of its recipe."""
    return (*sorted(_leaves(RunConfig, "")), "model.preset")


def _leaves(section: type[Frozen], prefix: str) -> Iterable[str]:
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Frozen):
            yield from _leaves(nested, f"{prefix}{name}.")
        elif prefix or name not in ("name", "recipe"):
            yield prefix + name


def value_at(config: RunConfig, key: str) -> Any:
    """What a run has at a dotted key; None below what is no section of it."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def is_whole(key: str) -> bool:
    """Whether a key of a run takes whole numbers only."""
    section: type[Frozen] = RunConfig
    *path, last = key.split(".")
    for part in path:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    field = section.model_fields.get(last)
    kinds = {field.annotation, *get_args(field.annotation)} if field else set()
    return int in kinds and float not in kinds


def check_run_keys(where: str, keys: Iterable[str]) -> None:
    """Refuses what is no key of a run.

    Args:
        where: What stands before a key in the message, such as `space.`.
        keys: Dotted keys.

    Raises:
        ConfigError: Names the key, where it stands, the nearest one and the valid ones of its section.
    """
    for key in keys:
        if key not in run_keys():
            section, _, _ = key.rpartition(".")
            siblings = [valid.removeprefix(f"{section}.") for valid in run_keys() if valid.rpartition(".")[0] == section != ""]
            valid = siblings or sorted({valid.split(".")[0] for valid in run_keys()})
            kind = f"valid keys of {section}" if siblings else "a run's keys start with"
            raise ConfigError(f"{where}{key}: no key of a run{nearest(key, list(run_keys()))}; {kind}: {', '.join(valid)}")


def depending_on(root: str, domains: Mapping[str, Domain]) -> list[str]:
    """The key and everything that depends on it, however far, each after what it depends on."""
    found = [root]
    for key in found:
        found += [other for other, domain in domains.items() if domain.of == key]
    return found


def dependence_order(where: str, domains: Mapping[str, Domain]) -> list[str]:
    """The keys in an order in which each stands after the one that it depends on.

    Args:
        where: The space, for the message.
        domains: Dotted keys with their values.

    Raises:
        ConfigError: A dependent on a key that is not there, or keys that depend on each other in a circle.
    """
    graph: dict[str, list[str]] = {}
    for key, domain in domains.items():
        if domain.of is not None and domain.of not in domains:
            raise ConfigError(
                f"{where}: {key} depends on '{domain.of}', which is no key of this space{nearest(domain.of, list(domains))}; "
                f"valid: {', '.join(other for other in domains if other != key) or 'none'}"
            )
        graph[key] = [domain.of] if domain.of is not None else []
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ConfigError(f"{where}: {circle} depend on each other in a circle; give one of them values of its own") from None
