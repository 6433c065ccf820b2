"""MLflow, a mirror of the run folders. The only room that imports mlflow, and only inside functions."""

from crate_ray.tracking.client import default_artifact_root, default_uri, web_url
from crate_ray.tracking.comparison import LoggedComparison, log_comparison
from crate_ray.tracking.experiment import initialise
from crate_ray.tracking.mirror import Mirror, MirrorSummary
from crate_ray.tracking.query import ExperimentRows, rows_of_experiment
from crate_ray.tracking.reap import SILENT_SECONDS, reap
from crate_ray.tracking.registry import Registration, check_names, find_registry, register_run
from crate_ray.tracking.server import Server, serve
from crate_ray.tracking.sync import SyncResult, sync
from crate_ray.tracking.views import CONFIGURATIONS, CURVES, EFFICIENCY, WHITE_BOX, view_links, view_url, write_views

__all__ = [
    "CONFIGURATIONS",
    "CURVES",
    "EFFICIENCY",
    "SILENT_SECONDS",
    "WHITE_BOX",
    "ExperimentRows",
    "LoggedComparison",
    "Mirror",
    "MirrorSummary",
    "Registration",
    "Server",
    "SyncResult",
    "check_names",
    "default_artifact_root",
    "default_uri",
    "find_registry",
    "initialise",
    "log_comparison",
    "reap",
    "register_run",
    "rows_of_experiment",
    "serve",
    "sync",
    "view_links",
    "view_url",
    "web_url",
    "write_views",
]
