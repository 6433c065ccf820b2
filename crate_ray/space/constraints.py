"""Constraints of a sweep: one line of text each, over what is known of a run before it starts.

In: texts such as `params_m <= 50`, `gflops within 5% of 10` or `model.width >= 64`. Out: Constraints that accept a run or say
in numbers why not. The grammar has one comparison a line on purpose: several lines are their conjunction; nothing is evaluated.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from crate_ray.config import ConfigError, RunConfig, nearest
from crate_ray.config.domain import run_keys, value_at
from crate_ray.config.sweep import Quantity

GRAMMAR = "NAME <= NUMBER (or <, >, >=, ==), or NAME within P% of NUMBER"
QUANTITIES: tuple[str, ...] = get_args(Quantity)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_COMPARISON = re.compile(rf"([A-Za-z_][\w.]*)\s*(<=|>=|==|<|>)\s*({_NUMBER})")
_WITHIN = re.compile(rf"([A-Za-z_][\w.]*)\s+within\s+({_NUMBER})\s*%\s+of\s+({_NUMBER})")


@dataclass(frozen=True)
class Constraint:
    """One line.

    Attributes:
        text: As it was written.
        name: A derived quantity, or a dotted key of the run with a number.
        relation: `<=`, `<`, `>=`, `>`, `==` or `within`.
        bound: What it is compared with.
        tolerance: Of `within`: largest difference over the bound.
    """

    text: str
    name: str
    relation: str
    bound: float
    tolerance: float = 0.0

    def refusal(self, config: RunConfig, known: Mapping[str, float]) -> str | None:
        """Why a run is refused, with its number; None when it is not.

        Args:
            config: The run.
            known: Its derived quantities.

        Raises:
            ConfigError: The run has no such number.
        """
        value = _value_of(self.name, config, known, self.text)
        accepted = {
            "<=": value <= self.bound,
            "<": value < self.bound,
            ">=": value >= self.bound,
            ">": value > self.bound,
            "==": value == self.bound,
            "within": abs(value - self.bound) <= self.tolerance * abs(self.bound),
        }[self.relation]
        return None if accepted else f"{self.name} = {value:.6g}, and the sweep asks for {self.text}"


def parse_constraint(text: str) -> Constraint:
    """Reads one line.

    Raises:
        ConfigError: Not of the grammar, or a name that no run has.
    """
    stripped = text.strip()
    if match := _COMPARISON.fullmatch(stripped):
        name, relation, bound = match.groups()
        constraint = Constraint(stripped, name, relation, float(bound))
    elif match := _WITHIN.fullmatch(stripped):
        name, percent, bound = match.groups()
        constraint = Constraint(stripped, name, "within", float(bound), float(percent) / 100)
        if not 0 < constraint.tolerance < 1 or constraint.bound == 0:
            raise ConfigError(f"constraint '{text}': within takes a share above 0% and below 100%, of a number that is not 0")
    else:
        raise ConfigError(f"constraint '{text}' is not of the form {GRAMMAR}, such as 'params_m <= 50'")
    valid = [*QUANTITIES, *run_keys()]
    if name not in valid:
        raise ConfigError(
            f"constraint '{text}': unknown name '{name}'{nearest(name, valid)}; valid: {', '.join(QUANTITIES)}, and keys of a "
            "run that hold a number, such as model.width"
        )
    return constraint


def _value_of(name: str, config: RunConfig, known: Mapping[str, float], text: str) -> float:
    if name in QUANTITIES:
        if name not in known:
            raise ConfigError(
                f"constraint '{text}': {name} needs the number of training steps, which train.epochs gives only where the data "
                "can be read; set train.steps"
            )
        return known[name]
    value = value_at(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"constraint '{text}': {name} = {value!r} is no number in this run; compare a key that holds one")
    return float(value)
