"""The registry: one checkpoint is one version, whoever asks how often; an alias is at one version."""

from typing import Any

import pytest
from test_content import finished

from crate_ray.config import ConfigError
from crate_ray.runs import Lease
from crate_ray.tracking import register_run, serve
from crate_ray.tracking.client import open_client
from crate_ray.tracking.logged_model import newest_checkpoint
from crate_ray.tracking.server import free_port


def check_registration(uri: str, experiment: str, make_run: Any) -> None:
    """Registers two runs, one of them twice, and looks at what the registry then holds."""
    first, second = finished(make_run()), finished(make_run(), finals={"final/probe_top1": 0.93})
    name = f"{experiment.rpartition('/')[2]} {uri[:4]}"
    how = {"uri": uri, "experiment": experiment}
    made = [register_run(folder, name, alias="best", tags={"format": "onnx"}, **how) for folder in (first, first, second)]
    assert [(one.version, one.is_new) for one in made] == [(1, True), (1, False), (2, True)]
    client = open_client(uri)
    best = client.get_model_version_by_alias(name, "best")
    saved = newest_checkpoint(second)
    assert saved is not None
    meta = second.read_json("run_meta.json")
    assert meta is not None
    assert best.tags == {
        "crate_ray.run_uid": meta["run_uid"],
        "crate_ray.checkpoint": saved.uri,
        "crate_ray.step": "100",
        "crate_ray.digest": saved.digest,
        "probe_top1": "0.93",
        "format": "onnx",
    }
    assert int(best.version) == 2
    assert len(client.search_model_versions(f"name = '{name}'")) == 2


def test_a_checkpoint_is_registered_once_and_the_alias_moves(uri: str, experiment: str, make_run: Any) -> None:
    check_registration(uri, experiment, make_run)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_server_registers_as_a_database_does(uri: str, experiment: str, make_run: Any) -> None:
    with serve(uri, port=free_port()) as server:
        check_registration(server.url, experiment, make_run)


@pytest.mark.parametrize(
    ("name", "alias", "says"),
    [
        ("a/b", None, "--register 'a/b' is no name"),
        ("", None, "is no name"),
        ("it's", None, "is no name"),
        ("model", "latest", "--alias 'latest' is no alias"),
        ("model", "v3", "is no alias"),
        ("model", "the best", "is no alias"),
    ],
)
def test_names_that_the_registry_refuses_are_refused_first(name: str, alias: str | None, says: str, make_run: Any) -> None:
    with pytest.raises(ConfigError, match=says):
        register_run(make_run(), name, alias=alias, uri="sqlite:////nowhere/at/all.db", experiment="any")


def test_a_run_that_has_not_ended_is_not_registered(uri: str, experiment: str, make_run: Any, client: Any) -> None:
    folder = make_run()
    Lease.take(folder)
    with pytest.raises(ConfigError, match="has not ended, or has no checkpoint"):
        register_run(folder, "early", uri=uri, experiment=experiment)
    assert client.search_model_versions("name = 'early'") == []


def test_a_server_that_is_not_there_is_an_error(make_run: Any) -> None:
    with pytest.raises(ConfigError, match="does not answer; start it, or leave --register out"):
        register_run(finished(make_run()), "model", uri=f"http://127.0.0.1:{free_port()}", experiment="any")
