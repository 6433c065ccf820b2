"""The report of a comparison on disk.

In: a comparison. Out: a folder that stands by itself: report.md, report.html, comparison.json, comparison.parquet, figures/.
Nothing else is read, so that writing it again gives the same bytes. The report is written last: where it is, the rest is.
"""

from pathlib import Path

from crate_ray import storage
from crate_ray.analysis.comparison.figures import NAMES, draw
from crate_ray.analysis.comparison.report_html import html
from crate_ray.analysis.comparison.report_markdown import markdown
from crate_ray.analysis.comparison.result import Comparison
from crate_ray.analysis.comparison.sections import compose
from crate_ray.analysis.comparison.table import to_json, to_parquet


def write_comparison(comparison: Comparison, out_dir: str | Path, *, picture_dpi: int = 150) -> Path:
    """Writes the report of a comparison.

    Args:
        comparison: What was found.
        out_dir: Folder of the report; made where it is not there. Pictures of an earlier report that this one lacks are
            deleted.
        picture_dpi: Of the PNG.

    Returns:
        Path of report.md.
    """
    folder = Path(out_dir)
    drawings = draw(comparison, dpi=picture_dpi)
    document = compose(comparison, drawings.absent)
    contents: dict[str, bytes | str] = {
        "comparison.json": to_json(comparison),
        "comparison.parquet": to_parquet(comparison),
    }
    for name, drawing in drawings.by_name.items():
        contents |= {f"figures/{name}.png": drawing.png, f"figures/{name}.svg": drawing.svg}
    contents["report.html"] = html(document, drawings.by_name)
    contents["report.md"] = markdown(document, drawings.by_name)
    for name in set(NAMES) - drawings.by_name.keys():
        for ending in ("png", "svg"):
            storage.delete(str(folder / "figures" / f"{name}.{ending}"))
    for file, content in contents.items():
        storage.write_atomic(str(folder / file), content)
    return folder / "report.md"
