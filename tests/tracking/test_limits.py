"""Whatever a run is called and says, MLflow takes it: checked with MLflow's own validation."""

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crate_ray.tracking.limits import (
    MAX_ENTRIES,
    MAX_POINTS,
    MAX_REQUEST_BYTES,
    log_params,
    log_points,
    log_tags,
    point,
    valid_key,
    valid_params,
    valid_tags,
    valid_text,
)

TEXTS = st.text(max_size=300) | st.text("/. a\0é\U0001d538\ud800", max_size=300)
KEYS = TEXTS | st.sampled_from(
    ["", ".", "..", "/", "a//b", "/a", "a/", "../a", "a/./b", "k" * 249 + "/.", "k" * 248 + "/..", "..0"]
)
# MLflow is imported within the first example.
quickly = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@quickly
@given(KEYS)
def test_a_key_becomes_one_that_mlflow_takes_and_stays_it(key: str) -> None:
    from mlflow.utils import validation

    found = valid_key(key)
    assert 0 < len(found) <= validation.MAX_ENTITY_KEY_LENGTH
    validation._validate_metric_name(found)
    assert valid_key(found) == found


@pytest.mark.parametrize("key", ["train/loss", "whitebox/layer03/coding_rate_pre_nats", "a b.c-d:e_f", "größe"])
def test_a_key_that_fits_stays(key: str) -> None:
    assert valid_key(key) == key


@quickly
@given(st.dictionaries(KEYS, TEXTS | st.builds(lambda text: text * 30, TEXTS), max_size=5))
def test_tags_and_parameters_become_ones_that_mlflow_takes_and_a_database_stores(texts: dict[str, str]) -> None:
    from mlflow.utils import validation

    for key, value in valid_tags(texts).items():
        validation._validate_tag(key, value)
        assert "\0" not in value.encode().decode()
    for key, value in valid_params(texts).items():
        validation._validate_param(key, value)
        assert "\0" not in value.encode().decode()


def test_a_text_that_is_too_long_ends_in_dots() -> None:
    assert valid_text("x" * 12, 10) == "xxxxxx ..."
    assert valid_text("x" * 10, 10) == "x" * 10


class Requests:
    """A client that keeps the JSON of each request, as MLflow's own makes it, and checks it as the server does."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.sent: list[Any] = []

    def log_batch(
        self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), synchronous: bool | None = None
    ) -> None:
        from mlflow.protos.service_pb2 import LogBatch
        from mlflow.utils import validation
        from mlflow.utils.proto_json_utils import message_to_json

        entries = {"metrics": metrics, "params": params, "tags": tags}
        text = message_to_json(
            LogBatch(run_id=run_id, **{name: [e.to_proto() for e in found] for name, found in entries.items()})
        )
        validation._validate_batch_log_api_req(text)
        validation._validate_batch_log_limits(metrics, params, tags)
        validation._validate_batch_log_data(metrics, params, tags)
        assert synchronous
        self.sizes.append(len(text))
        self.sent += [*metrics, *params, *tags]


@pytest.mark.parametrize("letter", ["k", "é", "\U0001d538", '"'])
@pytest.mark.parametrize("number", [0, 1, 501, 1201])
def test_points_are_sent_once_and_in_requests_that_fit(letter: str, number: int) -> None:
    requests = Requests()
    sent = [
        point(letter * 240 + str(step), math.nan if step % 3 else 1e-300, 1_700_000_000_000, step) for step in range(number)
    ]
    log_points(requests, "0" * 32, sent)  # type: ignore[arg-type]
    assert requests.sent == sent
    assert all(size <= MAX_REQUEST_BYTES for size in requests.sizes)
    assert len(requests.sizes) >= math.ceil(number / MAX_POINTS)


@pytest.mark.parametrize("letter", ["v", "\U0001d538"])
@pytest.mark.parametrize("log", [log_tags, log_params])
def test_long_tags_and_parameters_are_sent_once_and_in_requests_that_fit(log: Any, letter: str) -> None:
    requests = Requests()
    log(requests, "0" * 32, {f"key{number}": letter * 9000 for number in range(250)})
    assert [entry.key for entry in requests.sent] == [f"key{number}" for number in range(250)]
    assert len(requests.sizes) >= math.ceil(250 / MAX_ENTRIES)
