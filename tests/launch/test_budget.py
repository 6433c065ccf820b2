"""The account of a sweep."""

import pytest

from crate_ray.config.sweep import BudgetConfig, TrialResources
from crate_ray.launch.budget import Budget
from crate_ray.runs import TrialRow


def row(name: str, seconds: float = 0.0, stage: str = "screen") -> TrialRow:
    return TrialRow.of({"id": name, "arm": "a", "seed": 0, "state": "FINISHED", "seconds": seconds, "stage": stage})


def budget(**limits: float) -> Budget:
    return Budget(BudgetConfig.parse(limits), TrialResources(num_workers=2, gpus=1.0), hour_price=3.0)


def test_gpu_hours_count_every_card_of_a_trial() -> None:
    account = budget()
    account.take_in([row("a", 1800), row("b", 5400)])
    spent = account.spent()
    assert spent["gpu_hours"] == pytest.approx(4.0)
    assert spent["usd"] == pytest.approx(6.0)
    assert spent["trials"] == 2


def test_a_trial_that_would_go_past_the_budget_is_not_started() -> None:
    account = budget(gpu_hours=3.0)
    account.take_in([row("a", 1800)])
    assert account.refusal() is None  # one more typical trial: 2 GPU hours
    account.take_in([row("b", 1800)])
    account.started(row("c"))
    refusal = account.refusal()
    assert refusal is not None
    assert "budget.gpu_hours = 3: one more trial would make it 4" in refusal


def test_hours_of_earlier_sessions_count() -> None:
    account = Budget(BudgetConfig(hours=1.0), TrialResources(), hours_before=1.01)
    refusal = account.refusal()
    assert refusal is not None
    assert "budget.hours" in refusal


def test_the_first_trials_start_on_trust() -> None:
    assert budget(gpu_hours=0.001, usd=0.001).refusal() is None


def test_a_trial_that_goes_on_is_not_counted_twice() -> None:
    account = budget()
    account.take_in([row("a", 3600)])
    account.started(row("a"))
    account.ended(row("a", 3700))
    assert account.spent()["trials"] == 1
    assert account.spent()["trial_hours"] == pytest.approx(3700 / 3600)
