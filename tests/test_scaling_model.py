"""The arithmetic of benchmarks/scaling_model.py against sums done by hand."""

from typing import Any

import pytest

from benchmarks.scaling_model import BUCKET_BYTES, Cluster, all_reduce_seconds, model_step

NODE = Cluster(gpus_per_node=8, node_bytes_per_s=100e9, port_bytes_per_s=10e9, latency_s=1e-5)


@pytest.mark.parametrize(
    ("gpus", "seconds"),
    [
        (1, 0.0),
        (2, 1e9 / 100e9),  # 2 x 1/2 of the gradient
        (8, 2 * 7 / 8 * 1e9 / 100e9),
        (16, 2 * 7 / 8 * 1e9 / 100e9 + 1e9 / 8 / 10e9 + 2e-5),
    ],
)
def test_an_all_reduce_sends_twice_the_gradient_but_one_share(gpus: int, seconds: float) -> None:
    assert all_reduce_seconds(10**9, gpus, NODE) == pytest.approx(seconds)


def test_only_the_first_bucket_shows_where_the_backward_is_long_and_the_rest_where_it_is_short() -> None:
    gradient = 4 * BUCKET_BYTES
    how: dict[str, Any] = {"floor_s": 0.0, "host_s": 0.001, "gradient_bytes": gradient, "gpus": 8, "cluster": NODE}
    sent = all_reduce_seconds(gradient, 8, NODE)
    long = model_step(images=800, image_s=0.01, **how)
    assert long.compute_s == pytest.approx(1.0)
    assert long.exposed_s == pytest.approx(sent / 4)
    short = model_step(images=8, image_s=1e-6, **how)
    assert short.exposed_s == pytest.approx(sent / 4 + 3 / 4 * sent - 2e-6 / 3)
    assert short.total_s == pytest.approx(short.compute_s + short.exposed_s + 0.001)
