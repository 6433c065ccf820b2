"""The report of a comparison in a browser: wide, on a phone, dark, on paper, without JavaScript."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comparison_values import make_comparison, make_configuration
from synthetic_rows import synthetic_comparison

from crate_ray.analysis.comparison.write import write_comparison

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
_WAIT_MS = 60_000
_HOSTILE = 'a|b<script>window.ran = 1</script><img src=x onerror="window.ran = 1">' + "w" * 60


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full report with several models, and one of a single seed whose names were chosen to do harm."""
    items = [
        make_configuration(m, (4, 128), 3e5, 0.9, seeds=1, timing=None, label=f"{m} {_HOSTILE}") for m in ("crate_mae", "mae")
    ]
    hostile = make_comparison(items, name=_HOSTILE, headline=_HOSTILE, curves=(), layers=(), excluded={_HOSTILE: _HOSTILE})
    return {
        name: write_comparison(comparison, tmp_path_factory.mktemp(name), picture_dpi=60).with_name("report.html")
        for name, comparison in (("full", synthetic_comparison()), ("hostile", hostile))
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's browser; Playwright's own download is not used."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no Chromium on this machine; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=_WAIT_MS)
        try:
            yield running
        finally:
            running.close()


def open_page(browser: Any, report: Path, **options: Any) -> tuple[Any, list[str]]:
    """The report on a page of its own, with everything that it complained of or asked for."""
    page = browser.new_context(**options).new_page()
    noted: list[str] = []
    page.on("console", lambda message: noted.append(message.text))
    page.on("pageerror", lambda error: noted.append(str(error)))
    page.on("request", lambda request: noted.extend([request.url] if not request.url.startswith(("file:", "data:")) else []))
    page.goto(report.as_uri(), wait_until="load", timeout=_WAIT_MS)
    return page, noted


def shoot(page: Any, folder: Path, name: str) -> None:
    """Saves what the page shows, for a person to look at."""
    target = Path(os.environ.get("CRATE_RAY_SCREENSHOT_DIR", folder))
    target.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(target / name), full_page=True)


@pytest.mark.parametrize("name", ["full", "hostile"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_needs_scrolling_sideways_and_nothing_is_asked_for(
    browser: Any, reports: dict[str, Path], name: str, width: int, tmp_path: Path
) -> None:
    page, noted = open_page(browser, reports[name], viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert noted == []
    assert page.evaluate("window.ran") is None
    shown = page.locator("figure svg:visible")
    assert shown.count() == page.locator("figure").count() >= 4
    sizes = shown.evaluate_all(
        "all => all.flatMap(svg => [...svg.querySelectorAll('text')].map(t => {"
        " const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;"
        " return parseFloat(getComputedStyle(t).fontSize) * scale; }))"
    )
    assert min(sizes) > 7.5  # CSS pixels: small, and legible on a phone of 360
    shoot(page, tmp_path, f"comparison_{name}_{width}.png")


def test_every_picture_has_its_words_and_every_table_its_caption(browser: Any, reports: dict[str, Path]) -> None:
    page, _ = open_page(browser, reports["full"], viewport={"width": 1280, "height": 900})
    names = page.locator("svg[role=img], img").evaluate_all("all => all.map(i => i.getAttribute('aria-label') || i.alt)")
    assert len(names) == 2 * page.locator("figure").count()
    assert all(len(name) > 40 for name in names)
    assert page.locator("table").count() == page.locator("table caption").count() >= 4
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.locator("figure svg.wide text").first.inner_html()  # text, not outlines


def test_without_javascript_it_is_all_there(browser: Any, reports: dict[str, Path]) -> None:
    page, noted = open_page(browser, reports["full"], java_script_enabled=False, viewport={"width": 800, "height": 900})
    assert "CRATE-MAE needs" in page.locator("h1").inner_text()
    page.locator("summary").first.click()
    assert page.locator("details p").first.is_visible()
    assert noted == []


def test_a_dark_scheme_is_followed_by_page_and_pictures(browser: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    page, _ = open_page(browser, reports["full"], color_scheme="dark", viewport={"width": 1000, "height": 900})

    def luminance(selector: str, what: str) -> float:
        colour = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
        return sum(map(float, re.findall(r"\d+", colour)[:3])) / 765

    assert luminance("body", "backgroundColor") < 0.2
    assert luminance("body", "color") > 0.7
    assert luminance("figure svg.wide text", "fill") > 0.7
    assert luminance("td", "color") > 0.7
    shoot(page, tmp_path, "comparison_dark.png")


def test_a_wide_table_scrolls_inside_itself_with_its_first_column_in_sight(browser: Any, reports: dict[str, Path]) -> None:
    page, _ = open_page(browser, reports["full"], viewport={"width": 360, "height": 800})
    region = page.locator("#configurations .scroll")
    assert region.evaluate("e => e.scrollWidth > e.clientWidth")
    region.evaluate("e => { e.scrollLeft = 300 }")
    cell, frame = region.locator("tbody th").first.bounding_box(), region.bounding_box()
    assert abs(cell["x"] - frame["x"]) < 3
    assert region.get_attribute("tabindex") == "0"


def test_it_prints_light_with_all_it_has_folded(browser: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    page, _ = open_page(browser, reports["full"], color_scheme="dark", viewport={"width": 360, "height": 800})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("figure svg.wide").first.is_visible()
    assert not page.locator("figure svg.narrow").first.is_visible()
    assert not page.locator("nav").is_visible()
    content = page.pdf(prefer_css_page_size=True)
    assert content.startswith(b"%PDF")
    assert 4 < len(re.findall(rb"/Type\s*/Page\b", content)) < 40
    target = Path(os.environ.get("CRATE_RAY_SCREENSHOT_DIR", tmp_path))
    target.mkdir(parents=True, exist_ok=True)
    (target / "comparison.pdf").write_bytes(content)
