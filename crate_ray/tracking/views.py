"""Saved views: what the experiment's page shows first, without a click.

In: an experiment. Out: two tags on it that MLflow's pages read as saved views, and the links that
open them. A bare link to an experiment shows a table without a metric; a link to a view shows the
scatter of parameters against probe accuracy, one colour a family. The trade-off: saved views are
no public interface of MLflow, so they are written for tested versions only; with another one
there is a warning, and everything else works.
"""

import base64
import json
import logging
import time
import zlib
from typing import TYPE_CHECKING, Any

from crate_ray.tracking.client import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

EFFICIENCY = "parameter-efficiency"
CURVES = "training-curves"
TESTED_VERSIONS = ("3.17.",)
_TAG = "mlflow.sharedViewState."
_MAX_TAG_CHARS = 20_000
# The filter grammar has neither OR nor IN for tags; `tr%` is train and trial, and no control, sweep, probe or compare.
_RUNS_OF_MODELS = "tags.kind LIKE 'tr%'"

State = dict[str, Any]


def write_views(client: "MlflowClient", experiment_id: str) -> list[str]:
    """Writes both views into the experiment; unchanged ones are left alone.

    Returns:
        The ids of the views that the experiment has; empty with an untested MLflow.

    Raises:
        mlflow.exceptions.MlflowException: The store does not answer.
    """
    import mlflow

    if not mlflow.__version__.startswith(TESTED_VERSIONS):
        logger.warning(
            "MLflow %s: saved views are tested with %s only and are not written; runs and metrics are",
            mlflow.__version__,
            ", ".join(version + "x" for version in TESTED_VERSIONS),
        )
        return []
    present = client.get_experiment(experiment_id).tags
    views = {EFFICIENCY: ("Parameter efficiency", efficiency_state()), CURVES: ("Training curves", curves_state())}
    for view_id, (name, state) in views.items():
        if _state_of(present.get(_TAG + view_id)) != state:
            client.set_experiment_tag(experiment_id, _TAG + view_id, _envelope(name, state))
    return list(views)


def view_url(base_url: str, experiment_id: str, view_id: str = EFFICIENCY) -> str:
    """The link that opens a view; without `workflowType` a fresh browser lands on another kind of page."""
    return (
        f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs"
        f"?viewStateShareKey={view_id}&compareRunsMode=CHART&workflowType=machine_learning"
    )


def run_url(base_url: str, experiment_id: str, run_id: str) -> str:
    """The link to one run's page."""
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def efficiency_state() -> State:
    """Probe accuracy against parameters and against compute, then the values, then how the runs got there."""
    probe, encoder, total, gflops = "final/probe_top1", "final/encoder_params_m", "final/params_m", "final/gflops"
    columns = [_metric_column(key) for key in (probe, encoder, total, gflops, "final/eval_loss")]
    columns += [f"params.`{key}`" for key in ("model", "depth", "width", "ista_step_size", "seed")]
    efficiency, training, evaluation = "efficiency", "training", "evaluation"
    return {
        **_page(order_by=probe, columns=columns),
        "compareRunSections": [
            _section(efficiency, "Parameter efficiency"),
            _section(evaluation, "Validation"),
            _section(training, "Training"),
        ],
        "compareRunCharts": [
            _scatter("scatter-encoder", efficiency, encoder, probe),
            _scatter("scatter-gflops", efficiency, gflops, probe),
            _chart("bar-probe", "BAR", efficiency, metricKey=probe),
            _scatter("scatter-total", efficiency, total, probe),
            _chart(
                "difference",
                "DIFFERENCE",
                efficiency,
                compareGroups=["Model metrics", "Parameters"],
                chartName="Runs difference view",
                showChangeFromBaseline=True,
                showDifferencesOnly=True,
                baselineColumnUuid="",
            ),
            _line("line-knn", evaluation, "eval/knn_top1"),
            _line("line-eval", evaluation, "eval/loss"),
            _line("line-loss", training, "train/loss"),
        ],
    }


def curves_state() -> State:
    """What to look at while runs go on: losses, rate, gradient, speed."""
    columns = [_metric_column(key) for key in ("train/loss", "eval/loss", "eval/knn_top1", "perf/images_per_s")]
    columns += [f"params.`{key}`" for key in ("model", "arch", "lr", "seed")]
    training, evaluation, speed = "training", "evaluation", "speed"
    return {
        **_page(order_by="train/loss", ascending=True, columns=columns),
        "compareRunSections": [_section(training, "Training"), _section(evaluation, "Validation"), _section(speed, "Speed")],
        "compareRunCharts": [
            _line("line-loss", training, "train/loss"),
            _line("line-grad", training, "train/grad_norm", scale="log"),
            _line("line-lr", training, "train/lr"),
            _line("line-skipped", training, "train/skipped_steps"),
            _line("line-eval", evaluation, "eval/loss"),
            _line("line-knn", evaluation, "eval/knn_top1"),
            _line("line-speed", speed, "perf/images_per_s"),
            _line("line-mfu", speed, "perf/mfu"),
            _line("line-wait", speed, "perf/data_wait_fraction"),
            _line("line-memory", speed, "memory/peak_gib"),
        ],
    }


def _envelope(name: str, state: State) -> str:
    now_ms = int(time.time() * 1000)
    packed = base64.b64encode(zlib.compress(json.dumps(state, separators=(",", ":")).encode())).decode()
    text = json.dumps({"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{packed}"})
    assert len(text) <= _MAX_TAG_CHARS
    return text


def _state_of(tag: str | None) -> State | None:
    """The state in a view's tag; None where there is none that can be read."""
    if tag is None:
        return None
    try:
        packed = json.loads(tag)["state"].removeprefix("deflate;")
        state: State = json.loads(zlib.decompress(base64.b64decode(packed)))
    except (ValueError, KeyError, AttributeError, zlib.error) as error:
        logger.debug("a saved view cannot be read and is written anew: %s", one_line(error))
        return None
    return state


def _page(*, order_by: str, columns: list[str], ascending: bool = False) -> State:
    return {
        "searchFilter": _RUNS_OF_MODELS,
        "orderByKey": _metric_column(order_by),
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": [],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _metric_column(key: str) -> str:
    return f"metrics.`{key}`"


def _section(uuid: str, name: str) -> State:
    """Two charts a row: at MLflow's own three, axis titles are cut off beside the list of runs."""
    layout = {"columns": 2, "cardHeight": 420}
    return {"uuid": uuid, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False, **layout}


def _chart(uuid: str, kind: str, section: str, **settings: Any) -> State:
    common = {"runsCountToCompare": 100, "metricSectionId": section, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "type": kind, **common, **settings}


def _scatter(uuid: str, section: str, x: str, y: str) -> State:
    """MLflow titles a scatter by its two keys and shows no other title."""
    return _chart(uuid, "SCATTER", section, xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def _line(uuid: str, section: str, key: str, *, scale: str = "linear") -> State:
    """A curve over steps; its title is the key."""
    return _chart(
        uuid,
        "LINE",
        section,
        metricKey=key,
        selectedMetricKeys=[key],
        lineSmoothness=0,
        xAxisScaleType="linear",
        scaleType=scale,
        range={},
        xAxisKey="step",
        selectedXAxisMetricKey="",
        yAxisKey="metric",
        yAxisExpressions=[],
        ignoreOutliers=False,
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )
