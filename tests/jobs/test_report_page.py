"""The report in a real browser: it draws, asks for nothing, runs nothing from data, and can be used by everyone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import report_dataset
from axe_playwright_python.sync_playwright import Axe
from browser import chromium, open_page
from formula_dataset import Made
from playwright.sync_api import Browser, Locator, Page
from report_dataset import HOSTILE, POINTS
from screenshots import shoot

import actlake
from actlake.jobs.report.collect import collect
from actlake.jobs.report.page import render

#: Pictures of the last run, to be looked at; not under version control.
ARTEFACTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"

#: Figures, and the kind of mark that each must have at least so many of, of the dataset below.
MARKS = {
    "Splits": ('[data-mark="bar"] rect', 4),
    "Coverage": ('[data-mark="bar"] rect', 10),
    "Norm of the rows": ('[data-mark="dot"] path', len(POINTS)),
    "Mean against spread": ('[data-mark="dot"] path', len(POINTS)),
    "Spread of the norm": ('[data-mark="rule"] line', 3),
    "Distribution of the norm": ('[data-mark="rect"] rect', 3),
    "Norm by position": ('[data-mark="dot"] circle', 15),
    "Channels that stand out": ('[data-mark="cell"] rect', 9),
    "Compression": ('[data-mark="dot"] path', len(POINTS)),
    "Throughput in time": ('[data-mark="rect"] rect', 4),
    "Progress": ('[data-mark="line"] path', 1),
    "Tokens": ('[data-mark="bar"] rect', 20),
    "Roles": ('[data-mark="bar"] rect', 1),
    "Sources": ('[data-mark="bar"] rect', 1),
    "Label “kind”": ('[data-mark="bar"] rect', 3),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a half-built dataset."""
    folder = tmp_path_factory.mktemp("page")
    made = report_dataset.make(folder)
    for shard in (0, 2, 3):
        made.train.build(shard)
    made.heldout.build(0)
    return write(folder / "report.html", made.url)


def write(path: Path, url: str, **options: Any) -> Path:
    path.write_bytes(render(collect(actlake.open(url), **options)))
    return path


def figure(page: Page, title: str) -> Locator:
    return page.locator(f'figure[data-title="{title}"]')


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    context = browser.new_context(color_scheme="light", viewport={"width": 1200, "height": 900})
    yield open_page(context, report).page
    context.close()


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_asks_for_nothing_and_passes_axe(
    browser: Browser, report: Path, scheme: Literal["light", "dark"], width: int
) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, has_touch=width < 500)
    watched = open_page(context, report)
    counts = {
        title: figure(watched.page, title).locator(f".plot svg {mark}").count() for title, (mark, _) in MARKS.items()
    }
    assert {title: n for title, n in counts.items() if n < MARKS[title][1]} == {}
    assert watched.page.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    violations = Axe().run(watched.page).response["violations"]
    assert [(item["id"], item["nodes"][0]["html"], item["nodes"][0]["failureSummary"]) for item in violations] == []
    assert (watched.complaints, watched.requests) == ([], [report.as_uri()])
    context.close()


def test_text_from_data_stays_text(page: Page) -> None:
    assert page.locator("h1").inner_text() == "a <b>bold & hostile <script>alert(1)<"
    assert HOSTILE in page.locator(".tokens").inner_text()
    assert page.locator("select[aria-label=Document] option").first.inner_text().startswith("1. </script><script>")
    assert page.evaluate("window.harmed") is None
    assert page.locator("img").count() == 0
    assert page.evaluate("document.scripts.length") == 1 + page.locator("script:not([type])").count()


def test_the_policy_runs_no_other_script_and_no_connection(page: Page) -> None:
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.harmed = 1";
        document.body.append(script);
        const image = document.createElement("div");
        image.innerHTML = "<img src=x onerror='window.harmed = 1'>";
        document.body.append(image);
    }""")
    refused = "() => fetch('https://example.invalid/').then(() => 'sent', (error) => error.message)"
    page.wait_for_timeout(100)
    assert page.evaluate("window.harmed") is None
    violated = """() => new Promise((done) => {
        addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        fetch("https://example.invalid/").catch(() => {});
    })"""
    assert page.evaluate(refused) != "sent"
    assert page.evaluate(violated) == "connect-src"


def test_what_is_missing_is_said_first(page: Page) -> None:
    banner = page.locator(".banner").inner_text()
    assert banner.startswith("Incomplete. train: 3 of 6 shards, 768 of 1,465 rows. ")
    assert page.locator("#spec").inner_text().count("train 1, 4, 5") == 1


def test_the_theme_can_be_changed(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, marks = page.evaluate(ground), page.locator(".plot svg rect").count()
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(ground) != light
    assert page.locator(".plot svg rect").count() == marks
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(ground) == light


def test_documents_are_browsed_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    tokens, detail = page.locator(".tokens"), page.locator(".detail")
    tokens.focus()
    assert "no row" in detail.inner_text(), "BOS"
    page.keyboard.press("ArrowRight")
    assert "at position 1: norm" in detail.inner_text()
    page.keyboard.press("End")
    last = tokens.locator("span").count() - 1
    assert f"at position {last}:" in detail.inner_text()
    assert tokens.locator("span.here").get_attribute("data-token") == str(last)
    page.get_by_role("button", name="Next →").press("Enter")
    assert "at position 0:" in detail.inner_text()


def test_choices_change_their_figure(page: Page) -> None:
    histogram = figure(page, "Distribution of the norm")
    before = histogram.locator(".plot").inner_html()
    histogram.locator("select").select_option("layers.1.attn_z")
    assert histogram.locator(".plot").inner_html() != before
    page.locator("#documents").get_by_label("hook point").select_option("layers.0.resid_post")
    page.locator(".tokens").press("ArrowRight")
    assert "layers.0.resid_post" in page.locator(".detail").inner_text()


@pytest.mark.parametrize("rows", [0, 1000])
def test_datasets_with_next_to_nothing_have_a_page(browser: Browser, tmp_path: Path, rows: int) -> None:
    empty = Made(str(tmp_path / "empty"), 600)
    small = Made(str(tmp_path / "small"), 600, voids=frozenset(range(256))).build(0)
    for made in (empty, small):
        path = write(tmp_path / "report.html", made.url, n_rows=rows)
        context = browser.new_context(viewport={"width": 1000, "height": 700})
        watched = open_page(context, path)
        assert watched.complaints == []
        assert "Incomplete" in watched.page.locator(".banner").inner_text()
        assert watched.page.locator("figure").count() >= 13
        context.close()


def test_a_watched_page_reloads_and_can_be_held(browser: Browser, tmp_path: Path) -> None:
    made = Made(str(tmp_path / "ds"), 600).build(0)
    path = write(tmp_path / "report.html", made.url, watch_s=30)
    context = browser.new_context()
    context.clock.install()
    page = open_page(context, path).page
    page.get_by_label("reload every").uncheck()
    made.build(1)
    write(path, made.url, watch_s=30)
    page.clock.fast_forward(100_000)
    assert "256 of 600 rows" in page.locator(".banner").inner_text()
    page.get_by_label("reload every").check()
    page.clock.fast_forward(31_000)
    page.get_by_text("512 of 600 rows").wait_for(timeout=10_000)
    context.close()


@pytest.mark.slow
def test_pictures_are_kept(browser: Browser, report: Path) -> None:
    for picture in shoot(browser, report, ARTEFACTS):
        assert picture.stat().st_size > 10_000
