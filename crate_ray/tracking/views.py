"""Saved views: what the experiment's page shows first, without a click.

In: an experiment. Out: tags on it that MLflow's pages read as saved views, and the links that open them. A bare link to an
experiment shows a table without a metric; a link to a view shows its charts, one colour a family. The trade-off: saved views
are no public interface of MLflow, so they are written for tested versions only, those of the server whose pages they are; with
another one there is one warning, links open the bare experiment, and everything else works.
"""

import json
import logging
import time
import urllib.request
from typing import TYPE_CHECKING, Any

from crate_ray.tracking.client import absolute_uri, one_line, public_uri
from crate_ray.tracking.packing import pack, unpack

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

EFFICIENCY = "parameter-efficiency"
CONFIGURATIONS = "by-configuration"
CURVES = "training-curves"
WHITE_BOX = "white-box"
TITLES = {
    EFFICIENCY: "Parameter efficiency",
    CONFIGURATIONS: "By configuration",
    CURVES: "Training curves",
    WHITE_BOX: "White box",
}
TESTED_VERSIONS = ("3.17.",)
_TAG = "mlflow.sharedViewState."
_MAX_TAG_CHARS = 20_000
_VERSION_TIMEOUT_S = 3.0
# The filter grammar has neither OR nor IN for tags; `tr%` is train and trial, and no control, sweep, probe or compare.
_RUNS_OF_MODELS = "tags.kind LIKE 'tr%'"
_PROBE, _ENCODER, _TOTAL, _GFLOPS = "final/probe_top1", "final/encoder_params_m", "final/params_m", "final/gflops"
_MAX_LAYERS = 32
_OTHER_METRICS = (
    *("train", "eval", "final", "perf", "memory", "data", "checkpoint", "trials", "emergence", "layers", "system", "norms"),
    *("whitebox/latent", "norms/embedding", "norms/rest", *(f"norms/decoder{number:02d}" for number in range(1, 13))),
)
_bare_stores: set[str] = set()  # whose pages know no views, as far as is known; each is warned of once

State = dict[str, Any]


def write_views(client: "MlflowClient", experiment_id: str) -> list[str]:
    """Writes the views into the experiment; unchanged ones are left alone.

    Returns:
        The ids of the views that the experiment has; empty with an untested MLflow.

    Raises:
        mlflow.exceptions.MlflowException: The store does not answer.
    """
    from mlflow.exceptions import MlflowException

    version = _pages_version(client.tracking_uri)
    if not version.startswith(TESTED_VERSIONS):
        tested = ", ".join(f"{known}x" for known in TESTED_VERSIONS)
        _do_without(client.tracking_uri, f"MLflow {version}: saved views are tested with {tested} only")
        return []
    present = client.get_experiment(experiment_id).tags
    states = {
        EFFICIENCY: efficiency_state(),
        CONFIGURATIONS: configurations_state(),
        CURVES: curves_state(),
        WHITE_BOX: white_box_state(),
    }
    try:
        for view_id, state in states.items():
            if _state_of(present.get(_TAG + view_id)) != state:
                client.set_experiment_tag(experiment_id, _TAG + view_id, _envelope(TITLES[view_id], state))
    except MlflowException as error:
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED"):
            raise
        _do_without(client.tracking_uri, f"MLflow refuses saved views ({one_line(error)})")
        return []
    _bare_stores.discard(client.tracking_uri)
    return list(states)


def view_links(uri: str, base_url: str, experiment_id: str) -> dict[str, str]:
    """Title and address of each view; of a store that has none, the experiment's charts.

    Args:
        uri: The tracking store, to which `write_views` was called.
        base_url: Where its pages are.
        experiment_id: The experiment.
    """
    if absolute_uri(uri) in _bare_stores:
        return {"Runs": experiment_url(base_url, experiment_id)}
    return {title: view_url(base_url, experiment_id, view_id) for view_id, title in TITLES.items()}


def _pages_version(uri: str) -> str:
    """The version of the MLflow that draws the pages: of the server, else the one installed here."""
    import mlflow

    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=_VERSION_TIMEOUT_S) as answer:
                return str(answer.read(32).decode(errors="replace").strip())
        except OSError as error:  # it may ask for a password here, or be in trouble; requests that matter will say so
            logger.debug("%s does not say its version: %s", public_uri(uri), error)
    return str(mlflow.__version__)


def _do_without(uri: str, reason: str) -> None:
    level = logging.DEBUG if uri in _bare_stores else logging.WARNING
    _bare_stores.add(uri)
    logger.log(level, "%s and are not written; runs and metrics are", reason)


def view_url(base_url: str, experiment_id: str, view_id: str = EFFICIENCY) -> str:
    """The link that opens a view; without `workflowType` a fresh browser lands on another kind of page."""
    return (
        f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs"
        f"?viewStateShareKey={view_id}&compareRunsMode=CHART&workflowType=machine_learning"
    )


def experiment_url(base_url: str, experiment_id: str) -> str:
    """The link to an experiment's charts as MLflow draws them by itself."""
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"


def run_url(base_url: str, experiment_id: str, run_id: str) -> str:
    """The link to one run's page."""
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def efficiency_state() -> State:
    """Probe accuracy against parameters and against compute, then the space, the values, and how the runs got there."""
    columns = [_metric_column(key) for key in (_PROBE, _ENCODER, _TOTAL, _GFLOPS, "final/eval_loss")]
    columns += [f"params.`{key}`" for key in ("model", "depth", "width", "ista_step_size", "seed")]
    efficiency, space, values, progress = "efficiency", "space", "values", "progress"
    return {
        **_page(order_by=_PROBE, columns=columns),
        "compareRunSections": _with_folded_rest(
            [
                _section(efficiency, "Parameter efficiency"),
                _section(space, "Design space", columns=1),
                _section(values, "Values and differences"),
                _section(progress, "Validation"),
            ]
        ),
        "compareRunCharts": [
            _scatter("scatter-encoder", efficiency, _ENCODER, _PROBE),
            _scatter("scatter-gflops", efficiency, _GFLOPS, _PROBE),
            _scatter("scatter-total", efficiency, _TOTAL, _PROBE),
            _scatter("scatter-pflops", efficiency, "final/train_pflops", _PROBE),
            _chart(
                "parallel-space",
                "PARALLEL",
                space,
                selectedParams=["depth", "model", "width", "mask_ratio", "lr"],
                selectedMetrics=[_ENCODER, _PROBE],
                showAllRuns=False,
            ),
            _chart("bar-probe", "BAR", values, metricKey=_PROBE),
            _difference("difference", values),
            _line("line-knn", progress, "eval/knn_top1"),
            _line("line-eval", progress, "eval/loss"),
        ],
    }


def configurations_state() -> State:
    """The same axes with one point a configuration, the mean over its seeds, and curves with their range."""
    columns = [_metric_column(key) for key in (_PROBE, _ENCODER, _GFLOPS, "final/eval_loss")]
    means, progress = "means", "progress"
    return {
        **_page(order_by=_PROBE, columns=columns, average_over="configuration"),
        "compareRunSections": _with_folded_rest(
            [_section(means, "Means over seeds"), _section(progress, "Mean and range over training")]
        ),
        "compareRunCharts": [
            _scatter("scatter-encoder", means, _ENCODER, _PROBE),
            _scatter("scatter-gflops", means, _GFLOPS, _PROBE),
            _chart("bar-probe", "BAR", means, metricKey=_PROBE),
            _chart("bar-loss", "BAR", means, metricKey="final/eval_loss"),
            _line("line-knn", progress, "eval/knn_top1"),
            _line("line-eval", progress, "eval/loss"),
        ],
    }


def curves_state() -> State:
    """What to look at while runs go on: losses, rate, gradient, speed."""
    columns = [_metric_column(key) for key in ("train/loss", "eval/loss", "eval/knn_top1", "perf/images_per_s")]
    columns += [f"params.`{key}`" for key in ("model", "arch", "lr", "seed")]
    training, evaluation, speed = "training", "evaluation", "speed"
    return {
        **_page(order_by="train/loss", ascending=True, columns=columns),
        "compareRunSections": _with_folded_rest(
            [_section(training, "Training"), _section(evaluation, "Validation"), _section(speed, "Speed, schedule and faults")]
        ),
        "compareRunCharts": [
            _line("line-loss", training, "train/loss"),
            _line("line-grad", training, "train/grad_norm", scale="log"),
            _line("line-eval", evaluation, "eval/loss"),
            _line("line-knn", evaluation, "eval/knn_top1"),
            _line("line-speed", speed, "perf/images_per_s"),
            _line("line-mfu", speed, "perf/mfu"),
            _line("line-wait", speed, "perf/data_wait_fraction"),
            _line("line-memory", speed, "memory/peak_gib"),
            _line("line-lr", speed, "train/lr"),
            _line("line-skipped", speed, "train/skipped_steps"),
        ],
    }


def white_box_state() -> State:
    """What the layers do: of finished runs one curve over the layers, and of all runs how it came about."""
    columns = [_metric_column(key) for key in (_PROBE, _ENCODER, "whitebox/latent/rankme")]
    columns += [f"params.`{key}`" for key in ("model", "arch", "ista_step_size", "ista_lambda", "seed")]
    layers, initial, latent = "layers", "initial", "latent"
    measures = (
        "coding_rate_pre_nats",
        "coding_rate_post_nats",
        "nonzero_fraction",
        "ista_descent_ratio",
        "ista_objective_ratio",
    )
    return {
        **_page(order_by=_PROBE, columns=columns),
        "compareRunSections": _with_folded_rest(
            [
                _section(layers, "By layer (step = layer), trained"),
                _section(initial, "By layer (step = layer), before training"),
                _section(latent, "Encoder's output over training"),
            ]
        ),
        "compareRunCharts": [
            *(_line(f"trained-{name}", layers, f"layers/{name}") for name in measures),
            *(_line(f"initial-{name}", initial, f"layers/initial_{name}") for name in (measures[0], measures[2])),
            _line("latent-rankme", latent, "whitebox/latent/rankme"),
            _line("latent-alpha", latent, "whitebox/latent/alpha_req"),
        ],
    }


def _envelope(name: str, state: State) -> str:
    now_ms = int(time.time() * 1000)
    text = json.dumps({"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": pack(state)})
    assert len(text) <= _MAX_TAG_CHARS
    return text


def _state_of(tag: str | None) -> State | None:
    """The state in a view's tag; None where there is none that can be read."""
    if tag is None:
        return None
    try:
        state: State = unpack(json.loads(tag)["state"])
    except (ValueError, KeyError, AttributeError) as error:
        logger.debug("a saved view cannot be read and is written anew: %s", one_line(error))
        return None
    return state


def _page(*, order_by: str, columns: list[str], ascending: bool = False, average_over: str | None = None) -> State:
    """The state around the charts; with `average_over` runs are grouped by that parameter, and groups show their mean."""
    by_parameter = {"mode": "param", "groupByData": average_over}
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
        "groupBy": None if average_over is None else {"aggregateFunction": "average", "groupByKeys": [by_parameter]},
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _metric_column(key: str) -> str:
    return f"metrics.`{key}`"


def _with_folded_rest(sections: list[State]) -> list[State]:
    """The sections, and folded ones to which MLflow adds a chart of every other metric: else it draws hundreds, unasked."""
    layers = [f"layer{number:02d}" for number in range(1, _MAX_LAYERS + 1)]
    names = [*_OTHER_METRICS, *(f"{group}/{layer}" for group in ("whitebox", "norms") for layer in layers)]
    return [*sections, *({**_section(f"rest-{name}", name), "display": False} for name in names)]


def _section(uuid: str, name: str, *, columns: int = 2) -> State:
    """Two charts a row: at MLflow's own three, axis titles are cut off beside the list of runs."""
    layout = {"columns": columns, "cardHeight": 420}
    return {"uuid": uuid, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False, **layout}


def _chart(uuid: str, kind: str, section: str, **settings: Any) -> State:
    common = {"runsCountToCompare": 100, "metricSectionId": section, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "type": kind, **common, **settings}


def _scatter(uuid: str, section: str, x: str, y: str) -> State:
    """MLflow titles a scatter by its two keys and shows no other title."""
    return _chart(uuid, "SCATTER", section, xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def _difference(uuid: str, section: str) -> State:
    return _chart(
        uuid,
        "DIFFERENCE",
        section,
        compareGroups=["Model metrics", "Parameters"],
        chartName="Runs difference view",
        showChangeFromBaseline=True,
        showDifferencesOnly=True,
        baselineColumnUuid="",
    )


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
