"""`crate-ray probe`: what it prints, and what it refuses in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from crate_ray.cli import output, probe_table
from crate_ray.cli.main import app
from crate_ray.cli.probe_table import correlate, print_reports


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "7"), "has no checkpoint of step 7; it has none"),
        ((), "is not finished; train it to its end first"),
        (("--data", "x y=/d"), "small letters, digits and -"),
        (("--set", "train.steps=3"), "--set changes the runs of --fine-tune"),
        (("--layer", "2"), "--layer says which layers --pictures draws"),
        (("--few-label", "0"), "greater than or equal to 1"),
        (("--protocol", "mine"), "is not one of 'house', 'published', 'label-free'"),
    ],
)
def test_what_cannot_be_judged_is_one_message_and_exit_code_2(
    invoke: Callable[..., Any], make_run: Callable[..., Any], arguments: tuple[str, ...], message: str
) -> None:
    folder = make_run("one", "KILLED")
    outcome = invoke("probe", folder.uri, *arguments)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert not list(Path(folder.uri).glob("probe_*"))


def test_no_run_and_the_same_run_twice_are_refused(
    invoke: Callable[..., Any], make_run: Callable[..., Any], tmp_path: Path
) -> None:
    folder = make_run("one")
    assert "is not a run folder" in invoke("probe", tmp_path / "nothing").err
    outcome = invoke("probe", folder.uri, folder.uri)
    assert outcome.code == 2
    assert "the same name; give each run once" in outcome.err


def report(top1: float, rankme: float, **more: Any) -> dict[str, Any]:
    interval = [top1, top1 - 0.03, top1 + 0.03]
    few = {"top1": [0.4, 0.3, 0.5], "std_over_draws": 0.02}
    return {
        "data_digest": "a",
        "probe_top1": interval,
        "control_top1": [0.5, 0.4, 0.6],
        "cls_top1": interval,
        "control_cls_top1": [0.5, 0.4, 0.6],
        "gain": [top1 - 0.5, top1 - 0.55, top1 - 0.45],
        "knn_top1": interval,
        "control_knn_top1": [0.5, 0.4, 0.6],
        "few_labels": {"10": few, "50": None},
        "control_few_labels": {"10": few, "50": None},
        "label_free": {"rankme": rankme, "alpha_req": None, "coding_rate": 20.0, "images": 788},
        "control_label_free": {"rankme": 3.0, "alpha_req": 1.2, "coding_rate": 10.0},
        **more,
    }


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `print_reports` puts on a wide screen."""
    wide = Console(width=200, highlight=False, emoji=False)
    monkeypatch.setattr(output, "console", wide)
    monkeypatch.setattr(probe_table, "console", wide)

    def show(*arguments: Any) -> str:
        capsys.readouterr()
        print_reports(*arguments)
        return " ".join(capsys.readouterr().out.split())

    return show


def test_every_number_stands_beside_its_control_and_nothing_that_was_not_measured_has_a_line(
    printed: Callable[..., str],
) -> None:
    tuned = {"top1": [0.9, 0.85, 0.95], "top1_by_seed": [0.9, 0.9], "std_over_seeds": 0.0}
    more = {"fine_tune": tuned, "control_fine_tune": tuned | {"top1": [0.6, 0.5, 0.7]}, "fine_tune_gain": [0.3, 0.2, 0.4]}
    text = printed({"crate": report(0.8, 5.0, **more), "vit": report(0.9, 7.0)}, "validation", [])
    assert "linear probe, mean token 80.0% [77.0%, 83.0%] (50.0%) 90.0% [87.0%, 93.0%] (50.0%)" in text
    assert "10 labels a class 40.0% [30.0%, 50.0%] (40.0%)" in text
    assert "fine-tuned 90.0% [85.0%, 95.0%] (60.0%), 2 seeds -" in text
    assert "RankMe 5 (3) 7 (3)" in text
    assert "alpha-ReQ - (1.2) - (1.2)" in text
    assert "never ranked across families" in text
    assert "published" not in text
    assert "50 labels" not in text
    assert "raw pixels" not in text
    assert "do not compare" not in text


def test_runs_of_different_data_are_flagged_and_another_data_set_is_named(printed: Callable[..., str]) -> None:
    other = {"data": "cifar10"}
    text = printed({"a": report(0.8, 5.0, **other), "b": report(0.7, 4.0, **other, data_digest="b")}, "test", [])
    assert "on test of cifar10, 95% intervals" in text
    assert "judged on different shards: their columns do not compare" in text


def test_correlations_are_within_a_family_from_five_runs_on(printed: Callable[..., str]) -> None:
    crate = [report(0.5 + 0.01 * i, 2.0 + i % 5) for i in range(6)]
    vit = [report(0.9, 7.0) for _ in range(4)]
    found = correlate([*crate, *vit], ["crate"] * 6 + ["vit"] * 4)
    assert [(row["family"], row["measure"], row["runs"]) for row in found] == [("crate", "RankMe", 6)]
    text = printed({"crate": crate[0]}, "validation", found)
    assert "crate, 6 runs: RankMe and linear probe, rank correlation +" in text
    assert json.dumps(found)


def test_every_option_that_the_page_of_evaluation_gives_to_probe_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    command = typer.main.get_command(app).commands["probe"]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    given = {option for line in page.splitlines() if "crate-ray probe" in line for option in re.findall(r" (--[a-z-]+)", line)}
    assert {"--protocol", "--step", "--data", "--fine-tune", "--workers"} <= given <= known
