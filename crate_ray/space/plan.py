"""The points of a sweep that are known before it starts: a grid, or draws; what is refused, and why.

In: a SweepConfig. Out: feasible points of every arm, counted refusals and solved matches. A draw follows from the search's
seed, its number and its key alone: the first ten of a hundred draws are the ten, and paired arms draw the same shared values.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from crate_ray.config import ConfigError, RunConfig, SweepConfig
from crate_ray.config.sweep import MatchConfig
from crate_ray.space.arms import ArmSpace, arms
from crate_ray.space.constraints import Constraint, parse_constraint
from crate_ray.space.costs import quantities
from crate_ray.space.domains import draw_value, list_values, uniform_number
from crate_ray.space.matching import Match, Solver, Target
from crate_ray.space.point import Point, canonical

TRIES_PER_POINT = 50
"""Draws for each point that is asked for, before an arm counts as used up."""
_LEAST_TRIES = 1000


@dataclass
class Plan:
    """What a sweep would try.

    Attributes:
        points: Feasible points of each arm, in order.
        refused: How many points were refused before they cost anything, by reason.
        matches: Every pair that was solved for, achieved or not.
    """

    points: dict[str, list[Point]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    matches: list[Match] = field(default_factory=list)

    def in_turns(self, most: int | None = None) -> list[Point]:
        """The points of all arms, or the first `most`, arms in turns."""
        turns = itertools.zip_longest(*self.points.values())
        return [point for turn in turns for point in turn if point is not None][:most]


class Gate:
    """What lets points of one arm through."""

    def __init__(self, space: ArmSpace, constraints: list[Constraint]) -> None:
        self._space, self._constraints = space, constraints

    def refusal(self, point: Point) -> tuple[str, str] | None:
        """Why a point is refused: a reason to count by, and the same with its numbers."""
        try:
            config = self._space.config(point.values, seed=point.seed)
        except ConfigError as error:
            text = _problem(error)
            return text, text
        return self.refusal_of(config)

    def refusal_of(self, config: RunConfig) -> tuple[str, str] | None:
        """The same, of a run that is built already."""
        if not self._constraints:
            return None
        known = quantities(config, num_samples=self._space.num_samples)
        for constraint in self._constraints:
            text = constraint.refusal(config, known)
            if text is not None:
                return f"not {constraint.text}", text
        return None


def feasible(sweep: SweepConfig, point: Point, num_samples: int | None = None) -> str | None:
    """None, or why a point is refused before it costs anything, with the numbers.

    Args:
        sweep: The sweep.
        point: A point of it.
        num_samples: Images of the training data, where known.

    Raises:
        ConfigError: A constraint of the sweep cannot be read.
    """
    space = ArmSpace(sweep, point.arm, stage=point.stage, num_samples=num_samples)
    refusal = Gate(space, [parse_constraint(text) for text in sweep.constraints]).refusal(point)
    return refusal[1] if refusal else None


def trials_per_arm(sweep: SweepConfig, names: list[str]) -> dict[str, int | None]:
    """How many screening trials each arm may have: an even share, the first arms one more; None for no limit."""
    if sweep.scheduler.type == "pbt":
        return dict.fromkeys(names, sweep.scheduler.population)
    total = sweep.budget.trials
    if total is None:
        return dict.fromkeys(names)
    return {name: total // len(names) + (i < total % len(names)) for i, name in enumerate(names)}


def make_plan(sweep: SweepConfig, num_samples: int | None = None) -> Plan:
    """Every point of a grid, or the draws of a random search.

    Args:
        sweep: The sweep; of tpe and nsga2, draws from its space stand for what the search will suggest.
        num_samples: Images of the training data, where known.

    Raises:
        ConfigError: No point of an arm is feasible: the reasons with their counts.
    """
    return _Planning(sweep, num_samples).run()


@dataclass(frozen=True)
class _Admitted:
    """A feasible point, the values that it was made of, and its run."""

    point: Point
    chosen: Mapping[str, Any]
    config: RunConfig


class _Planning:
    """The state of one `make_plan`."""

    def __init__(self, sweep: SweepConfig, num_samples: int | None) -> None:
        self.sweep, self.plan = sweep, Plan()
        self.names = list(arms(sweep))
        self.spaces = {name: ArmSpace(sweep, name, num_samples=num_samples) for name in self.names}
        constraints = [parse_constraint(text) for text in sweep.constraints]
        self.gates = {name: Gate(space, constraints) for name, space in self.spaces.items()}
        self.limits = trials_per_arm(sweep, self.names)
        self.num_samples = num_samples

    def run(self) -> Plan:
        if self.sweep.match is None:
            for name in self.names:
                self.plan.points[name] = [admitted.point for admitted in self._free(name)]
        else:
            self._pair(self.sweep.match)
        return self.plan

    def _free(self, arm: str) -> list[_Admitted]:
        """The feasible points of an arm, each once, up to its share of the budget."""
        limit = self.limits[arm] if self.sweep.search.method != "grid" else None
        found: dict[str, _Admitted | None] = {}
        num_found = 0
        before = Counter(self.plan.refused)
        for chosen in self._chosen(arm):
            if limit is not None and num_found >= limit:
                break
            try:
                values = self.spaces[arm].resolve(chosen)
            except ConfigError as error:
                self.plan.refused[_problem(error)] += 1
                continue
            identity = canonical(values)
            if identity not in found:
                found[identity] = self._admitted(arm, values, chosen)
                num_found += found[identity] is not None
        if not num_found:
            refused = describe_refusals(self.plan.refused - before)
            raise ConfigError(f"no point of arm '{arm}' is feasible; refused: {refused}")
        return [admitted for admitted in found.values() if admitted is not None]

    def _pair(self, match: MatchConfig) -> None:
        """Points of the arm that others are matched to, and their partners; a point without one in every arm is left out."""
        targets = [self._target(match, admitted) for admitted in self._free(match.to)]
        others = [name for name in self.names if name != match.to]
        partners = {name: list(self._partners(name, match, targets)) for name in others}
        kept = [i for i in range(len(targets)) if all(partners[name][i] for name in others)]
        for i in set(range(len(targets))) - set(kept):
            alone = 1 + sum(len(partners[name][i]) for name in others)
            self.plan.refused["without a partner in every arm"] += alone
        if not kept:
            raise ConfigError(f"no point of arm '{match.to}' has a partner; refused: {describe_refusals(self.plan.refused)}")
        for name in self.names:
            found = [[target.point] for target in targets] if name == match.to else partners[name]
            self.plan.points[name] = list({point.key: point for i in kept for point in found[i]}.values())

    def _admitted(self, arm: str, values: Mapping[str, Any], chosen: Mapping[str, Any]) -> _Admitted | None:
        """A point with its run; None where it is refused, which is counted."""
        try:
            config = self.spaces[arm].config(values)
        except ConfigError as error:
            self.plan.refused[_problem(error)] += 1
            return None
        refusal = self.gates[arm].refusal_of(config)
        if refusal is not None:
            self.plan.refused[refusal[0]] += 1
            return None
        return _Admitted(Point(arm, values, self.sweep.screen.seed), chosen, config)

    def _target(self, match: MatchConfig, admitted: _Admitted) -> Target:
        known = quantities(admitted.config, num_samples=self.num_samples)
        if match.quantity not in known:
            raise ConfigError(f"match.quantity = {match.quantity} needs the number of steps: set train.steps")
        return Target(admitted.point, known[match.quantity], admitted.config.model.encoder_depth, admitted.chosen)

    def _chosen(self, arm: str) -> Iterator[dict[str, Any]]:
        """Values of an arm's independent keys: all of them, or draws."""
        space = self.spaces[arm]
        if self.sweep.search.method == "grid":
            grids = [list_values(space.domains[key]) for key in space.independent]
            return (dict(zip(space.independent, values, strict=True)) for values in itertools.product(*grids))
        tries = max(_LEAST_TRIES, TRIES_PER_POINT * (self.limits[arm] or 1))
        return (draw(self.sweep, space, index) for index in range(tries))

    def _partners(self, arm: str, match: MatchConfig, targets: list[Target]) -> Iterator[list[Point]]:
        """For each target the feasible points that the solver finds; other keys are the target's where both arms have them."""
        space, solver = self.spaces[arm], Solver(self.spaces[arm], match)
        for number, target in enumerate(targets):
            shared = {
                key: target.chosen[key]
                for key in space.independent
                if key not in match.over and key in target.chosen and space.domains[key] == self.spaces[match.to].domains[key]
            }
            own = [key for key in space.independent if key not in match.over and key not in shared]
            partners = []
            for values in self._own_values(space, own, number):
                found = solver.solve(target, {**shared, **values})
                self.plan.matches.append(found)
                if not found.is_within:
                    self.plan.refused[describe_miss(found)] += 1
                elif (admitted := self._admitted(arm, found.values, values)) is not None:
                    partners.append(admitted.point)
            yield partners

    def _own_values(self, space: ArmSpace, keys: list[str], number: int) -> Iterator[dict[str, Any]]:
        if self.sweep.search.method == "grid":
            grids = [list_values(space.domains[key]) for key in keys]
            return (dict(zip(keys, values, strict=True)) for values in itertools.product(*grids))
        drawn = draw(self.sweep, space, number)
        return iter([{key: drawn[key] for key in keys}])


def draw(sweep: SweepConfig, space: ArmSpace, index: int) -> dict[str, Any]:
    """One draw of an arm's independent keys.

    Args:
        sweep: The sweep; with `pair`, every arm draws the same number for the same key.
        space: The arm.
        index: Number of the draw, from 0.
    """
    arm = "" if sweep.pair else space.arm
    return {
        key: draw_value(space.domains[key], uniform_number(sweep.search.seed, arm, index, key)) for key in space.independent
    }


def describe_refusals(refused: Mapping[str, int], *, most: int = 5) -> str:
    """The most frequent reasons with their counts, in one line."""
    ranked = sorted(refused.items(), key=lambda item: -item[1])
    lines = [f"{count} x {reason}" for reason, count in ranked[:most]]
    rest = sum(count for _, count in ranked[most:])
    return "; ".join(lines + ([f"{rest} for other reasons"] if rest else [])) or "none"


def describe_miss(match: Match) -> str:
    """Why a pair was not found."""
    values = ", ".join(f"{key} = {value}" for key, value in match.values.items() if key.startswith("model."))
    return (
        f"no {match.arm} of {match.quantity} near {match.wanted:.4g}: the nearest has {match.achieved:.4g} "
        f"({match.difference:+.1%}) with {values}"
    )


def _problem(error: ConfigError) -> str:
    """A configuration's problem without the line that says where it was read."""
    head, separator, rest = str(error).partition("\n")
    return " ".join(rest.split()) if separator else head
