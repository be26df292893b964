"""Every page and action of the dashboard in Chromium, on the embedded model and recorded data."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page, expect

from proxy.ui.pages.registry import PAGES
from proxy.ui.sources.search_runs import SearchRecord, SearchRuns
from tests.browser.conftest import Chromium, Visit, open_chromium
from tests.browser.embedded import CANDIDATE, SENT, EmbeddedDashboard, embedded_dashboard

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

LOOKS = [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)]
SLOW_MS = 120_000
"""Milliseconds that a replay or a search may take to show its first figures on a busy machine."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def embedded(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedDashboard]:
    async with embedded_dashboard(vllm, tmp_path_factory.mktemp("embedded")) as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser() -> AsyncIterator[Chromium]:
    async with open_chromium() as opened:
        yield opened


async def look(visit: Visit, name: str) -> None:
    """Write a screenshot in both themes and widths, and check that everybody can use the page in each."""
    for theme, width in LOOKS:
        await visit.page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        await visit.page.set_viewport_size({"width": width, "height": 900})
        await visit.settle()
        await visit.shoot(f"embedded-{name}-{theme}-{width}")
        assert await visit.overflow() <= 0, (name, theme, width)
        assert await visit.barriers() == [], (name, theme, width)
    await visit.page.emulate_media(color_scheme="light")
    await visit.page.set_viewport_size({"width": 1280, "height": 900})


async def number_in(page: Page, selector: str) -> int:
    """Return the number that an element shows."""
    return int(re.sub(r"\D", "", await page.locator(selector).inner_text()))


async def test_the_playground_asks_the_embedded_model(browser: Chromium, embedded: EmbeddedDashboard) -> None:
    async with browser.visit(embedded.url) as visit:
        page = visit.page
        await visit.open("/ui/playground")
        await expect(page.get_by_label("Question")).to_have_value(re.compile("^Start with .* mod 13"))
        await page.get_by_label("Controller").select_option("parallel_probe")
        await page.get_by_label("Controller").select_option("adaptive_consistency")
        await expect(page.locator("#cost")).to_contain_text("calibration")
        await page.get_by_label("Controller").select_option("parallel_probe")
        await page.get_by_label("Effort β").fill("0.25")
        await page.get_by_role("button", name="Ask").click()
        await expect(page.locator("#result")).to_be_visible(timeout=SLOW_MS)
        await expect(page.locator("#answer")).to_contain_text(re.compile(r"boxed\{\d+\}"))
        await expect(page.locator("#why")).to_contain_text("The answer had agreement")
        assert await page.locator("#branches li").count() > 1
        bill = [int(text.replace(",", "")) for text in await page.locator("#bill td.number").all_inner_texts()]
        assert sum(bill[:-1]) == bill[-1] > 0
        await look(visit, "playground-asked")


async def test_the_overview_says_what_yesterday_cost_and_on_what(
    browser: Chromium, embedded: EmbeddedDashboard
) -> None:
    async with browser.visit(embedded.url) as visit:
        page = visit.page
        await visit.open("/ui")
        await page.get_by_role("link", name="Yesterday").click()
        tokens = await number_in(page, ".tile:first-child dd:not(.note)")
        rows = page.get_by_role("region", name="What tokens were spent on").locator("tbody tr")
        spent = [int((await row.locator("td").nth(1).inner_text()).replace(",", "")) for row in await rows.all()]
        assert sum(spent) == tokens > 0
        await expect(page.locator("[data-chart] canvas")).to_have_count(4)
        await expect(page.locator("main")).to_contain_text(CANDIDATE)
        await look(visit, "overview")


async def test_a_request_says_why_it_stopped_and_what_another_controller_would_have_done(
    browser: Chromium, embedded: EmbeddedDashboard
) -> None:
    async with browser.visit(embedded.url) as visit:
        page = visit.page
        await visit.open("/ui/requests")
        await look(visit, "requests")
        await page.get_by_text("Filter", exact=True).click()
        await page.get_by_label("Controller").select_option("cmc")
        await page.get_by_role("button", name="Apply").click()
        assert set(await page.locator("td[data-label=Controller]").all_inner_texts()) == {"cmc"}
        await page.get_by_label("Open a request by its id").fill(embedded.requests[0])
        await page.get_by_role("button", name="Open").click()
        await expect(page.get_by_role("heading", name="Why it stopped")).to_be_visible()
        replay = page.get_by_role("button", name="Replay")
        for _ in range(100):  # its branches are completed in the background
            if await replay.count():
                break
            await visit.open(f"/ui/requests/{embedded.requests[0]}")
        for controller in ("self_consistency", CANDIDATE):
            value = await page.locator("#wi-controller option", has_text=controller).first.get_attribute("value")
            await page.get_by_label("Controller").select_option(value)
            await replay.click()
            heading = f"{controller} at β = {SENT[0][0]:g}"
            await expect(page.locator("#what-if")).to_contain_text(heading, timeout=SLOW_MS)
        await look(visit, "request")
        await page.get_by_role("button", name="Right").click()
        await expect(page.get_by_role("status")).to_contain_text("Thank you")


async def test_the_frontier_gives_figures_and_the_header_of_a_point(
    browser: Chromium, embedded: EmbeddedDashboard
) -> None:
    async with browser.visit(embedded.url) as visit:
        page = visit.page
        await visit.open("/ui/frontier")
        series, tokens, accuracy = await _first_point(page, "cmc", 0.5)
        x, y = await _pixel(page, series, tokens, accuracy)
        await page.mouse.move(x, y)
        shown = await _drawn_text(page)
        assert "β = 0.5, 400 questions" in shown
        assert f"cmc: {accuracy:.4g}" in shown
        await page.mouse.click(x, y)
        await expect(page.locator("#header")).to_have_text('x-tts-beta: 0.5\n\n{"tts":{"controller":"cmc"}}')
        await page.mouse.move(0, 0)
        await look(visit, "frontier")
        await page.get_by_role("button", name="Compute").click()
        await expect(page.get_by_text("Computing since")).to_be_visible()
        await expect(page.get_by_label("Data")).to_have_value("published")
        await _until_computed(visit)
        await page.get_by_label("Data").select_option("frontier.json")
        await expect(page.locator(".notice")).to_contain_text("12 questions are behind each point")


async def test_a_search_is_started_watched_and_stopped(browser: Chromium, embedded: EmbeddedDashboard) -> None:
    async with browser.visit(embedded.url) as visit:
        page = visit.page
        await visit.open("/ui/discovery")
        await page.get_by_label("Name").fill("first-search")
        await page.get_by_label("Time limit, minutes").fill("5")
        await page.get_by_role("button", name="Start").click()
        await expect(page.get_by_role("heading", name="first-search")).to_be_visible()
        await expect(page.get_by_text("reading its recordings")).to_be_visible()
        await expect(page.locator(".tile", has_text="Candidates tried")).to_be_visible(timeout=SLOW_MS)
        await expect(page.get_by_role("cell", name=re.compile("^grammar-")).first).to_be_visible(timeout=SLOW_MS)
        await look(visit, "run")
        digest = await _candidate_with_parent(embedded, visit)
        await visit.open(f"/ui/discovery/candidate?run=first-search&digest={digest}")
        await expect(page.get_by_role("heading", name="Changed from")).to_be_visible()
        await expect(page.get_by_label("Differences to the parent")).to_contain_text("+")
        await expect(page.get_by_label(re.compile("^Source of"))).to_contain_text("def decide")
        await page.get_by_role("button", name="Show traces").click()
        await expect(page.locator("#worst pre")).to_contain_text("recorded chains end with", timeout=SLOW_MS)
        await look(visit, "candidate")
        await visit.open("/ui/discovery/run?run=first-search")
        await page.get_by_role("button", name="Stop the search").click()
        await expect(page.get_by_role("row", name=re.compile("first-search not finished"))).to_be_visible()
        await expect(page.get_by_role("button", name="Start")).to_be_visible()
        await look(visit, "discovery")


async def test_controllers_are_promoted_and_rolled_back_with_a_confirmation(
    browser: Chromium, embedded: EmbeddedDashboard
) -> None:
    async with browser.visit(embedded.url) as visit:
        page = visit.page
        await visit.open("/ui/controllers")
        await look(visit, "controllers")
        await page.get_by_role("link", name=CANDIDATE).first.click()
        await expect(page.get_by_role("heading", name="Gate: promote")).to_be_visible()
        await look(visit, "card")
        steps: list[tuple[Any, str, str]] = [
            ({"stage": "canary", "percent": "25"}, "serves 25 % of the requests", "promote to canary"),
            ({"link": "Roll back the canary"}, "is no canary any more", "drop canary"),
            ({"stage": "champion"}, "as the champion", "promote to champion"),
            ({"link": "Roll back the champion"}, "adaptive_consistency", "rollback"),
        ]
        for number, (step, sentence, action) in enumerate(steps):
            await visit.open("/ui/controllers")
            if "link" in step:
                await page.get_by_role("link", name=step["link"]).click()
            else:
                value = await page.locator("#what option", has_text=CANDIDATE).get_attribute("value")
                await page.get_by_label("Controller", exact=True).select_option(value)
                await page.get_by_label("Stage").select_option(step["stage"])
                await page.get_by_label("Share of a canary, %").fill(step.get("percent", "10"))
                await page.get_by_role("button", name="Look at the change").click()
            before = embedded.registry.read()
            await expect(page.locator("main")).to_contain_text("After this change: ")
            await expect(page.locator("main")).to_contain_text(sentence)
            if not number:
                await look(visit, "change")
            await page.get_by_label("Reason").fill(f"step {number}")
            assert embedded.registry.read() == before
            await page.locator("main button.danger").click()
            line = page.get_by_role("region", name="Audit trail").locator("tbody tr").first
            await expect(line).to_contain_text(f"step {number}")
            await expect(line).to_contain_text(action)
            await expect(line).to_contain_text("ui: this machine")
        assert embedded.registry.read().default.canary is None


async def test_recordings_are_imported_whole_or_refused_with_the_line(
    browser: Chromium, embedded: EmbeddedDashboard
) -> None:
    async with browser.visit(embedded.url) as visit:
        page = visit.page
        await visit.open("/ui/recordings")
        before = await number_in(page, ".tile:first-child dd:not(.note)")
        await page.get_by_label("File of recordings").set_input_files(embedded.bad)
        await page.get_by_role("button", name="Import").click()
        status = page.locator("#upload-status")
        await expect(status).to_contain_text("nothing was imported: line 3: model: Field required")
        visit.problems.clear()  # Chromium logs the status of the refusal
        await visit.open("/ui/recordings")
        assert await number_in(page, ".tile:first-child dd:not(.note)") == before
        await page.get_by_label("File of recordings").set_input_files(embedded.good)
        await page.get_by_role("button", name="Import").click()
        await expect(status).to_contain_text("2 recordings of 2 new questions")
        await visit.open("/ui/recordings")
        assert await number_in(page, ".tile:first-child dd:not(.note)") == before + 2
        await look(visit, "data")


async def test_every_page_of_the_navigation_is_opened_here(browser: Chromium, embedded: EmbeddedDashboard) -> None:
    async with browser.visit(embedded.url) as visit:
        for page in PAGES:
            if page.href:
                assert await visit.open(page.href) == 200


async def _first_point(page: Page, controller: str, beta: float) -> tuple[int, float, float]:
    """Return the number of a controller's series in the chart, and a point of it."""
    return tuple(
        await page.evaluate(
            """([name, note]) => {
                const element = document.querySelector("[data-chart]");
                const series = JSON.parse(element.dataset.chart).series.find((each) => each.name === name);
                const at = series.notes.findIndex((each) => each.startsWith(note));
                const drawn = echarts.getInstanceByDom(element).getOption().series;
                return [drawn.findIndex((each) => each.name === name), ...series.points[at]];
            }""",
            [controller, f"β = {beta:g},"],
        )
    )


async def _pixel(page: Page, series: int, x: float, y: float) -> tuple[float, float]:
    """Return where a point of the first chart is in the window."""
    chart = page.locator("[data-chart]").first
    await chart.scroll_into_view_if_needed()
    box = await chart.bounding_box()
    assert box is not None
    at = await chart.evaluate(
        "(element, [seriesIndex, ...at]) => echarts.getInstanceByDom(element).convertToPixel({ seriesIndex }, at)",
        [series, x, y],
    )
    return box["x"] + at[0], box["y"] + at[1]


async def _drawn_text(page: Page) -> str:
    """Return the texts that the first chart shows, with the tooltip once it is there."""
    handle = await page.wait_for_function(
        """() => {
            const drawn = echarts.getInstanceByDom(document.querySelector("[data-chart]")).getZr().storage;
            const text = drawn.getDisplayList(true).map((each) => each.style?.text ?? "").join("\\n");
            return text.includes("questions") ? text : null;
        }"""
    )
    return str(await handle.json_value())


async def _until_computed(visit: Visit) -> None:
    """Reload the page until the frontier of the recordings is listed."""
    for _ in range(1000):
        await visit.open("/ui/frontier")
        if "frontier.json" in await visit.page.get_by_label("Data").inner_text():
            return
        assert not await visit.page.get_by_role("alert").count()
    raise AssertionError("the frontier was never computed")


async def _candidate_with_parent(embedded: EmbeddedDashboard, visit: Visit) -> str:
    """Return the digest of a scored candidate whose parent is in the run."""
    runs = SearchRuns(embedded.runs)
    for _ in range(1000):
        await visit.open("/ui/discovery/run?run=first-search")
        run = runs.read("first-search")
        assert isinstance(run, SearchRecord)
        for each in run.ranked:
            if each.verdict.score is not None and each.candidate.parent in run.by_digest:
                return each.candidate.digest
    raise AssertionError("no candidate was derived from another")
