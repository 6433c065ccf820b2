"""How many trials a cluster has room for."""

import pytest

from crate_ray.config import ConfigError
from crate_ray.config.sweep import TrialResources
from crate_ray.launch.cluster import Capacity, check_trial_fits, trial_room


def test_fractions_of_a_card_never_span_two() -> None:
    have = Capacity(({"CPU": 16.0, "GPU": 2.0},), {})
    assert trial_room(TrialResources(gpus=0.4), have) == 4  # two a card, not five on both
    assert trial_room(TrialResources(gpus=0.1), have) == 16  # CPUs are the limit
    assert trial_room(TrialResources(gpus=0.1, cpus=0.5), have) == 20


def test_tenths_of_a_cpu_add_up() -> None:
    assert trial_room(TrialResources(cpus=0.1), Capacity(({"CPU": 1.0},), {})) == 10


def test_workers_of_a_trial_may_lie_on_several_nodes_but_one_worker_on_one() -> None:
    have = Capacity(({"CPU": 3.0}, {"CPU": 3.0}), {})
    assert trial_room(TrialResources(num_workers=2, cpus=3), have) == 1
    assert trial_room(TrialResources(num_workers=1, cpus=2), have) == 2


def test_what_an_autoscaler_may_start_counts() -> None:
    have = Capacity(({"CPU": 1.0},), {"CPU": 9.0})
    assert trial_room(TrialResources(num_workers=2, cpus=2), have) == 2
    check_trial_fits(TrialResources(num_workers=2, cpus=2), have)


def test_a_trial_that_never_fits_is_refused_with_the_numbers() -> None:
    have = Capacity(({"CPU": 2.0, "GPU": 0.0},), {})
    with pytest.raises(ConfigError, match=r"3 x 1 CPU and never fits: the cluster's nodes have 2 CPU, room for 2 such workers"):
        check_trial_fits(TrialResources(num_workers=3), have)
