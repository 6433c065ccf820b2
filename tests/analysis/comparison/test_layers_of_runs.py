"""What the records of a run say of its layers."""

import math
from dataclasses import replace
from pathlib import Path

from synthetic_rows import synthetic_row

from crate_ray.analysis.comparison.configurations import sort_rows
from crate_ray.analysis.comparison.layers import LayerMeasures, layer_curves, read_layers
from crate_ray.runs import RecordWriter, RunFolder
from crate_ray.runs.rows import RunRow


def recorded(tmp_path: Path, records: dict[int, dict[str, float]]) -> RunRow:
    writer = RecordWriter(RunFolder(str(tmp_path)), 1)
    for step, values in records.items():
        writer.write(step, values)
    writer.close()
    return replace(synthetic_row(), uri=str(tmp_path))


def test_the_last_look_at_the_layers_stands_beside_the_first(tmp_path: Path) -> None:
    row = recorded(
        tmp_path,
        {
            0: {"whitebox/layer01/coding_rate_post_nats": 9.0, "whitebox/layer02/coding_rate_post_nats": 9.5},
            50: {"whitebox/layer01/coding_rate_post_nats": 8.0, "whitebox/layer02/coding_rate_post_nats": 7.0},
            100: {
                "whitebox/layer01/coding_rate_post_nats": 6.0,
                "whitebox/layer02/coding_rate_post_nats": 5.0,
                "whitebox/layer02/nonzero_fraction": 0.5,
                "whitebox/latent/rankme": 3.0,
            },
            110: {"train/loss": 0.1},
        },
    )
    found = read_layers(row)
    assert found is not None
    assert found.initial == {"coding_rate_post_nats": (9.0, 9.5)}
    assert found.trained["coding_rate_post_nats"] == (6.0, 5.0)
    first, second = found.trained["nonzero_fraction"]
    assert math.isnan(first)
    assert second == 0.5


def test_a_run_without_looks_or_only_at_its_start_or_out_of_reach_has_no_layers(tmp_path: Path) -> None:
    assert read_layers(recorded(tmp_path / "none", {1: {"train/loss": 1.0}})) is None
    assert read_layers(recorded(tmp_path / "start", {0: {"whitebox/layer01/nonzero_fraction": 1.0}})) is None
    assert read_layers(replace(synthetic_row(), uri=str(tmp_path / "elsewhere"))) is None


def test_a_curve_is_the_mean_over_the_seeds_that_have_it() -> None:
    rows = [synthetic_row(seed=seed) for seed in range(3)]
    measures = {0: (1.0, 2.0), 1: (3.0, 4.0)}

    def read(row: RunRow) -> LayerMeasures | None:
        return LayerMeasures({"nonzero_fraction": measures[row.seed]}, {}) if row.seed in measures else None

    [curve] = layer_curves(sort_rows(rows, "probe_top1").configurations, read)
    assert (curve.label, curve.measure, curve.trained, curve.initial) == ("CRATE-MAE 4x128", "nonzero_fraction", (2.0, 3.0), ())
