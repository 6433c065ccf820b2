"""One sweep, frozen: what varies, what every point gets, how results are chosen, and what it may cost.

In: a sweep file with overrides. Out: a SweepConfig whose every key is checked. What the keys of `space` do to a run is
`space`'s business; this file only says what they mean.
"""

import math
import re
from typing import Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from crate_ray.config.base import ConfigError, Frozen, nearest
from crate_ray.config.domain import SAME_FLOPS_KEY, Domain, check_run_keys, dependence_order, depending_on, is_whole
from crate_ray.config.run import NAME_PATTERN

ObjectiveName = Literal["eval_loss", "knn_top1", "probe_top1", "params_m", "encoder_params_m", "gflops", "images_per_s"]
Stage = Literal["screen", "confirm"]
Quantity = Literal["params_m", "encoder_params_m", "gflops", "encode_gflops", "train_pflops"]
LARGER_IS_BETTER: dict[str, bool] = {
    "eval_loss": False,
    "knn_top1": True,
    "probe_top1": True,
    "params_m": False,
    "encoder_params_m": False,
    "gflops": False,
    "images_per_s": True,
}
ARM_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}"
OBJECTIVES = list(LARGER_IS_BETTER)
LOSS_TARGET = ("mask_ratio", "patch_size", "image_size", "norm_pix_loss")
"""Keys of the model: validation losses of runs that differ here answer different questions."""
LIVE_OBJECTIVES = ("eval_loss", "knn_top1", "images_per_s")
"""What a trial reports while it trains; the others are known before it or only at its end."""

DECIDED_BY_SWEEP = {
    "train.seed": "screen.seed and confirm.first_seed",
    "eval.every_steps": "report_every_steps",
    "scale.num_workers": "resources_per_trial.num_workers",
    "scale.cpus_per_worker": "resources_per_trial.cpus",
    "scale.use_gpu": "resources_per_trial.gpus",
}
"""Keys of runs that follow from keys of the sweep."""
_WITH_GRACE = ("asha", "median", "hyperband")


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
    grace_steps: int | None = Field(
        None, ge=1, description="asha, median, hyperband: no trial stops before this step; default: report_every_steps"
    )
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
    usd: float | None = Field(None, gt=0, description="at the price below")
    price: float | str | None = Field(
        None, description="a node of cluster/prices.yaml, also NODE:spot, or USD per GPU hour (per CPU hour without GPUs)"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _buys_something(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError(
                "a budget that small starts no trial; give more than 0, or leave the key out for no limit (--dry-run shows "
                "what a sweep would cost)"
            )
        return value


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
        """One objective may stand without a list; an unknown one is one problem, not one for each way to be wrong."""
        names = [value] if isinstance(value, str) else value
        for name in names if isinstance(names, (list, tuple)) else ():
            if name not in LARGER_IS_BETTER:
                raise ValueError(f"no run reports '{name}'{nearest(str(name), OBJECTIVES)}; valid: {', '.join(OBJECTIVES)}")
        return names

    @field_validator("arms")
    @classmethod
    def _folders(cls, value: dict[str, Arm]) -> dict[str, Arm]:
        """An arm's name begins the names of its trials' folders."""
        for name in value:
            if not re.fullmatch(ARM_PATTERN, name):
                raise ValueError(f"an arm's name becomes part of a folder's: letters, digits, '_' and '-', not '{name}'")
        return value

    @model_validator(mode="before")
    @classmethod
    def _first_rung(cls, values: Any) -> Any:
        """A rung before the first report would be judged at it, and all the rungs below it at the next ones."""
        scheduler = values.get("scheduler") if isinstance(values, dict) else None
        if isinstance(scheduler, dict) and scheduler.get("type") in _WITH_GRACE and scheduler.get("grace_steps") is None:
            cadence = values.get("report_every_steps", cls.model_fields["report_every_steps"].default)
            return {**values, "scheduler": {**scheduler, "grace_steps": cadence}}
        return values

    def domains_of(self, arm: str) -> dict[str, Domain]:
        """Everything that varies in an arm: the sweep's space with the arm's own keys, what its solver chooses, and `tune`."""
        own = self.arms[arm].space if arm in self.arms else {}
        solved = self.match.over if self.match is not None and arm != self.match.to else {}
        return {**self.space, **own, **solved, **self.tune}

    def tuned_in(self, arm: str) -> frozenset[str]:
        """The keys that every point of an arm has a best of: `tune`, what a population perturbs, and what follows them."""
        domains = self.domains_of(arm)
        return frozenset(key for root in (*self.tune, *self.scheduler.perturb) for key in depending_on(root, domains))

    def set_of(self, arm: str) -> dict[str, Any]:
        """The dotted keys that are the same in every trial of an arm."""
        return {**self.set, **(self.arms[arm].set if arm in self.arms else {})}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._check_keys()
        self._check_match()
        for arm in self.arms or {"": Arm()}:
            self._check_domains(arm)
        if self.confirm is None and not any(self.domains_of(arm) for arm in self.arms or {"": Arm()}):
            raise ValueError(
                "nothing varies and nothing is confirmed: give values under space or tune, or seeds under confirm; one run "
                "alone is `crate-ray train`"
            )
        self._check_seeds()
        if self.budget.gpu_hours is not None and not self.resources_per_trial.gpus:
            raise ConfigError(
                f"budget.gpu_hours = {self.budget.gpu_hours:g} with resources_per_trial.gpus = 0: these trials use no GPU "
                "hours, so it would never end the sweep; limit budget.hours, or give the trials gpus"
            )
        is_population = self.scheduler.type == "pbt" and self.search.method == "random"
        if self.search.method != "grid" and self.budget.trials is None and not is_population:
            raise ValueError(
                f"search.method = {self.search.method} draws points without end: give budget.trials, how many over all arms"
            )
        return self

    def _check_seeds(self) -> None:
        """The best are chosen by how they did with the screening's seed: to count that run again would favour them."""
        confirm, seed = self.confirm, self.screen.seed
        if confirm is not None and confirm.first_seed <= seed < confirm.first_seed + confirm.seeds:
            raise ConfigError(
                f"screen.seed = {seed} is one of the seeds that confirm, {confirm.first_seed} to "
                f"{confirm.first_seed + confirm.seeds - 1}, and those must be fresh; set confirm.first_seed to "
                f"{seed + 1} or more"
            )

    def _check_keys(self) -> None:
        for where, keys in self._named_keys().items():
            check_run_keys(f"{where}.", keys)
            for key in sorted(DECIDED_BY_SWEEP.keys() & set(keys)):
                raise ConfigError(f"{where}.{key}: follows from the sweep; set {DECIDED_BY_SWEEP[key]} instead")
        both = sorted(self.space.keys() & self.tune.keys())
        if both:
            raise ConfigError(
                f"{', '.join(both)} under both space and tune: space holds what is compared, tune what every point gets the "
                "same grid of; take it out of one"
            )

    def _named_keys(self) -> dict[str, list[str]]:
        """Every mapping whose keys must be keys of a run, by where it stands."""
        named: dict[str, list[str]] = {"set": [*self.set], "space": [*self.space], "tune": [*self.tune]}
        for name, arm in self.arms.items():
            named |= {f"arms.{name}.set": [*arm.set], f"arms.{name}.space": [*arm.space]}
        named |= {"match.over": [*self.match.over] if self.match else [], "scheduler.perturb": [*self.scheduler.perturb]}
        named |= {"confirm.set": [*self.confirm.set] if self.confirm else []}
        for arm_name in self.arms or {"": Arm()}:
            for key, domain in self.domains_of(arm_name).items():
                named[f"{key}.same_flops_as"] = [*(domain.same_flops_as or {})]
        return named

    def _check_match(self) -> None:
        match = self.match
        if match is None:
            return
        if match.to not in self.arms or len(self.arms) < 2:
            raise ConfigError(
                f"match.to = '{match.to}' is no arm that others could be matched to{nearest(match.to, list(self.arms))}; "
                f"arms: {', '.join(self.arms) or 'none'}; name at least two, and one of them here"
            )
        if self.search.method in ("tpe", "nsga2"):
            raise ConfigError(
                f"match with search.method = {self.search.method}: a search of its own in each arm keeps no pairs; use grid or "
                "random"
            )
        for key, domain in match.over.items():
            if domain.is_endless or domain.kind == "same_flops_as":
                raise ConfigError(f"match.over.{key}: the solver tries every value; give a grid, quantized, or num of them")

    def _check_domains(self, arm: str) -> None:
        domains = self.domains_of(arm)
        where = f"the space of arm '{arm}'" if arm else "the space"
        dependence_order(where, domains)
        fixed = {**self.set_of(arm), **(self.confirm.set if self.confirm else {})}
        for key, domain in domains.items():
            if domain.kind == "same_flops_as":
                if key != SAME_FLOPS_KEY:
                    raise ConfigError(
                        f"{key}: same_flops_as solves for {SAME_FLOPS_KEY} alone; give this key values of its own"
                    )
            elif key in fixed:
                raise ConfigError(
                    f"{key} is set to {fixed[key]!r} and varies in {where} too: take it out of one; "
                    f"--set 'space.{key}={{grid: [{fixed[key]}]}}' replaces its values"
                )
            elif domain.is_endless and self.search.method == "grid":
                raise ConfigError(
                    f"{key}: {domain.kind} without end in a grid search; give num, how many values to take, or set "
                    "search.method to random or tpe"
                )
            if domain.kind in ("uniform", "loguniform") and is_whole(key):
                raise ConfigError(
                    f"{key} takes whole numbers, and {domain.kind} draws others: use quantized: [lowest, highest, step]"
                )

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


class Measured(Protocol):
    """A trial that ended, as far as its place goes."""

    @property
    def id(self) -> str:
        """Its name."""

    def value_of(self, objective: str) -> float | None:
        """What it measured, or what was known of it beforehand."""


def order_key(sweep: SweepConfig, trial: Measured) -> tuple[float, float, str] | None:
    """Sorts finished trials, best first: by the first objective, then the smaller encoder, then the name.

    The screening's ranking and the choice of what is confirmed are this one order. None without a finite value.
    """
    objective = sweep.objective[0]
    value = trial.value_of(objective)
    if value is None or not math.isfinite(value):
        return None
    return (-value if LARGER_IS_BETTER[objective] else value), trial.value_of("encoder_params_m") or 0.0, trial.id


def is_exploratory(sweep: SweepConfig) -> str | None:
    """Why results of the sweep are no comparison yet, or None when every arm tunes its learning rate alike."""
    rates = {arm: _rates(sweep, arm) for arm in sweep.arms or {"": Arm()}}
    if any(domain is None for domain in rates.values()):
        return "at one fixed learning rate: give optimizer.lr at least two values under tune"
    if len({repr(domain) for domain in rates.values()}) > 1:
        return "the arms tune their learning rate over unequal grids: give it once, under tune"
    return None


def _rates(sweep: SweepConfig, arm: str) -> Domain | None:
    """What an arm's learning rate is tried over, where that is more than one value."""
    domains = sweep.domains_of(arm)
    domain = domains.get("optimizer.lr", domains.get("optimizer.base_lr"))
    if domain is None or domain.is_dependent:
        return None
    values = domain.grid or domain.choice
    return domain if values is None or len(values) > 1 else None
