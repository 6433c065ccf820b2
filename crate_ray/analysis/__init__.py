"""Analysis: tables, intervals over seeds, figures and the report. Neither ray nor mlflow."""

from crate_ray.analysis.drawing import FAMILY_COLOURS
from crate_ray.analysis.plots import plot_comparison
from crate_ray.analysis.report import ReportMeta, format_table, headline, report_text, write_report
from crate_ray.analysis.rows import compare_parts_of, read_row
from crate_ray.analysis.seeds import RecipeDifference, SeedSummary, aggregate_seeds
from crate_ray.analysis.statistics import PairedInterval, paired_t_interval
from crate_ray.analysis.table import ComparisonRow, Estimate, comparison_to_json, incomparable, losses_comparable

__all__ = [
    "FAMILY_COLOURS",
    "ComparisonRow",
    "Estimate",
    "PairedInterval",
    "RecipeDifference",
    "ReportMeta",
    "SeedSummary",
    "aggregate_seeds",
    "compare_parts_of",
    "comparison_to_json",
    "format_table",
    "headline",
    "incomparable",
    "losses_comparable",
    "paired_t_interval",
    "plot_comparison",
    "read_row",
    "report_text",
    "write_report",
]
