"""Prices of nodes: the list that comes with the project, and what a trial pays."""

from pathlib import Path

import pytest

from crate_ray.config import ConfigError
from crate_ray.config.prices import find_price, load_prices
from crate_ray.config.sweep import BudgetConfig, TrialResources

LIST = """
schema_version: 1
date: 2026-01-31
nodes:
  four-gpus: {cloud: aws, region: here, gpu: X, gpus: 4, cpus: 32, on_demand: 8.0, spot: 2.0}
  cpus-only: {cloud: gcp, region: here, gpus: 0, cpus: 16, on_demand: 1.6, spot: null}
"""
ON_GPU = TrialResources(gpus=1, cpus=2)
ON_CPU = TrialResources(cpus=2)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "prices.yaml"
    file.write_text(LIST)
    return str(file)


def hour(price: str | float, resources: TrialResources, path: str) -> float:
    found = find_price(BudgetConfig(price=price), resources, path=path)
    assert found is not None
    return found.usd_per_trial_hour(resources)


def test_a_trial_pays_for_its_larger_share_of_the_node(path: str) -> None:
    assert hour("four-gpus", ON_GPU, path) == pytest.approx(8 / 4)
    assert hour("four-gpus", TrialResources(gpus=0.5, cpus=2), path) == pytest.approx(8 / 8)
    assert hour("four-gpus", TrialResources(gpus=1, cpus=16), path) == pytest.approx(8 / 2)
    assert hour("four-gpus", TrialResources(gpus=1, cpus=2, num_workers=3), path) == pytest.approx(8 * 3 / 4)
    assert hour("cpus-only", ON_CPU, path) == pytest.approx(1.6 / 8)


def test_spot_is_a_price_of_its_own(path: str) -> None:
    assert hour("four-gpus:spot", ON_GPU, path) == pytest.approx(2 / 4)


def test_a_number_is_that_of_a_gpu_or_of_a_cpu_where_trials_have_no_gpu(path: str) -> None:
    assert hour(3.0, ON_GPU, path) == pytest.approx(3.0)
    assert hour(0.05, ON_CPU, path) == pytest.approx(0.1)


def test_no_price_is_no_cost_rather_than_one_of_zero(path: str) -> None:
    assert find_price(BudgetConfig(), ON_CPU, path=path) is None


@pytest.mark.parametrize(
    ("budget", "resources", "said"),
    [
        (BudgetConfig(usd=5), ON_CPU, r"budget\.usd = 5 needs a price: set budget\.price"),
        (BudgetConfig(price="four-gpu"), ON_GPU, r"unknown node \(did you mean 'four-gpus'\?\); valid: cpus-only, four-gpus"),
        (BudgetConfig(price="cpus-only"), ON_GPU, r"has no GPU, and resources_per_trial\.gpus = 1"),
        (BudgetConfig(price="cpus-only:spot"), ON_CPU, r"no spot price of cpus-only"),
    ],
)
def test_a_price_that_does_not_suit_is_refused_in_one_line(
    budget: BudgetConfig, resources: TrialResources, said: str, path: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        find_price(budget, resources, path=path)
    assert "\n" not in str(error.value)


def test_a_price_list_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prices(str(tmp_path / "missing.yaml"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("date: 2026-01-31\nnodes: {a: {cloud: aws, region: x, gpus: 1, cpus: 4, on_demand: -1}}\n")
    with pytest.raises(ConfigError, match=r"nodes\.a\.on_demand = -1"):
        load_prices(str(wrong))


def test_the_list_of_the_working_directory_is_read_before_that_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "p5.48xlarge" in load_prices().nodes
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "prices.yaml").write_text(LIST)
    assert set(load_prices().nodes) == {"four-gpus", "cpus-only"}


def test_the_list_of_the_project_is_dated_and_spot_is_never_dearer() -> None:
    table = load_prices()
    assert table.date.year >= 2026
    assert {node.cloud for node in table.nodes.values()} == {"aws", "gcp"}
    assert any(node.gpus == 0 for node in table.nodes.values())
    for node in table.nodes.values():
        assert node.spot is None or node.spot < node.on_demand
        assert (node.gpu is None) == (node.gpus == 0)
