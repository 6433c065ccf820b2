"""How many trials a cluster has room for."""

import pytest

from crate_ray.config import ConfigError
from crate_ray.config.sweep import TrialResources
from crate_ray.launch.capacity import Capacity, NodeGroup
from crate_ray.launch.cluster import check_trial_fits, trial_room, worker_bytes


def test_fractions_of_a_card_never_span_two() -> None:
    have = Capacity(({"CPU": 16.0, "GPU": 2.0},))
    assert trial_room(TrialResources(gpus=0.4), have) == 4  # two a card, not five on both
    assert trial_room(TrialResources(gpus=0.1), have) == 16  # CPUs are the limit
    assert trial_room(TrialResources(gpus=0.1, cpus=0.5), have) == 20


def test_tenths_of_a_cpu_add_up() -> None:
    assert trial_room(TrialResources(cpus=0.1), Capacity(({"CPU": 1.0},))) == 10


def test_workers_of_a_trial_may_lie_on_several_nodes_but_one_worker_on_one() -> None:
    have = Capacity(({"CPU": 3.0}, {"CPU": 3.0}))
    assert trial_room(TrialResources(num_workers=2, cpus=3), have) == 1
    assert trial_room(TrialResources(num_workers=1, cpus=2), have) == 2


def test_what_an_autoscaler_may_start_counts() -> None:
    have = Capacity(({"CPU": 1.0},), (NodeGroup("small", {"CPU": 2.0}, 3), NodeGroup("large", {"CPU": 5.0}, 1)))
    assert trial_room(TrialResources(num_workers=2, cpus=2), have) == 2  # three small nodes take one worker each, the large two
    check_trial_fits(TrialResources(num_workers=2, cpus=2), have)
    assert trial_room(TrialResources(cpus=3), have) == 1  # though all nodes to come have eleven CPUs


def test_nodes_to_come_are_bounded_over_all_groups() -> None:
    small, large = NodeGroup("small", {"CPU": 2.0}, 3), NodeGroup("large", {"CPU": 4.0, "GPU": 2.0}, 2)
    have = Capacity((), (small, large), num_left=3)
    assert trial_room(TrialResources(cpus=2), have) == 2 * 2 + 1  # the two large ones first, and one small
    assert (have.total_at_most("CPU"), have.total_at_most("GPU")) == (10.0, 4.0)
    with pytest.raises(
        ConfigError, match=r"nodes have none, its autoscaler may add 3 x small of 2 CPU, 2 x large of 4 CPU \(3 "
    ):
        check_trial_fits(TrialResources(num_workers=4, cpus=3), have)


def test_where_nodes_of_unknown_kind_may_come_nothing_is_refused_and_one_more_trial_than_fits_is_started() -> None:
    have = Capacity(({"CPU": 2.0},), is_open=True)
    check_trial_fits(TrialResources(cpus=64), have)
    assert trial_room(TrialResources(cpus=64), have) == 1
    assert trial_room(TrialResources(cpus=1), have) == 3


def test_the_memory_of_nodes_to_come_counts_and_is_unknown_where_nobody_says_it() -> None:
    head = {"CPU": 2.0, "memory": 4e9}
    told = NodeGroup("told", {"CPU": 8.0, "memory": 64e9}, 1)
    assert worker_bytes(TrialResources(cpus=2), Capacity((head,), (told,))) == 16e9
    assert worker_bytes(TrialResources(cpus=2), Capacity((head,), (told,), num_left=0)) == 4e9
    assert worker_bytes(TrialResources(cpus=2), Capacity((head,), (told, NodeGroup("untold", {"CPU": 8.0}, 1)))) is None
    assert worker_bytes(TrialResources(cpus=2), Capacity((head,), is_open=True)) is None


def test_nodes_of_one_kind_are_said_once() -> None:
    have = Capacity(({"CPU": 16.0},) * 64 + ({"GPU": 1.0},))
    assert have.described({"CPU": 1.0}) == "the cluster's nodes have 64 x 16 CPU, 0 CPU"


def test_a_trial_that_never_fits_is_refused_with_the_numbers() -> None:
    have = Capacity(({"CPU": 2.0, "GPU": 0.0},))
    with pytest.raises(ConfigError, match=r"3 x 1 CPU and never fits: the cluster's nodes have 2 CPU, room for 2 such workers"):
        check_trial_fits(TrialResources(num_workers=3), have)
