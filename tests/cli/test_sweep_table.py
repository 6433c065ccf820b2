"""Trials in a table: every number whole at any width, what does not fit left out by the word."""

import re

import pytest
from rich.console import Console

from crate_ray.cli.sweep_table import TrialLine, compact, fit_id, fit_parts, fit_words, shape_of, trial_table, varying_keys
from crate_ray.config import SweepConfig


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.75, ".75"),
        (-0.1, "-.1"),
        (3e-4, "3e-4"),
        (1.5e-3, "1.5e-3"),
        (0.0, "0"),
        (2.0, "2"),
        (1.25, "1.25"),
        (64, "64"),
        (True, "on"),
        ((0.1, 0.2), ".1,.2"),
        ("mup", "mup"),
        (0.05, ".05"),
        (0.905, ".905"),
    ],
)
def test_a_value_is_as_short_as_can_be(value, text) -> None:
    assert compact(value) == text


def test_only_what_varies_is_in_the_shape_of_a_trial() -> None:
    sweep = SweepConfig.parse(
        {
            "name": "s",
            "base": "digits_mae",
            "space": {
                "model.encoder_depth": {"grid": [4, 12]},
                "model.width": {"of": "model.encoder_depth", "times": 32},
                "model.num_heads": {"of": "model.width", "times": 0.03125},
                "model.mask_ratio": {"grid": [0.75]},
                "model.parametrization": {"choice": ["standard", "mup"]},
            },
            "tune": {"optimizer.lr": {"loguniform": [1e-4, 1e-2], "num": 3}},
        }
    )
    keys = varying_keys(sweep)
    values = {
        "model.encoder_depth": 12,
        "model.width": 384,
        "model.num_heads": 12,
        "model.mask_ratio": 0.75,
        "model.parametrization": "mup",
        "optimizer.lr": 3e-4,
    }
    assert shape_of(values, keys) == "12x384 mup lr3e-4"
    assert shape_of(values, keys, seed=1003) == "12x384 mup lr3e-4 s1003"
    assert shape_of({"model.width": 64, "eval.max_images": 8}, ("model.width", "eval.max_images")) == "w64 max_images=8"


def test_words_and_ids_are_cut_between_words_and_never_in_a_number() -> None:
    assert fit_words("12x384 m.75 lr3e-4", 18) == "12x384 m.75 lr3e-4"
    assert fit_words("12x384 m.75 lr3e-4", 17) == "12x384 m.75 …"
    assert fit_words("12x384", 3) == "…"
    assert fit_id("vit_equal_decoder-0123abcd", 14) == "vit_…-0123abcd"
    assert fit_parts(["aa", "bb", "cccc"], 6) == ["aa  bb", "cccc"]


@pytest.mark.parametrize("width", [60, 80, 99, 100, 200])
def test_the_table_fits_the_terminal_and_holds_every_number(width: int) -> None:
    lines = [
        TrialLine(
            "vit_equal_decoder-0123abcd", "12x384 m.75 e.1 lr3e-4", "INFEASIBLE", 123.456, 600, 600, 0.123456, 0.712, None, 1e4
        ),
        TrialLine("crate-89abcdef", "4x128 m.5 e.1 lr1e-3", "RUNNING"),
    ]
    console = Console(width=width, record=True, file=None, force_terminal=True)
    with console.capture() as captured:
        console.print(trial_table(lines, width))
    text = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())
    rows = text.splitlines()
    assert len(rows) == 3
    assert max(map(len, rows)) <= width
    everything = r"123\.46M +600/600 +0\.1235 +71\.2% +10000 +infeasible"
    assert re.search(everything if width >= 80 else r" 600/600 +0\.1235 +71\.2% +infeasible", rows[1])
    assert "0123abcd" in rows[1]
    assert "probe" not in rows[0]  # nobody has one
    assert re.search(r" 0 +- +-.* running", rows[2])
