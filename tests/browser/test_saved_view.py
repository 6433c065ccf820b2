"""The links that crate-ray prints, opened in a fresh browser: which charts are on the page before anyone clicks."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_folders import make_sweep

from crate_ray.tracking import Mirror, initialise, serve
from crate_ray.tracking.client import LOCAL_UI
from crate_ray.tracking.describe import FAMILY_COLOURS
from crate_ray.tracking.server import free_port

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(400),
]
_WAIT_MS = 120_000
_EXPERIMENT = "crate-mae/saved-view"
_PROBE = "final/probe_top1"
# The table of differences has no title and no picture: "Compare by" is its first cell.
_CHARTS = """drawn => [...document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')].map(card => {
    const text = card.innerText, isTable = text.includes('Compare by');
    return [isTable ? 'Compare by' : text.split('\\n')[0], isTable || card.querySelector(drawn) !== null];
})"""
_DRAWN = ":is(.points path, .scatterlayer .trace path, .bars path, .parcoords canvas)"


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a sweep prints, on a real server over a real database with 60 trials in it."""
    root = tmp_path_factory.mktemp("saved_view")
    uri = f"sqlite:///{root}/mlflow.db"
    assert initialise(uri, _EXPERIMENT) is not None
    mirror = Mirror(uri, _EXPERIMENT, timeout_s=30)
    for folder in make_sweep(root):
        mirror.follow(folder)
    summary = mirror.close(240)
    assert (summary.pending, summary.error) == (0, None)
    with serve(uri, port=free_port()) as running:
        found = mirror.links()
        there = {title: link.replace(LOCAL_UI, running.url) for title, link in found["views"].items()}
        run = next(link for name, link in found["runs"].items() if name.startswith("crate_mae_tiny-384"))
        yield {**there, "run": run.replace(LOCAL_UI, running.url)}


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A fresh profile of the system's browser; Playwright's own download is not used."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no Chromium on this machine; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=_WAIT_MS)
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(_WAIT_MS)
            yield page
        finally:
            browser.close()


def open_view(page: Any, link: str, titles: list[str], folder: Path, name: str) -> None:
    """Opens a link and scrolls until each of the charts was seen drawn; keeps a picture of what the link shows first.

    A chart is only on the page while it is near the window. A title is the first line of a chart; `titles[:2]` come first.
    """
    page.goto("about:blank")  # from one view to another the page would keep what it had drawn
    page.goto(link, wait_until="domcontentloaded")
    page.mouse.move(800, 800)
    seen: set[str] = set()
    is_shot = False
    deadline = time.monotonic() + _WAIT_MS / 1000
    while missing := [title for title in titles if title not in seen]:
        assert time.monotonic() < deadline, f"not drawn: {missing}; seen: {sorted(seen)}"
        charts = page.evaluate(_CHARTS, _DRAWN)
        drawn = {title for title, is_drawn in charts if is_drawn}
        if set(titles[:2]) <= drawn and not is_shot:
            shoot(page, folder, name)
            is_shot = True
        seen |= drawn
        if len(drawn) == len(charts) and is_shot:
            page.mouse.wheel(0, 300)
        page.wait_for_timeout(200)


def card(page: Any, title: str) -> Any:
    """The chart with a title."""
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    return cards.filter(has=page.get_by_text(title, exact=True)).first


def shoot(page: Any, folder: Path, name: str) -> None:
    """Saves what the page shows, for a person to look at."""
    target = Path(os.environ.get("CRATE_RAY_SCREENSHOT_DIR", folder))
    target.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(target / name), timeout=_WAIT_MS)


def rgb(colour: str) -> str:
    """`#d55e00` as the browser's style says it."""
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)})"


def colours_at_the_top(page: Any, title: str) -> list[str]:
    """The fill of every point of a scatter in the first row."""
    page.mouse.wheel(0, -10_000)
    chart = card(page, title)
    chart.locator(".points path").first.wait_for(state="attached")
    script = "card => [...card.querySelectorAll('.scatterlayer .trace .points path')].map(p => getComputedStyle(p).fill)"
    colours: list[str] = chart.evaluate(script)
    return colours


def test_the_view_of_efficiency_has_scatters_in_both_colours_the_space_the_values_and_the_differences(
    links: dict[str, Any], page: Any, tmp_path: Path
) -> None:
    scatters = [f"final/{axis} vs. {_PROBE}" for axis in ("encoder_params_m", "gflops", "params_m", "train_pflops")]
    titles = [*scatters, "Parallel Coordinates", _PROBE, "Compare by", "eval/knn_top1", "eval/loss"]
    open_view(page, links["Parameter efficiency"], titles, tmp_path, "mlflow_parameter_efficiency.png")
    colours = colours_at_the_top(page, scatters[0])
    assert {colour: colours.count(rgb(colour)) for colour in FAMILY_COLOURS.values()} == dict.fromkeys(
        FAMILY_COLOURS.values(), 30
    )


def test_the_view_by_configuration_has_one_point_for_five_seeds(links: dict[str, Any], page: Any, tmp_path: Path) -> None:
    titles = [f"final/{axis} vs. {_PROBE}" for axis in ("encoder_params_m", "gflops")]
    titles += [_PROBE, "final/eval_loss", "eval/knn_top1", "eval/loss"]
    open_view(page, links["By configuration"], titles, tmp_path, "mlflow_by_configuration.png")
    assert len(colours_at_the_top(page, titles[0])) == 12


def test_the_view_of_curves_has_losses_first_and_speed_below(links: dict[str, Any], page: Any, tmp_path: Path) -> None:
    titles = ["train/loss", "train/grad_norm", "eval/loss", "eval/knn_top1", "perf/images_per_s", "memory/peak_gib"]
    open_view(page, links["Training curves"], titles, tmp_path, "mlflow_training_curves.png")


def test_the_white_box_view_has_one_curve_a_run_over_its_layers(links: dict[str, Any], page: Any, tmp_path: Path) -> None:
    names = ("coding_rate_pre_nats", "coding_rate_post_nats", "nonzero_fraction", "ista_descent_ratio", "ista_objective_ratio")
    titles = [*(f"layers/{name}" for name in names), "layers/initial_coding_rate_pre_nats", "whitebox/latent/rankme"]
    open_view(page, links["White box"], titles, tmp_path, "mlflow_white_box.png")
    page.mouse.wheel(0, -10_000)
    first = card(page, titles[0])
    first.locator(_DRAWN).first.wait_for(state="attached")
    script = "card => [...card.querySelectorAll('.scatterlayer .trace')].filter(t => t.querySelector('.points path')).length"
    curves = first.evaluate(script)
    assert curves == 30  # the runs of CRATE, and of no other family


def test_a_runs_page_has_its_data_its_model_and_the_curves_of_its_machine(
    links: dict[str, Any], page: Any, tmp_path: Path
) -> None:
    page.goto("about:blank")
    page.goto(links["run"], wait_until="domcontentloaded")
    page.get_by_text("digits/train").first.wait_for()
    page.get_by_text("masked autoencoder").or_(page.get_by_text("Logged models")).first.wait_for()
    shoot(page, tmp_path, "mlflow_run.png")
    page.goto(links["run"].replace("?", "/system-metrics?"), wait_until="domcontentloaded")
    page.get_by_text("cpu_utilization_percentage").first.wait_for()
    page.locator(_DRAWN).first.wait_for(state="attached")
    shoot(page, tmp_path, "mlflow_system_metrics.png")
