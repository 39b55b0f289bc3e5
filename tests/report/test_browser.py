"""The page in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dptrain.report import page

from . import made_up
from .conftest import fill

pytestmark = pytest.mark.slow

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,2000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's chromium with the page of a folder open; it logs what it fetches."""
    selenium = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if not CHROMIUM.is_file() or driver is None:
        pytest.skip("chromium and chromium-driver are not installed")
    folder = fill(tmp_path_factory.mktemp("page"), ("fig1", "fig5", "simulation"))
    html = page(folder, folder / "report.html")
    options = selenium.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with selenium.Chrome(options, selenium.ChromeService(driver)) as chrome:
        chrome.get(html.as_uri())
        yield chrome


def test_it_loads_without_network_or_error(browser):
    wait(browser, "return document.querySelectorAll('.plot .main-svg').length > 0")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # The browser's own first page fetches its parts, too.
    fetched = [s["request"]["url"] for s in sent if not s["documentURL"].startswith("chrome:")]
    assert fetched and all(url.startswith(("file:", "data:", "blob:")) for url in fetched), fetched
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_figures_hold_what_was_measured(browser):
    browser.execute_script("document.getElementById('fig5').scrollIntoView()")
    wait(browser, "return document.querySelector('#fig5 .plot').data !== undefined")
    bars = browser.execute_script("return document.querySelector('#fig5 .plot').data[0].x")
    assert sorted(bars) == sorted(r.results["examples_per_s"] for r in made_up.fig5())


def test_a_click_on_a_header_sorts(browser):
    def column() -> list[float]:
        return browser.execute_script(
            "const t = document.querySelector('#fig5 table');"
            "const i = [...t.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === 'Examples/s');"
            "return [...t.tBodies[0].rows].map(r => Number(r.cells[i].dataset.value))"
        )

    before = column()
    click = (
        "[...document.querySelectorAll('#fig5 th button')].find(b => b.textContent === 'Examples/s').click()"
    )
    browser.execute_script(click)
    assert column() == sorted(before) != before
    browser.execute_script(click)
    assert column() == sorted(before, reverse=True)


def test_dark_and_back(browser):
    ground = "return getComputedStyle(document.body).backgroundColor"
    theme = "return document.documentElement.dataset.theme"
    seen = set()
    for _ in range(2):
        browser.execute_script("document.getElementById('theme').click()")
        seen.add((browser.execute_script(theme), browser.execute_script(ground)))
    assert {name for name, _ in seen} == {"light", "dark"} and len({colour for _, colour in seen}) == 2


def test_a_phone_scrolls_downwards_alone(browser):
    browser.set_window_size(500, 900)
    try:
        wait(browser, "return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        browser.set_window_size(1200, 2000)


def wait(browser: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(lambda b: b.execute_script(script))
