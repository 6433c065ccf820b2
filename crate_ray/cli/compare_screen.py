"""The end of `crate-ray compare`: what is printed for people and what `--json` holds.

In: a comparison, and where its report went. Out: text or one object. Nothing is computed here, so that screen, report and JSON
never differ. The screen has what decides whether to believe it; the report has everything.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from crate_ray.cli.output import console, link_lines, link_rows, print_table, print_text
from crate_ray.runs import encode_number

if TYPE_CHECKING:
    from crate_ray.analysis.comparison.result import Comparison, Configuration
    from crate_ray.cli.compare_sources import Store
    from crate_ray.tracking import LoggedComparison

SHOWN = 14  # configurations; the report has all
_NAMES = 4
_LABEL = 10
_STYLES = {"refused": "red", "flagged": "yellow", "noted": "dim"}


def print_comparison(
    comparison: "Comparison",
    *,
    report: Path,
    logged: "LoggedComparison | None",
    advice: Sequence[str],
    store: "Store | None",
) -> None:
    """The headline, a verdict for each axis, the configurations, what to be careful about, and where everything is."""
    from crate_ray.analysis.comparison.wording import ratio_text

    print_text(comparison.headline, style="bold")
    console.print()
    _print_lines(comparison.verdicts.items())
    ratios = [ratio_text(item) for item in comparison.ratios if item.ratio is not None]
    _print_lines(("ratio", text) for text in ratios if text not in comparison.headline)
    console.print()
    _print_configurations(comparison)
    console.print()
    for finding in comparison.findings:
        _print_lines([(finding.severity, finding.text)], style=_STYLES[finding.severity])
    _print_lines(("excluded", text) for text in _excluded(comparison.excluded))
    _print_lines((("to do", text) for text in advice), style="yellow")
    console.print()
    _print_places(report, logged, store)


def as_document(
    comparison: "Comparison", *, report: Path, logged: "LoggedComparison | None" = None, advice: Sequence[str] = ()
) -> dict[str, Any]:
    """What a program wants to know; the rows of all runs are in comparison.json and comparison.parquet beside the report."""
    found = _finite(asdict(comparison))
    del found["rows"]
    for item in found["configurations"]:
        item["rows"] = [row["run_uid"] for row in item["rows"]]
    for item in found["differences"]:
        item["first"], item["second"] = item["first"]["label"], item["second"]["label"]
    places = {
        "report": str(report),
        "page": str(report.with_suffix(".html")),
        "mlflow": None if logged is None else asdict(logged),
    }
    return {**found, "runs": len(comparison.rows), "to_do": list(advice), **places}


def _print_lines(lines: Iterable[tuple[str, str]], *, style: str | None = None) -> None:
    """Texts beside their labels: broken at words on a terminal, one line each elsewhere."""
    if not console.is_terminal:
        for label, text in lines:
            console.print(f"{label:<{_LABEL}}{text}", markup=False, soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=_LABEL - 1, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in lines:
        grid.add_row(label, escape(text))
    console.print(grid, style=style)


def _print_configurations(comparison: "Comparison") -> None:
    from crate_ray.analysis.comparison.wording import metric_measure

    measure = metric_measure(comparison)
    shown = sorted(comparison.configurations, key=lambda item: not item.is_confirmed)[:SHOWN]
    is_timed = any(item.positions["time"] for item in shown)
    has_control = any(item.control is not None for item in shown)
    columns = ["", "encoder", "PFLOPs", *(["hours"] if is_timed else []), "seeds", f"{measure.unit or 'value'} [95%]"]
    columns += ["untrained"] if has_control else []
    lines = [_cells(item, comparison.metric, measure, is_timed=is_timed, has_control=has_control) for item in shown]
    print_table(columns, lines, title=measure.label)
    if len(shown) < len(comparison.configurations):
        print_text(f"and {len(comparison.configurations) - len(shown)} more configurations in the report", style="dim")
    if comparison.raw_pixels is not None:
        print_text(f"raw pixels, no model: {measure.with_unit(comparison.raw_pixels)}")


def _cells(item: "Configuration", metric: str, measure: Any, *, is_timed: bool, has_control: bool) -> list[str]:
    from crate_ray.analysis.comparison.wording import optional_amount, parameters_text, source_interval, with_interval

    cells = [escape(item.label), parameters_text(item.positions["params"] or 0), optional_amount(item.positions["flops"])]
    cells += [optional_amount(item.positions["time"])] if is_timed else []
    cells += [str(len(item.rows)), with_interval(measure, source_interval(item, metric) or item.metric)]
    return cells + ([measure.text(item.control)] if has_control else [])


def _excluded(excluded: Mapping[str, str]) -> Iterator[str]:
    """Reasons with the runs that they keep out, most first."""
    from crate_ray.analysis.objectives import count_text

    names: dict[str, list[str]] = {}
    for name, reason in excluded.items():
        names.setdefault(reason, []).append(name)
    for reason, found in sorted(names.items(), key=lambda item: -len(item[1])):
        more = f" and {len(found) - _NAMES} more" if len(found) > _NAMES else ""
        yield f"{reason} ({count_text(len(found), 'run')}: {', '.join(found[:_NAMES])}{more})"


def _print_places(report: Path, logged: "LoggedComparison | None", store: "Store | None") -> None:
    lines = [("report", str(report)), ("page", str(report.with_suffix(".html")))]
    if store is None:
        lines.append(("MLflow", "not there: the runs are in no tracking store; `crate-ray tracking sync ROOT` makes one"))
    elif logged is not None:
        pages = {"This comparison": logged.url, **logged.views}
        command = store.how_to_open()
        texts = link_rows(pages) if command is None else link_lines(command, pages)
        lines += [("MLflow" if number == 0 else "", text) for number, text in enumerate(texts)]
    for label, text in lines:
        console.print(f"{label:<{_LABEL}}{escape(text)}", soft_wrap=True)


def _finite(value: Any) -> Any:
    """The value with non-finite numbers by name, as JSON can hold it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return encode_number(value) if isinstance(value, float) else value
