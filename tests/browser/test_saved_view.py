"""The link that crate-ray prints, opened in a fresh browser: what is on the page before anyone clicks."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_folders import make_sweep

from crate_ray.tracking import CURVES, EFFICIENCY, Mirror, initialise, serve
from crate_ray.tracking.client import LOCAL_UI
from crate_ray.tracking.describe import FAMILY_COLOURS
from crate_ray.tracking.server import free_port

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(300),
]
_WAIT_MS = 60_000
_EXPERIMENT = "crate-mae/saved-view"


@pytest.fixture(scope="module")
def view_link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The link that a run prints, on a real server over a real database with the sweep in it."""
    root = tmp_path_factory.mktemp("saved_view")
    uri = f"sqlite:///{root}/mlflow.db"
    assert initialise(uri, _EXPERIMENT) is not None
    mirror = Mirror(uri, _EXPERIMENT)
    for folder in make_sweep(root):
        mirror.follow(folder)
    summary = mirror.close(60)
    assert (summary.pending, summary.error) == (0, None)
    with serve(uri, port=free_port()) as running:
        yield mirror.links()["experiment"].replace(LOCAL_UI, running.url)


@pytest.fixture(scope="module")
def chromium() -> str:
    """The system's browser; Playwright's own download is not used."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no Chromium on this machine; on Debian: apt-get install chromium")
    return path


@pytest.fixture
def page(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=_WAIT_MS)
        try:
            yield browser.new_page(viewport={"width": 1600, "height": 1100})
        finally:
            browser.close()


def shoot(page: Any, folder: Path, name: str) -> Path:
    """Saves what the page shows, for a person to look at."""
    target = Path(os.environ.get("CRATE_RAY_SCREENSHOT_DIR", folder))
    target.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(target / name))
    return target / name


def rgb(colour: str) -> str:
    """`#d55e00` as the browser's style says it."""
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)})"


def point_colours(page: Any) -> list[str]:
    """The fill of every point of the first scatter chart on the page."""
    script = "plot => [...plot.querySelectorAll('.scatterlayer .trace .points path')].map(p => getComputedStyle(p).fill)"
    colours: list[str] = page.locator(".js-plotly-plot:has(.scatterlayer .points path)").first.evaluate(script)
    return colours


def test_the_link_shows_the_scatter_of_parameters_and_accuracy_in_both_colours_without_a_click(
    view_link: str, page: Any, tmp_path: Path
) -> None:
    page.goto(view_link, wait_until="domcontentloaded", timeout=_WAIT_MS)
    page.wait_for_selector(".js-plotly-plot .scatterlayer .points path", timeout=_WAIT_MS)
    page.wait_for_timeout(2000)
    shoot(page, tmp_path, "parameter_efficiency.png")
    title = page.locator("text=final/encoder_params_m vs. final/probe_top1").first
    assert title.is_visible()
    colours = point_colours(page)
    assert len(colours) == 12
    assert {colours.count(rgb(colour)) for colour in FAMILY_COLOURS.values()} == {6}


def test_the_view_of_curves_shows_the_pretraining_loss(view_link: str, page: Any, tmp_path: Path) -> None:
    page.goto(view_link.replace(EFFICIENCY, CURVES), wait_until="domcontentloaded", timeout=_WAIT_MS)
    page.wait_for_selector(".js-plotly-plot .scatterlayer .trace path", timeout=_WAIT_MS)
    page.wait_for_timeout(2000)
    shoot(page, tmp_path, "training_curves.png")
    assert page.locator("text=train/loss").first.is_visible()
