import json

import pytest

from crate_ray.config import PRESETS


def test_every_preset_is_listed_with_its_costs(invoke):
    rows = json.loads(invoke("models", "--json").out)
    assert [row["preset"] for row in rows] == list(PRESETS)
    assert all(row["parameters"]["encoder"] <= row["parameters"]["trainable"] for row in rows)


@pytest.mark.parametrize(("preset", "paper_millions"), [("crate_mae_base", 44.6), ("mae_base", 111.9), ("mae_small", 47.6)])
def test_the_paper_column_is_what_the_papers_print(invoke, preset, paper_millions):
    (row,) = json.loads(invoke("models", preset, "--json").out)
    assert round(row["parameters"]["paper"] / 1e6, 1) == paper_millions


def test_the_published_form_of_crate_costs_more_than_the_executed_one(invoke):
    (row,) = json.loads(invoke("models", "crate_mae_base", "--json").out)
    assert round(row["published_forward_flops"] / 1e9, 2) == 25.63
    assert row["forward_flops"] < row["published_forward_flops"]


def test_the_tables_hold_what_the_json_holds(invoke):
    result = invoke("models", "crate_mae_base", "crate_base")
    assert result.code == 0
    assert "44.64" in result.out
    assert "25.63" in result.out
    assert "mae_huge" not in result.out


def test_an_unknown_preset_is_refused_with_the_valid_ones(invoke):
    result = invoke("models", "crate_mae_bse")
    assert result.code == 2
    assert "did you mean 'crate_mae_base'?" in result.err
    assert "Traceback" not in result.err
