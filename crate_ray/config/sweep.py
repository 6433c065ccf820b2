"""One sweep, frozen: what varies, what every point gets, how results are chosen, and what it may cost.

In: a sweep file with overrides. Out: a SweepConfig whose every key is checked. What the keys of `space` do to a run is
`space`'s business; this file only says what they mean.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from crate_ray.config.base import Frozen
from crate_ray.config.run import NAME_PATTERN

ObjectiveName = Literal["eval_loss", "knn_top1", "probe_top1", "params_m", "encoder_params_m", "gflops", "images_per_s"]
Quantity = Literal["params_m", "encoder_params_m", "gflops", "encode_gflops", "train_pflops"]
Amount = Annotated[float, Field(gt=0)]
LARGER_IS_BETTER: dict[str, bool] = {
    "eval_loss": False,
    "knn_top1": True,
    "probe_top1": True,
    "params_m": False,
    "encoder_params_m": False,
    "gflops": False,
    "images_per_s": True,
}
LIVE_OBJECTIVES = ("eval_loss", "knn_top1", "images_per_s")
"""What a trial reports while it trains; the others are known before it or only at its end."""


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


class Arm(Frozen):
    """One side of a comparison, mostly a family: a base and keys of its own."""

    base: str | None = Field(None, description="a recipe or the path of one; default: the sweep's")
    set: dict[str, Any] = Field({}, description="dotted keys of every trial of this arm, over the sweep's")
    space: dict[str, Domain] = Field({}, description="keys that vary in this arm only, or vary otherwise")


class MatchConfig(Frozen):
    """Points of the other arms are solved for: as large, or as costly, as the point of one arm."""

    quantity: Quantity
    to: str = Field(description="the arm whose points are the targets")
    within: float = Field(0.05, gt=0, lt=1, description="largest relative difference")
    over: dict[str, Domain] = Field(min_length=1, description="keys of the other arms that the solver chooses")


class SearchConfig(Frozen):
    """Where the next point comes from."""

    method: Literal["grid", "random", "tpe", "nsga2"] = "grid"
    seed: int = Field(0, ge=0, lt=2**32)


class SchedulerConfig(Frozen):
    """Which trials stop early, or are replaced."""

    type: Literal["none", "asha", "median", "hyperband", "pbt"] = "none"
    metric: Literal["eval_loss", "knn_top1", "images_per_s"] | None = Field(
        None, description="what rungs are judged by; default: the first objective that is reported while training"
    )
    grace_steps: int | None = Field(None, ge=1, description="asha, median, hyperband: no trial stops before this step")
    reduction_factor: float = Field(3.0, gt=1, description="asha, hyperband: one in so many goes on")
    bracket_by: Literal["params"] | None = Field(
        None, description="asha, median: trials compete only with those of like size, for small models win short budgets"
    )
    num_brackets: int = Field(3, ge=1, description="with bracket_by: how many classes of size, of equal count")
    interval_steps: int | None = Field(None, ge=1, description="pbt: steps between two looks at the population")
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: share that is replaced by copies of the best")
    population: int = Field(4, ge=2, description="pbt: trials of an arm")
    perturb: dict[str, Domain] = Field({}, description="pbt: keys that change when a trial copies another one")


class ScreenConfig(Frozen):
    """The first stage: every trial with one seed."""

    seed: int = Field(0, ge=0, lt=2**63)


class ConfirmConfig(Frozen):
    """The second stage: the best, trained again to the end with fresh seeds; comparisons use these runs alone."""

    top_k: int = Field(1, ge=1, description="of each arm, or of each point of the space")
    seeds: int = Field(5, ge=5, description="fresh seeds, the same for every arm")
    first_seed: int = Field(1000, ge=0, lt=2**62)
    per: Literal["arm", "point"] = Field("arm", description="point: the best of `tune` at every point of the space")
    set: dict[str, Any] = Field({}, description="keys over those of the screening, such as train.steps")


class BudgetConfig(Frozen):
    """What the sweep may use; no new trial starts that would go past it."""

    trials: int | None = Field(None, ge=1, description="screening trials over all arms")
    gpu_hours: float | None = Field(None, gt=0)
    hours: float | None = Field(None, gt=0, description="of wall time")
    usd: float | None = Field(None, gt=0, description="at the prices of cluster/prices.yaml")


class TrialResources(Frozen):
    """What one trial takes of the cluster."""

    num_workers: int = Field(1, ge=1)
    cpus: float = Field(1.0, gt=0, description="CPUs of a worker")
    gpus: float = Field(0.0, ge=0, description="GPUs of a worker; a fraction packs several trials onto one card")

    @model_validator(mode="after")
    def _whole_cards(self) -> Self:
        if self.gpus > 1 or (self.num_workers > 1 and self.gpus not in (0, 1)):
            raise ValueError(
                f"gpus = {self.gpus:g} with num_workers = {self.num_workers}: a worker uses one card, and workers that talk to "
                "each other a whole one each; give 0 or 1, or a fraction with num_workers = 1"
            )
        return self


class SweepConfig(Frozen):
    """A whole sweep. `SweepConfig.load(path, overrides)` makes one."""

    name: str = Field(pattern=NAME_PATTERN, description="folder below storage.path; default: the file's name")
    base: str = Field(description="a recipe, or the path of one")
    set: dict[str, Any] = Field({}, description="dotted keys of every trial")
    arms: dict[str, Arm] = Field({}, description="what is compared side by side; default: one arm, of the base's family")
    pair: bool = Field(True, description="arms share seed, order of data and masks, so that differences are paired")
    space: dict[str, Domain] = Field({}, description="dotted keys whose values are compared")
    tune: dict[str, Domain] = Field({}, description="dotted keys that every point of the space gets the same grid of")
    constraints: tuple[str, ...] = Field((), description="such as 'params_m <= 50' or 'encoder_params_m within 5% of 21.9'")
    match: MatchConfig | None = None
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    objective: tuple[ObjectiveName, ...] = Field(("eval_loss",), min_length=1)
    report_every_steps: int = Field(100, ge=1, description="evaluation on validation, and a word to the scheduler")
    screen: ScreenConfig = ScreenConfig()
    confirm: ConfirmConfig | None = None
    budget: BudgetConfig = BudgetConfig()
    resources_per_trial: TrialResources = TrialResources()
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; default: what the cluster has room for")

    @field_validator("objective", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One objective may stand without a list."""
        return (value,) if isinstance(value, str) else value

    @classmethod
    def load(cls, path: str, overrides: list[str] | tuple[str, ...] = (), *, smoke: bool = False) -> "SweepConfig":
        """Reads a sweep file and applies `a.b=c` overrides.

        Args:
            path: A YAML file.
            overrides: Keys of the sweep (`budget.trials=4`), or of its runs (`train.steps=100`).
            smoke: Take the file's own small size.

        Raises:
            ConfigError: No such file, an unknown key, or values that contradict each other.
        """
        from crate_ray.config.load_sweep import load_sweep

        return load_sweep(path, overrides, smoke=smoke)


SWEEP_KEYS = tuple(SweepConfig.model_fields)
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
