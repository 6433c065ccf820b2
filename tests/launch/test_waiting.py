"""What a driver says while it waits for nodes, and what it makes of the autoscaler's own words."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray.core.generated.autoscaler_pb2 import AutoscalingState  # type: ignore[attr-defined]

from crate_ray.config import ScaleConfig
from crate_ray.launch import waiting
from crate_ray.launch.autoscaler import Growth, find_config, groups_left, growth_of
from crate_ray.launch.capacity import Capacity, NodeGroup
from crate_ray.launch.placement import Group
from crate_ray.launch.waiting import NodeWatch, situation

CONFIG = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 3},
        "cpu": {"resources": {"CPU": 16}},
        "untold": {"max_workers": 2},
        "off": {"resources": {"CPU": 64}, "max_workers": 0},
    },
}
TWO = Group("a1", ({"CPU": 2.0}, {"CPU": 2.0}), is_placed=False)
HAVE = Capacity(({"CPU": 1.0},), (NodeGroup("large", {"CPU": 2.0}, 3),))


def test_groups_are_those_of_the_autoscalers_file_less_the_nodes_that_are_there() -> None:
    groups, left = groups_left(CONFIG, {"gpu": 1, "cpu": 1, "head": 1})
    assert left == 3  # the head is none of the five
    assert [(group.name, group.num_left) for group in groups] == [("gpu", 2), ("cpu", 4)]
    assert groups[0].resources == {"CPU": 8.0, "GPU": 4.0}


def test_a_cluster_without_an_autoscalers_file_has_no_groups() -> None:
    assert groups_left({}, {"": 3}) == ((), None)


def test_the_file_is_found_by_the_address_of_its_cluster(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**CONFIG, "auth": {"ssh_private_key": "secret"}}))
    monitor = tmp_path / "autoscaler" / "v2" / "monitor.py"
    monitor.parent.mkdir(parents=True)
    monitor.write_text("print('up', flush=True)\nimport sys\nsys.stdin.read()\n")
    words = [sys.executable, str(monitor), "--gcs-address=10.9.8.7:6379", f"--autoscaling-config={tmp_path}/cluster.yaml"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert find_config("10.9.8.7:6379") == CONFIG  # and nothing else of the file
        assert find_config("10.9.8.7:6380") == {}
        process.communicate(timeout=20)


def test_the_autoscalers_state_becomes_what_comes_what_failed_and_what_is_impossible() -> None:
    told = AutoscalingState()
    told.pending_instance_requests.add(ray_node_type_name="gpu", count=2, request_ts=int(time.time()) - 40)
    told.pending_instances.add(ray_node_type_name="gpu")
    told.failed_instance_requests.add(ray_node_type_name="spot")
    told.infeasible_gang_resource_requests.add(details="a1b2:PACK|PENDING")
    doing = growth_of(told)
    assert (doing.coming, doing.failed, doing.impossible) == ({"gpu": 3}, {"spot"}, {"a1b2"})
    assert doing.since_s == pytest.approx(40, abs=3)


def test_the_wait_is_told_with_what_was_asked_for_what_is_there_and_what_comes() -> None:
    start = "2 x 2 CPU: the cluster's nodes have 1 CPU, its autoscaler may add 3 x large of 2 CPU; "
    assert situation([TWO], HAVE, Growth()) == start + "no node is on its way"
    assert situation([TWO], HAVE, Growth({"large": 2}, 40.0)) == start + "2 x large on their way since 40 s"
    assert situation([TWO], HAVE, Growth(failed=frozenset({"large"}))) == (
        start + "large could not be started (monitor.log on the head says why)"
    )
    assert situation([TWO], HAVE, Growth(impossible=frozenset({"a1"}))).endswith(
        "; the autoscaler can add no node that holds it, or no more of them"
    )


def test_room_that_other_work_holds_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = Group("a", ({"CPU": 1.0},), is_placed=False)
    clock = Clock(monkeypatch, Capacity(({"CPU": 2.0},)))
    clock.groups = [one, Group("b", ({"CPU": 1.0},), is_placed=True)]
    clock.pass_by(NodeWatch(ScaleConfig()), 30)  # a task that times a run has the other CPU
    start = "waiting for 15 s for room for 1 x 1 CPU: the cluster's nodes have 2 CPU; "
    assert caplog.messages == [start + "other work holds them for now, such as the timing of a forecast or another job"]
    caplog.clear()
    clock.groups.append(Group("c", ({"CPU": 1.0},), is_placed=True))  # the job's own trials have both
    clock.pass_by(NodeWatch(ScaleConfig()), 30)
    assert caplog.messages == [start + "no node is on its way"]


class Clock:
    """A cluster whose time is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, have: Capacity) -> None:
        self.now, self.groups = 1000.0, [TWO]
        monkeypatch.setattr(waiting.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(waiting, "groups", lambda: self.groups)
        monkeypatch.setattr(waiting, "growth", Growth)
        monkeypatch.setattr(waiting, "capacity", lambda scale: have)

    def pass_by(self, watch: NodeWatch, seconds: int) -> list[str | None]:
        """Looks each second."""
        answers = []
        for _ in range(seconds):
            self.now += 1
            answers.append(watch.look())
        return answers


def test_words_become_rarer_and_the_wait_ends_when_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, watch = Clock(monkeypatch, HAVE), NodeWatch(ScaleConfig(node_wait_s=600))
    answers = clock.pass_by(watch, 610)
    assert [message.split(" for ")[1] for message in caplog.messages] == ["15 s", "60 s", "120 s", "240 s", "480 s"]
    (reason,) = {answer for answer in answers if answer}
    assert reason.startswith("no room came within 600 s for 2 x 2 CPU: ")
    assert next(second for second, answer in enumerate(answers) if answer) == pytest.approx(600, abs=6)


def test_what_runs_already_may_wait_for_more_for_ever_and_so_may_a_cluster_that_does_not_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, HAVE)
    clock.groups = [TWO, Group("b", ({"CPU": 2.0},), is_placed=True)]
    assert not any(clock.pass_by(NodeWatch(ScaleConfig(node_wait_s=60)), 200))
    clock = Clock(monkeypatch, Capacity(({"CPU": 4.0},)))
    assert not any(clock.pass_by(NodeWatch(ScaleConfig()), 2000))


def test_the_actor_that_follows_a_trials_workers_is_nothing_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, HAVE)
    clock.groups = [TWO, Group("b", ({"memory": 1e6},), is_placed=True)]
    assert any(clock.pass_by(NodeWatch(ScaleConfig(node_wait_s=60)), 80))


def test_an_elastic_run_without_room_for_its_fewest_workers_says_so_and_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    elastic = {"num_workers": {"min": 2, "max": 4}, "use_gpu": False}
    clock = Clock(monkeypatch, HAVE)
    clock.groups = []
    assert not any(clock.pass_by(NodeWatch(ScaleConfig.parse(elastic)), 1000))
    assert "waiting for 15 s for room for 2 x 1 CPU: the cluster's nodes have 1 CPU" in caplog.messages[0]
    assert any(clock.pass_by(NodeWatch(ScaleConfig.parse({**elastic, "node_wait_s": 60})), 80))
    caplog.clear()
    monkeypatch.setattr(waiting, "capacity", lambda scale: Capacity(({"CPU": 2.0},)))
    clock.pass_by(NodeWatch(ScaleConfig.parse(elastic)), 100)
    assert caplog.messages == []  # it is starting
