import json
import struct

import pytest

from crate_ray.analysis import Estimate, PairedInterval, RecipeDifference, ReportMeta, format_table, headline, write_report
from crate_ray.analysis.report import report_text


def test_the_report_folder_stands_by_itself(make_row, tmp_path):
    rows = [make_row(), make_row("MAE", family="vit", top1=0.95, params_encoder=9_000_000)]
    path = write_report(rows, tmp_path / "new", ReportMeta(title="Digits", commands=("crate-ray quickstart",)))
    text = path.read_text()
    assert text.startswith("# Digits\n")
    assert "crate-ray quickstart" in text
    assert json.loads((path.parent / "comparison.json").read_text())["headline"] in text
    png = (path.parent / "comparison.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png[:4] == b"\x89PNG"
    assert width > height > 500


def test_the_headline_says_when_a_model_does_not_beat_its_control(make_row):
    weak = make_row("weak", top1=0.62, gain=Estimate(0.02, -0.01, 0.05))
    assert "Not shown to beat its own untrained control: weak." in headline([make_row(), weak])
    assert "Every model beats its own untrained control." in headline([make_row()])


def test_the_headline_calls_overlapping_intervals_not_distinguishable(make_row):
    close = [make_row("a", top1=0.90), make_row("b", top1=0.915), make_row("c", top1=0.97)]
    text = headline(close)
    assert "Highest probe top-1: c" in text
    assert "Not distinguishable: a and b." in text


def test_paired_differences_over_seeds_decide_before_overlap(make_row):
    rows = [make_row("a", top1=0.90), make_row("b", top1=0.91)]
    clear = RecipeDifference("a", "b", PairedInterval(-0.01, -0.015, -0.005, 5))
    assert "Not distinguishable" not in headline(rows, [clear])
    unclear = RecipeDifference("a", "b", PairedInterval(-0.01, -0.03, 0.01, 5))
    assert "Not distinguishable: a and b." in headline(rows, [unclear])


def test_the_report_flags_what_must_not_be_compared(make_row):
    meta = ReportMeta(fingerprints={"a": {"precision": "float32"}, "b": {"precision": "bfloat16"}})
    text = report_text([make_row("a"), make_row("b", mask_ratio=0.5)], meta)
    assert "`precision`: a = float32, b = bfloat16" in text
    assert "Eval losses are not comparable" in text
    agreeing = report_text([make_row("a"), make_row("b")], ReportMeta(fingerprints={"a": {"p": 1}, "b": {"p": 1}}))
    assert "The runs agree" in agreeing
    assert "Eval losses are not comparable" not in agreeing


def test_a_run_that_was_rolled_back_is_flagged_in_the_headline_and_in_the_report(make_row):
    rows = [make_row("helped", rollbacks=2, skipped_steps=7), make_row("alone")]
    assert "Helped past losses that were no numbers, so not the run of its configuration alone: helped." in headline(rows)
    text = report_text(rows, ReportMeta())
    assert "helped: 7 steps without a finite loss or gradient were skipped, and it was rolled back 2 times" in text
    assert "- alone: " not in text
    assert "Helped" not in headline([make_row("alone")])


def test_the_table_has_one_cell_a_column_and_a_dash_for_what_was_not_measured(make_row):
    header, line = format_table([make_row()])
    assert len(header) == len(line)
    cells = dict(zip(header, line, strict=True))
    assert cells["probe top-1 % [95%]"] == "90.0 [89.0, 91.0]"
    assert cells["kNN %"] == "-"


def test_an_empty_comparison_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        write_report([], tmp_path, ReportMeta())
