"""The account of a sweep."""

import sys
import threading

import pytest

from crate_ray.config.sweep import BudgetConfig, TrialResources
from crate_ray.launch.sweeps.budget import Budget
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


def test_what_was_used_is_read_while_another_thread_starts_and_ends_trials() -> None:
    account, over = budget(), threading.Event()
    account.take_in([row(f"old-{number}", 1.0) for number in range(50)])
    failed: list[Exception] = []

    def read() -> None:
        while not over.is_set():
            try:
                account.spent()
            except Exception as error:  # noqa: BLE001  a thread's error fails no test by itself
                failed.append(error)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    try:
        reader.start()
        for number in range(2000):
            account.started(row(f"new-{number % 40}"))
            account.ended(row(f"new-{number % 40}"))
    finally:
        over.set()
        reader.join()
        sys.setswitchinterval(interval)
    assert not failed
