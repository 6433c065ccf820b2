"""The arms of a sweep, and the run that each point of an arm stands for.

In: a SweepConfig, the name of an arm, values of its keys. Out: RunConfigs. Values are laid over the recipe as it was written,
so that what a recipe leaves out still follows what a point sets (the decoder's width of a CRATE follows the encoder's). A
sweep builds thousands of runs that differ in one section or two: sections are validated once for each of their contents.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from crate_ray.config import (
    Arm,
    ConfigError,
    Frozen,
    RunConfig,
    Stage,
    SweepConfig,
    dependence_order,
    nearest,
    read_recipe,
    set_key,
)
from crate_ray.config.domain import SAME_FLOPS_KEY, depending_on
from crate_ray.space.costs import flops_per_step
from crate_ray.space.point import Point

_SECTIONS: dict[str, type[Frozen]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Frozen)
}


def arms(sweep: SweepConfig) -> dict[str, Arm]:
    """The arms by name; one of the base's family where the sweep names none.

    Raises:
        ConfigError: The base is no recipe.
    """
    if sweep.arms:
        return dict(sweep.arms)
    values = read_recipe(sweep.base)
    _lay(values, sweep.set)
    return {RunConfig.parse(values, where=f"recipe {sweep.base}").model.family: Arm()}


def arm_config(sweep: SweepConfig, arm: str) -> RunConfig:
    """What every trial of an arm has in common.

    Raises:
        ConfigError: No such arm, or its keys make no run.
    """
    return ArmSpace(sweep, arm).config({})


def point_config(sweep: SweepConfig, point: Point) -> RunConfig:
    """The run that a point stands for.

    Raises:
        ConfigError: Its values make no run.
    """
    return ArmSpace(sweep, point.arm, stage=point.stage).config(point.values, seed=point.seed)


class ArmSpace:
    """One arm of a sweep in one stage: resolves values and builds runs, many times."""

    def __init__(self, sweep: SweepConfig, arm: str, *, stage: Stage = "screen", num_samples: int | None = None) -> None:
        known = arms(sweep)
        if arm not in known:
            raise ConfigError(f"'{arm}' is no arm of sweep {sweep.name}{nearest(arm, list(known))}; arms: {', '.join(known)}")
        self.arm, self.num_samples = arm, num_samples
        self.domains = sweep.domains_of(arm)
        self.independent = [key for key, domain in self.domains.items() if not domain.is_dependent]
        self.default_seed = sweep.screen.seed
        self._where = f"arm '{arm}' of sweep {sweep.name}"
        self._values = _arm_values(sweep, known[arm], stage)
        self._sections: dict[str, Frozen] = {}
        order = dependence_order(self._where, self.domains)
        self._late = depending_on(SAME_FLOPS_KEY, self.domains) if self._is_solved(SAME_FLOPS_KEY) else []
        self._early = [key for key in order if self.domains[key].of is not None and key not in self._late]

    def config(self, values: Mapping[str, Any], *, seed: int | None = None) -> RunConfig:
        """The run of these values.

        Args:
            values: Dotted keys, resolved.
            seed: Of the run; the screening's by default.

        Raises:
            ConfigError: They make no run.
        """
        written = {name: dict(value) if isinstance(value, dict) else value for name, value in self._values.items()}
        _lay(written, {**values, "train.seed": self.default_seed if seed is None else seed})
        try:
            return RunConfig.model_validate({name: self._section(name, value) for name, value in written.items()})
        except ValidationError:
            pass
        return RunConfig.parse(written, where=self._where)  # refuses again, with the key, the value and the fix

    def resolve(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the keys that depend on others.

        Args:
            chosen: Values of the independent keys.

        Returns:
            Values of all keys, in the order of the space.

        Raises:
            ConfigError: A map without the value that it is asked for, or training FLOPs that cannot be counted.
        """
        values = dict(chosen)
        for key in self._early:
            values[key] = self._derive(key, values)
        if self._late:
            values[SAME_FLOPS_KEY] = self._same_flops_steps(values)
            for key in self._late[1:]:
                values[key] = self._derive(key, values)
        return {key: values[key] for key in self.domains}

    def _is_solved(self, key: str) -> bool:
        return key in self.domains and self.domains[key].kind == "same_flops_as"

    def _section(self, name: str, written: Any) -> Any:
        """A section as its model; a mapping as it stands where it is no section, so that the run's own check names it."""
        if not isinstance(written, dict) or name not in _SECTIONS:
            return written
        identity = f"{name}{written!r}"
        if identity not in self._sections:
            self._sections[identity] = _SECTIONS[name].model_validate(written)
        return self._sections[identity]

    def _derive(self, key: str, values: Mapping[str, Any]) -> Any:
        domain = self.domains[key]
        assert domain.of is not None
        source = values[domain.of]
        if domain.map is not None:
            return _look_up(domain.map, source, f"{key} of {domain.of}")
        return source if domain.times is None else _multiply(key, source, domain.times)

    def _same_flops_steps(self, values: Mapping[str, Any]) -> int:
        """Steps that cost the training FLOPs of the reference: this point with other keys, and what depends on those."""
        replaced = self.domains[SAME_FLOPS_KEY].same_flops_as or {}
        other = {**values, **replaced}
        for key in self._early:
            if key not in replaced:
                other[key] = self._derive(key, other)
        reference, own = self.config(other), self.config(values)
        steps = reference.train.num_steps(self.num_samples)
        if steps is None:
            raise ConfigError(
                f"{SAME_FLOPS_KEY}: same_flops_as counts steps, and train.epochs = {reference.train.epochs:g} of data whose "
                "size is not known yet gives none; set train.steps"
            )
        return max(1, round(steps * flops_per_step(reference) / flops_per_step(own)))


def _arm_values(sweep: SweepConfig, arm: Arm, stage: Stage) -> dict[str, Any]:
    """The recipe as written, under the keys of sweep, arm and stage, and what the sweep itself decides."""
    values = read_recipe(arm.base or sweep.base)
    values.pop("name", None)
    _lay(values, sweep.set, arm.set, sweep.confirm.set if stage == "confirm" and sweep.confirm is not None else {})
    resources, cadence = sweep.resources_per_trial, sweep.report_every_steps
    decided: dict[str, Any] = {
        "eval.every_steps": cadence,
        "scale.num_workers": resources.num_workers,
        "scale.cpus_per_worker": resources.cpus,
        "scale.use_gpu": resources.gpus > 0,
    }
    if "knn_top1" in (*sweep.objective, sweep.scheduler.metric):
        decided["eval.probe_every_steps"] = cadence
    if "experiment" not in (values.get("tracking") or {}):
        decided["tracking.experiment"] = f"crate-mae/{sweep.name}"
    _lay(values, decided)
    return values


def _lay(values: dict[str, Any], *layers: Mapping[str, Any]) -> None:
    """Sets dotted keys, the last layer on top; a preset, whichever layer names it, lies below them all."""
    presets = [layer["model.preset"] for layer in layers if "model.preset" in layer]
    if presets:
        set_key(values, "model.preset", presets[-1])
    for layer in layers:
        for key, value in layer.items():
            if key != "model.preset":
                set_key(values, key, value)


def _look_up(mapping: Mapping[Any, Any], source: Any, what: str) -> Any:
    for given, value in mapping.items():
        if given == source and isinstance(given, bool) == isinstance(source, bool):
            return value
    raise ConfigError(f"{what}: its map has no value for {source!r}; it has {', '.join(map(repr, mapping))}")


def _multiply(key: str, source: Any, times: float) -> Any:
    """Whole numbers stay whole where they can; a count of steps is rounded, and a shape that does not fit is left to refuse."""
    if isinstance(source, bool) or not isinstance(source, (int, float)):
        raise ConfigError(f"{key}: times multiplies a number, and {source!r} is none; use map")
    product = source * times
    whole = round(product)
    is_count = key.endswith("steps")
    if isinstance(source, int) and (abs(product - whole) < 1e-9 * max(1.0, abs(product)) or is_count):
        return max(1, whole) if is_count else whole
    return product
