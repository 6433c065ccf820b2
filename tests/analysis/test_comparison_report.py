"""The report of a comparison: its texts, its page, its data files."""

import json
import math
import re
import struct
import time
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pandas as pd
import pyarrow.parquet as pq
import pytest
from comparison_values import make_comparison, make_configuration, make_difference, make_row
from synthetic_rows import Law, compare, synthetic_comparison, synthetic_layers, synthetic_rows, synthetic_screening

from crate_ray.analysis.comparison.canvas import NARROW, WIDE
from crate_ray.analysis.comparison.document import Paragraph, Picture
from crate_ray.analysis.comparison.panels import plot_differences
from crate_ray.analysis.comparison.report_html import html
from crate_ray.analysis.comparison.report_markdown import markdown
from crate_ray.analysis.comparison.result import Finding
from crate_ray.analysis.comparison.scatter import COSTS, plot_cost
from crate_ray.analysis.comparison.sections import compose
from crate_ray.analysis.comparison.table import to_json, to_table
from crate_ray.analysis.comparison.write import write_comparison
from crate_ray.analysis.markdown import escape, escape_line
from crate_ray.runs.rows import Estimate

HOSTILE = 'a|b<script>alert("x")</script>`c`&amp;'
VOID = {"meta", "link", "br", "img", "use", "path", "rect"}
ABSENT = dict.fromkeys(
    ("encoder_params", "total_params", "train_pflops", "hours", "differences", "sensitivity", "layers"), "No picture."
)


def text_of(comparison):
    """The Markdown without pictures, which take long to draw."""
    return markdown(compose(comparison, ABSENT), {})


class Page(HTMLParser):
    """Collects what a page is made of, and whether every element ends."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.links += [values[key] for key in ("href", "src", "xlink:href") if key in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a full report."""
    return write_comparison(make_comparison(), tmp_path_factory.mktemp("report"), picture_dpi=60).parent


def test_the_first_line_is_the_headline_and_every_part_follows(written):
    text = (written / "report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "**CRATE-MAE needs 0.42x [0.36, 0.51] of the encoder parameters of MAE at 90% probe accuracy.**"
    for expected in (
        "# CRATE-MAE against MAE: digits-sweep",
        "Linear probe top-1 on test; higher is better. 38 runs read, 35 compared in 7 configurations, 3 excluded.",
        # A sentence that begins with its axis does not say it twice.
        "- **At equal training FLOPs:** At equal training compute the two are not distinguishable: +0.1 points [-0.8, 1.0].",
        "- **Flagged:** The runs are of 2 commits.",
        "](figures/encoder_params.png)",
        "| CRATE-MAE 4x128 | CRATE-MAE | 90.0 [89.8, 90.2] | 5: 0 to 4 | 55.0 | +35.0 [+34.8, +35.2] | 0.3M |",
        " 0.3M | 0.6M | 0.0576 | 0.0463 | 12 | yes |",
        "At equal encoder parameters: every pair that was declared, in that order.",
        "| CRATE-MAE 2x96 \N{MINUS SIGN} MAE 2x64 | +1.3 [+1.0, +1.7] | 5 | 0.004 | 0.020 | +1.3 [+0.1, +2.5] | CRATE better |",
        "- **All trainable parameters, against MAE (facebook):** No ratio of all parameters: too few seeds.",
        "- **Training PFLOPs, against MAE (facebook):** No ratio of compute: the fronts do not overlap.",
        "| ISTA step size | CRATE-MAE | 0.1 | linear probe top-1 on test (%) | 88.6 [87.6, 89.6] | 3 | confirmed |",
        "| mask ratio | CRATE-MAE | 0.9 | linear probe top-1 on validation (%) | 84.0 | 4 | exploratory |",
        "| CRATE-MAE 2x96 | share of non-zero entries | trained | 0.42 | 0.36 | - | 0.21 |",
        "| ViT | +0.90 | - |",
        "- **Flagged, `code`:** The runs are of 2 commits.",
        "- **2 runs:** it did not take the last step of its schedule (old-run, other-run)",
        "- **1 run:** FAILED: worker lost (lost-run)",
        "probe protocol 2",
        "corrected by Holm over all pairs tested in this report",
        "They do not cover another draw of training images",
        "crate-ray compare digits-sweep",
    ):
        assert expected in text, expected
    order = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert order == ["Configurations", "Differences", "At equal accuracy", "Sensitivity", "White box, layer by layer",
                     "Label-free measures", "Refused, flagged, excluded", "How it was measured", "Commands"]  # fmt: skip


def test_every_picture_that_the_report_shows_is_there(written):
    pictures = {file.name: file for file in (written / "figures").iterdir()}
    shown = re.findall(r"!\[[^\n]*\]\(figures/([a-z_]+\.png)\)", (written / "report.md").read_text())
    assert len(shown) == 7
    assert set(pictures) == {name for png in shown for name in (png, png.replace(".png", ".svg"))}
    for name in shown:
        width, height = struct.unpack(">II", pictures[name].read_bytes()[16:24])
        assert width == pytest.approx(60 * WIDE.width, abs=1)
        assert height > 150
        root = ElementTree.parse(pictures[name.replace(".png", ".svg")]).getroot()
        assert len(root.find("{http://www.w3.org/2000/svg}title").text) > 40


@pytest.mark.slow
def test_a_second_writing_changes_nothing_and_deletes_only_its_own_pictures(tmp_path):
    write_comparison(make_comparison(), tmp_path, picture_dpi=60)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    assert len(before) == 18
    (tmp_path / "figures" / "notes.txt").write_text("of a person")
    write_comparison(make_comparison(), tmp_path, picture_dpi=60)
    assert {file: file.read_bytes() for file in before} == before
    write_comparison(make_comparison(layers=()), tmp_path, picture_dpi=60)
    assert not (tmp_path / "figures" / "layers.svg").exists()
    assert (tmp_path / "figures" / "notes.txt").exists()
    assert "No picture by layer: no compared run has white-box measures." in (tmp_path / "report.md").read_text()


def test_the_page_stands_alone_and_is_whole(written):
    page_text = (written / "report.html").read_text()
    page = Page(page_text)
    assert page.open == []
    assert {tag for tag, _ in page.tags} >= {"main", "h1", "figure", "figcaption", "table", "caption", "svg", "nav"}
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page_text)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|@import|@font-face", page_text)
    pictures = [values for tag, values in page.tags if tag == "svg"]
    assert len(pictures) == 14  # each wide and narrow
    assert all(values["role"] == "img" and len(values["aria-label"]) > 40 for values in pictures)
    widths = {values["class"]: float(values["viewbox"].split()[2]) for values in pictures}
    assert widths == {"wide": pytest.approx(72 * WIDE.width), "narrow": pytest.approx(72 * NARROW.width)}
    # Text stays text, in the page's own ink.
    assert "trainable encoder parameters (millions)" in page.text
    assert "var(--ink)" in page_text
    assert "#d55e00" in page_text
    assert "#0072b2" in page_text
    headers = [values for tag, values in page.tags if tag == "th"]
    assert all(values["scope"] in ("col", "row") for values in headers)


def test_names_that_users_chose_are_shown_and_never_run():
    item = make_configuration("crate_mae", (4, 128), 3e5, 0.9, label=HOSTILE)
    comparison = make_comparison(
        [item, make_configuration("mae", (4, 80), 3e5, 0.89)],
        name=HOSTILE,
        headline=f"No verdict on {HOSTILE}.",
        verdicts={"params": HOSTILE},
        findings=(Finding("refused", "data.digest", {HOSTILE: (HOSTILE,)}, f"{HOSTILE} differs."),),
        excluded={HOSTILE: HOSTILE},
        commands=(f"crate-ray compare '{HOSTILE}'", "```"),
        curves=(),
    )
    document = compose(comparison, ABSENT)
    page = Page(html(document, {}))
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert 'alert("x")' in "".join(page.text)
    assert "&amp;" in "".join(page.text)  # as written, not as HTML would read it
    lines = markdown(document, {}).splitlines()
    commands = lines.index("## Commands")
    assert not re.search(r"(?<!\\)</?script", "\n".join(lines[:commands]))
    row = next(index for index, line in enumerate(lines) if line.startswith("| a\\|b"))
    assert len(re.findall(r"(?<!\\)\|", lines[row])) == len(re.findall(r"(?<!\\)\|", lines[row - 1]))
    assert lines[commands + 2] == lines[-1] == "````"  # longer than any fence inside


def test_markdown_shows_what_was_written():
    assert escape("p < 0.05 [0.3, 1.2] a_b_c") == "p < 0.05 [0.3, 1.2] a_b_c"
    assert escape("*bold* _it_ ~x~ <b> a&lt;b [l](u)") == r"\*bold\* \_it\_ \~x\~ \<b> a\&lt;b [l]\(u)"
    assert escape("run `crate-ray time *` now") == "run `crate-ray time *` now"
    assert escape("one ` alone\nand a line") == r"one \` alone and a line"
    assert escape_line("- no item") == r"\- no item"
    assert escape_line("1. no item") == r"1\. no item"
    assert escape_line("# no heading") == r"\# no heading"


def test_one_seed_gets_its_interval_over_test_images_and_no_verdict():
    items = [make_configuration(m, (4, 128), 3e5, top1, seeds=1) for m, top1 in (("crate_mae", 0.9), ("mae", 0.88))]
    difference = make_difference(items[0], items[1], why_no_verdict="1 paired seed, and a verdict needs 5", test_noise=None)
    comparison = make_comparison(
        items,
        differences=(difference,),
        curves=(),
        ratios=(),
        total_ratios=(),
        headline="No verdict: 1 seed. " + "Measured it is. " * 12,
    )
    text = text_of(comparison)
    assert text.startswith("**No verdict: 1 seed.** Measured it is. Measured")
    assert "- **One seed:** differences between single runs are not differences between models." in text
    assert "| linear probe top-1 (%), mean | 95% over test images |" in text
    assert re.search(r"\| CRATE-MAE 4x128 \| CRATE-MAE \| \d\d\.\d \| \[\d\d\.\d, \d\d\.\d\] \| 1: 0 \| 55\.0 \|", text)
    assert "| - | 1 | - | - | - | no verdict: 1 paired seed, and a verdict needs 5 |" in text
    assert "Intervals over seeds" not in text
    assert "No ratio: it takes configurations of both families" in text
    assert "nan" not in text.lower().replace("finance", "")


def test_an_axis_without_timing_passes_says_how_to_get_them():
    items = [make_configuration(m, (4, 128), 3e5, 0.9, timing=None) for m in ("crate_mae", "mae")]
    text = text_of(make_comparison(items, verdicts={"params": "One.", "flops": "Two."}, curves=()))
    assert "- **At equal training time:** No verdict: no pair of configurations is equal here. No run has an exclusive" in text
    assert "`crate-ray time RUN...`" in text
    assert "**Time:** not compared. Wall time of training depends on what else the machine did" in text
    page = html(compose(make_comparison(items, curves=()), ABSENT), {})
    assert page.count("crate-ray time RUN...") == 1


def test_a_refusal_stands_with_the_verdicts_and_lists_every_run_it_excludes():
    findings = tuple(
        Finding("refused", f"data.key{i}", {"a": ("x",), "b": ("y",)}, f"`data.key{i}` differs.") for i in range(8)
    )
    excluded = {f"run-{i:03d}": "a screening trial" for i in range(200)}
    document = compose(make_comparison(findings=findings, excluded=excluded), ABSENT)
    text = markdown(document, {})
    assert text.index("- **Refused:** `data.key0` differs.") < text.index("## Configurations")
    assert "- 2 more under “Refused, flagged, excluded”." in text
    assert all(f"run-{i:03d}" in text for i in range(200))
    assert "200 runs: a screening trial" in text
    page = Page(html(document, {}))
    assert ("details", {}) in page.tags


def test_what_could_not_be_read_counts_among_the_runs_of_which_it_is_excluded():
    made = make_comparison()
    assert "Excluded, 3 of 38 runs:" in text_of(made)
    unread = replace(made, excluded={**made.excluded, "empty": "no run was started here, or it is being created"})
    assert "Excluded, 4 of 39 runs, 1 of which could not be read:" in text_of(unread)


def test_a_ratio_whose_interval_holds_one_is_said_to_be_no_difference_wherever_it_stands():
    ratios = [replace(item, ratio=Estimate(0.9, 0.7, 1.2)) for item in make_comparison().ratios[:1]]
    assert text_of(make_comparison(ratios=tuple(ratios))).count("The interval holds 1, so the two are not distinguishable") == 1
    assert "The interval holds 1" not in text_of(make_comparison())


def test_classifiers_are_called_what_they_are():
    names = {"crate_mae": ("crate", "CRATE"), "mae": ("vit_linear", "ViT")}
    items = [
        replace(item, model=names[item.model][0], label=f"{names[item.model][1]} {place}")
        for place, item in enumerate(make_comparison().configurations)
        if item.model in names
    ]
    pair = make_difference(items[0], items[3], interval=Estimate(-0.02, -0.03, -0.01))
    comparison = make_comparison(items, differences=(pair,), curves=(), ratios=(), total_ratios=(), sensitivities=(), layers=())
    text = text_of(replace(comparison, verdicts={}, headline="Measured."))
    assert "# CRATE against ViT: digits-sweep" in text
    assert "| ViT better |" in text
    assert "| CRATE \N{MINUS SIGN} ViT |" in text
    assert "MAE" not in text.partition("## How it was measured")[0]
    figure = plot_differences(comparison, WIDE)
    assert figure.axes[0].get_xlabel() == "← ViT better  ·  CRATE better →\nCRATE minus ViT (points)"
    assert not any("MAE" in label.get_text() for label in plot_cost(comparison, COSTS[0], WIDE).legends[0].get_texts())


def test_a_loss_is_no_percentage_and_less_of_it_is_better():
    items = [make_configuration(m, (4, 128), 3e5, 0.9) for m in ("crate_mae", "mae")]
    difference = make_difference(items[0], items[1], interval=Estimate(-0.02, -0.03, -0.01), p_holm=0.01)
    text = text_of(
        make_comparison(
            items, metric="eval_loss", is_larger_better=False, judged_split=None, curves=(), raw_pixels=None, sensitivities=(),
            differences=(difference,),
        )
    )  # fmt: skip
    assert "Validation loss; lower is better." in text
    assert "-0.0200 [-0.0300, -0.0100] | 5 | 0.004 | 0.010 |" in text
    assert "| CRATE better |" in text
    assert "## At equal metric" in text
    assert "(%)" not in text


def test_pictures_that_are_not_there_are_sentences():
    blocks = compose(make_comparison(), {"hours": "No picture against time."}).sections[2].blocks
    assert Paragraph("No picture against time.") in blocks
    assert Picture("train_pflops") in blocks


def test_the_json_holds_the_whole_comparison_once():
    comparison = make_comparison()
    body = json.loads(to_json(comparison), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert body["schema_version"] == 1
    assert [row["run_uid"] for row in body["rows"]] == [row.run_uid for row in comparison.rows]
    assert body["configurations"][0]["rows"] == [row.run_uid for row in comparison.configurations[0].rows]
    assert body["differences"][0]["first"] == "CRATE-MAE 2x96"
    assert body["differences"][0]["interval"].keys() == {"value", "low", "high"}
    assert body["sensitivities"][0]["metric"][0] == {"value": 0.86, "low": "NaN", "high": "NaN"}
    assert body["correlations"]["vit"]["rankme"] == "NaN"


def test_the_table_has_a_row_a_run_and_pandas_reads_it(written):
    frame = pd.read_parquet(written / "comparison.parquet")
    comparison = make_comparison()
    assert list(frame["run_uid"]) == [row.run_uid for row in comparison.rows]
    assert frame["is_included"].sum() == 35
    by_name = frame.set_index("name")
    assert by_name.loc["old-run", "excluded"] == "it did not take the last step of its schedule"
    first = by_name.loc["CRATE-MAE 2x96-s0"]
    assert first["configuration_label"] == "CRATE-MAE 2x96"
    assert first["settings.depth"] == 2
    assert first["compare.data.digest"] == "d1"
    row = comparison.rows[0]
    assert first["values.probe_top1"] == row.values["probe_top1"]
    assert first["intervals.probe_top1.low"] == row.intervals["probe_top1"].low
    assert math.isclose(first["exclusive_hours"], row.exclusive_hours)
    metadata = pq.read_schema(written / "comparison.parquet").metadata
    assert metadata[b"schema_version"] == b"1"
    assert metadata[b"metric"] == b"probe_top1"


def test_the_table_holds_settings_of_any_kind():
    settings = [{"lr": 1e-3, "clip": 1}, {"lr": "none", "clip": 0.5, "steps": [1, 2], "flag": True, "empty": {}}]
    rows = tuple(make_row(f"r{i}", settings=values) for i, values in enumerate(settings))
    columns = to_table(make_comparison(rows=rows)).to_pydict()
    assert columns["settings.lr"] == ["0.001", "none"]
    assert columns["settings.clip"] == [1.0, 0.5]
    assert columns["settings.steps"] == [None, "[1, 2]"]
    assert columns["settings.flag"] == [None, True]
    assert columns["settings.empty"] == [None, "{}"]


def test_what_compare_finds_is_written_as_it_stands():
    comparison = synthetic_comparison(widths=(64, 96))
    text = text_of(comparison)
    assert text.startswith(f"**{comparison.headline.partition('. ')[0]}")
    assert text.count(" \N{MINUS SIGN} MAE (") == len(comparison.differences)
    assert "seed 2000: killed" in text
    assert all(name in text for name in comparison.excluded)


@pytest.mark.slow
def test_a_thousand_runs_are_written_in_fifteen_seconds(tmp_path):
    law, widths = Law(), tuple(range(64, 704, 32))
    rows = synthetic_rows({"crate_mae": law.needing(0.5), "mae": law, "mae_all_tokens": law}, widths=widths)
    grid = [{"mask_ratio": m, "ista_step_size": s, "penalty": 0} for m in (0.5, 0.65, 0.75, 0.9) for s in (0.05, 0.1, 0.2, 0.4)]
    rows += [row for model in ("crate_mae", "mae") for row in synthetic_screening(model, law, settings=grid, widths=widths)]
    comparison = compare(rows, name="large", layers=synthetic_layers)
    assert len(comparison.configurations) == 60
    begun = time.process_time()
    write_comparison(comparison, tmp_path)
    assert len(rows) >= 900
    assert time.process_time() - begun < 15


@pytest.mark.slow
def test_a_thousand_configurations_of_one_seed_are_written_in_ten_seconds(tmp_path):
    law, widths = Law(), tuple(range(16, 1018, 3))
    rows = synthetic_rows(
        {"crate_mae": law.needing(0.5), "mae": law, "mae_all_tokens": law}, widths=widths, seeds=(0,), sweep=None
    )
    comparison = compare(rows, name="large", layers=synthetic_layers)
    assert len(comparison.configurations) == 1002
    begun = time.process_time()
    write_comparison(comparison, tmp_path)
    assert time.process_time() - begun < 10
