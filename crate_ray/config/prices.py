"""What an hour of a trial costs, from a dated list of nodes or a number of the user's own.

In: `budget.price` of a sweep and cluster/prices.yaml. Out: USD per hour of a trial. A trial pays for the share of a node that
it holds, the larger of its shares of GPUs and CPUs; what stands idle beside it is in nobody's price, so the bill of a
cluster that is not full is higher. Without a price there is no cost, rather than one of zero.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from crate_ray.config.base import ConfigError, Frozen, nearest
from crate_ray.config.load import read_yaml
from crate_ray.config.sweep import BudgetConfig, TrialResources

NO_PRICE = "no price given"
_FILE = Path("cluster", "prices.yaml")
_SPOT = ":spot"


class NodePrice(Frozen):
    """One type of node and what it costs."""

    cloud: str
    region: str
    gpu: str | None = None
    gpus: int = Field(ge=0)
    cpus: int = Field(ge=1)
    on_demand: float = Field(gt=0, description="USD per hour")
    spot: float | None = Field(None, gt=0, description="USD per hour, where it was found")


class PriceTable(Frozen):
    """All known nodes, as of one day."""

    schema_version: int = 1
    date: datetime.date
    nodes: dict[str, NodePrice] = Field(min_length=1)


@dataclass(frozen=True)
class Price:
    """What a node, or an hour of a GPU or CPU, costs.

    Attributes:
        said: As a person reads it, with the day of the list.
        usd_per_hour: Of what the next two are.
        gpus: GPUs of it.
        cpus: CPUs of it; None where the price is that of GPUs alone.
    """

    said: str
    usd_per_hour: float
    gpus: float
    cpus: float | None

    def usd_per_trial_hour(self, resources: TrialResources) -> float:
        """USD per hour of one trial: its share of the node, over its workers.

        Raises:
            ConfigError: A trial needs GPUs and the node has none.
        """
        if resources.gpus and not self.gpus:
            raise ConfigError(
                f"budget.price: {self.said} has no GPU, and resources_per_trial.gpus = {resources.gpus:g}; "
                "name a node with GPUs"
            )
        of_gpus = resources.gpus / self.gpus if self.gpus else 0.0
        of_cpus = resources.cpus / self.cpus if self.cpus else 0.0
        return self.usd_per_hour * max(of_gpus, of_cpus) * resources.num_workers


def find_price(budget: BudgetConfig, resources: TrialResources, *, path: str | None = None) -> Price | None:
    """The price that a sweep names; None where it names none.

    Args:
        budget: Of the sweep.
        resources: Of a trial; a price without a node is one of GPUs where a trial has any.
        path: A price list; default: cluster/prices.yaml of the working directory, or of this project's checkout.

    Raises:
        ConfigError: A budget in USD without a price, an unknown node, a node that does not suit, or a list that cannot be read.
    """
    if budget.price is None:
        if budget.usd is not None:
            raise ConfigError(
                f"budget.usd = {budget.usd:g} needs a price: set budget.price to a node of {_FILE} (g6.2xlarge, "
                "g6.2xlarge:spot), or to USD per GPU hour (per CPU hour where trials have no GPU)"
            )
        return None
    if isinstance(budget.price, float):
        unit, gpus, cpus = ("GPU", 1.0, None) if resources.gpus else ("CPU", 0.0, 1.0)
        return Price(f"{budget.price:g} USD per {unit} hour", budget.price, gpus, cpus)
    price = _of_node(load_prices(path), budget.price)
    price.usd_per_trial_hour(resources)  # a node that does not suit is refused now
    return price


def load_prices(path: str | None = None) -> PriceTable:
    """Reads a price list; see `find_price` for the default.

    Raises:
        ConfigError: No such file, or one that is no price list.
    """
    file = Path(path) if path is not None else _default_file()
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"price list '{file}' cannot be read: {error}") from None
    return PriceTable.parse(read_yaml(text, where=f"price list {file}"), where=f"price list {file}")


def _default_file() -> Path:
    beside_the_package = Path(__file__).parents[2] / _FILE
    found = next((file for file in (_FILE, beside_the_package) if file.is_file()), None)
    if found is None:
        raise ConfigError(
            f"no price list {_FILE} in the working directory; take one from the project's repository, or give budget.price as "
            "a number: USD per GPU hour"
        )
    return found


def _of_node(table: PriceTable, name: str) -> Price:
    key = name.removesuffix(_SPOT)
    node = table.nodes.get(key)
    if node is None:
        known = sorted(table.nodes)
        raise ConfigError(
            f"budget.price = '{name}': unknown node{nearest(key, known)}; valid: {', '.join(known)}, each also with {_SPOT}, "
            "or a number (USD per GPU hour)"
        )
    usd = node.spot if name.endswith(_SPOT) else node.on_demand
    if usd is None:
        raise ConfigError(
            f"budget.price = '{name}': the price list of {table.date} has no spot price of {key}; use {key}, or give a number"
        )
    return Price(
        f"{name} at {usd:g} USD an hour ({node.region}, list of {table.date})", usd, float(node.gpus), float(node.cpus)
    )
