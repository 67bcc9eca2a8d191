"""What a reviewer sees in MLflow: the printed link, opened in a fresh browser that may talk to this machine only."""

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright import sync_api

from orchestrator.reporting.page import write_report
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import append_result
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.views import run_link
from tests.orchestrator import planted
from tests.orchestrator.servers import free_port, running, skip_or_fail

CONFIG = planted.search_config()
PATIENCE_MS = 60_000
pytestmark = pytest.mark.timeout(300)


class Search:
    """A recorded search, and MLflow's own UI over it."""

    def __init__(self, storage: StoragePaths) -> None:
        run = storage.run(CONFIG.name)
        write_atomic(run.config, CONFIG.model_dump_json())
        tracker = Tracker.open(CONFIG, run, storage)
        run_ids = {row["trial_id"]: self._record(tracker, run, row) for row in planted.all_rows()}
        outcome = write_report(run)
        tracker.search_ended(lambda: outcome)
        self.port = free_port()
        command, self.link = tracker.how_to_open(self.port).splitlines()
        self.command = shlex.split(command)
        self.parent_link = run_link(f"http://127.0.0.1:{self.port}", tracker.search.experiment_id, tracker.parent_id)
        self.trial_link = run_link(f"http://127.0.0.1:{self.port}", tracker.search.experiment_id, run_ids["trial_0001"])

    def _record(self, tracker: Tracker, run: RunPaths, row: dict[str, object]) -> str:
        """Record one network and return its run."""
        trial_id = str(row["trial_id"])
        planted.plant_trial(run, CONFIG, row)
        append_result(run.results, row)
        run_id = tracker.trial_started(trial_id, {}, CONFIG.base, kind=str(row["kind"]))
        tracker.trial_ended(trial_id, row, row["status"])
        return str(run_id)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Search]:
    if shutil.which("chromium") is None:
        skip_or_fail("needs a browser (apt-get install chromium)")
    search = Search(StoragePaths(tmp_path_factory.mktemp("storage")))
    settings = [word for word in search.command if "=" in word.partition("/")[0] and word[0].isupper()]
    environment = dict(word.split("=", 1) for word in settings)
    with running(search.command[len(settings) :], environment, f"http://127.0.0.1:{search.port}/health"):
        yield search


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


@pytest.fixture
def page(browser: "sync_api.Browser", tmp_path: Path) -> Iterator["sync_api.Page"]:
    """A page with a fresh profile. Whatever it asks of another machine fails the test."""
    with browser.new_page(viewport={"width": 1600, "height": 1000}) as page:
        page.set_default_timeout(PATIENCE_MS)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        yield page
        page.screenshot(path=tmp_path / "page.png")
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}


def test_printed_link_shows_every_network(search: Search, page: "sync_api.Page") -> None:
    page.goto(search.link)
    chart = page.locator(".js-plotly-plot .scatterlayer").first
    chart.wait_for()
    page.wait_for_function(
        "number => document.querySelector('.js-plotly-plot').querySelectorAll('.scatterlayer .point').length === number",
        arg=len(measured()),
    )
    assert page.get_by_text("latency_ms").first.is_visible()
    for row in measured():
        page.get_by_text(row["trial_id"], exact=True).first.wait_for()


def test_run_of_the_search_shows_the_front(search: Search, page: "sync_api.Page") -> None:
    page.goto(search.parent_link)
    picture = page.locator("img[src*='front.png']").first
    picture.wait_for()
    page.wait_for_function("picture => picture.complete", arg=picture.element_handle())
    assert picture.evaluate("picture => picture.naturalWidth") > 300


def test_front_page_is_interactive_in_the_browser(search: Search, page: "sync_api.Page") -> None:
    page.goto(search.parent_link.replace("?", "/artifacts/report.html?"))
    frame = page.frame_locator("iframe").first
    frame.locator(".scatterlayer .point").first.wait_for()
    frame.locator(".scatterlayer .point").first.hover(force=True)
    shown = frame.locator(".hoverlayer").get_by_text("macs_ratio").first
    shown.wait_for()
    assert shown.is_visible()


def test_page_of_a_trial_shows_its_architecture(search: Search, page: "sync_api.Page") -> None:
    page.goto(search.trial_link.replace("?", "/artifacts/architecture.json?"))
    page.get_by_text("removed_blocks").first.wait_for()
    assert page.get_by_text("layer1.0.conv1").first.is_visible()
    page.get_by_text("widths.png").first.click()
    page.wait_for_function("() => [...document.images].some(image => image.naturalWidth > 300)")


def measured() -> list[dict[str, object]]:
    return [row for row in planted.all_rows() if row["status"] == "finished"]
