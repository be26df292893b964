"""Every page in both themes and widths, and what people do on them, in Chromium."""

from __future__ import annotations

import json
import re
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from playwright.async_api import expect

from proxy.ui.pages.registry import PAGES
from tests.browser.conftest import ALICE, ROOT_KEY, SCREENSHOTS, Chromium, Served, Visit

THEMES = ("light", "dark")
WIDTHS = (1280, 390)
HREFS = [page.href for page in PAGES if page.href]


def shot_name(path: str, theme: str, width: int) -> str:
    """Return the name of a page's screenshot."""
    return f"{path.strip('/').replace('/', '-')}-{theme}-{width}"


async def look(visit: Visit, path: str, name: str, theme: str, width: int) -> None:
    """Open a page, write its screenshot, and check that everybody can use it in this window."""
    assert await visit.open(path) == 200, path
    await visit.shoot(shot_name(name, theme, width))
    assert await visit.overflow() <= 0, path
    assert await visit.barriers() == [], path
    assert "owned" not in await visit.page.title()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
async def test_every_page_looks_right_and_loads_nothing_from_elsewhere(
    chromium: Chromium, served: Served, theme: str, width: int
) -> None:
    async with chromium.visit(served.url, width, color_scheme=theme) as visit:
        for path in HREFS:
            await look(visit, path, path, theme, width)
        await look(visit, f"/ui/requests/{served.requests[-1]}", "ui-request", theme, width)
    assert (SCREENSHOTS / f"{shot_name('ui-request', theme, width)}.png").stat().st_size > 10_000


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
async def test_the_playground_shows_an_episode_and_its_bill(
    chromium: Chromium, served: Served, theme: str, width: int
) -> None:
    async with chromium.visit(served.url, width, color_scheme=theme) as visit:
        page = visit.page
        await visit.open("/ui/playground")
        await page.get_by_label("Controller").select_option("parallel_probe")
        await expect(page.locator("#cost")).to_contain_text("tokens on average on this model")
        await page.get_by_role("button", name="Ask").click()
        await expect(page.locator("#result")).to_be_visible()
        await expect(page.locator("#answer")).to_have_text("It is \\boxed{7}")
        await expect(page.locator("#why")).to_contain_text("The controller answered 7 (")
        await expect(page.locator("#why")).to_contain_text("The answer had agreement")
        branches = await page.locator("#branches li").count()
        assert branches >= 4
        assert await page.locator("#branches .cell").count() > branches
        bill = [int(text.replace(",", "")) for text in await page.locator("#bill td.number").all_inner_texts()]
        assert sum(bill[:-1]) == bill[-1] > 0
        code = await page.locator("#curl").inner_text()
        assert json.loads(code.partition("-d '")[2].removesuffix("'"))["tts"]["controller"] == "parallel_probe"
        assert (
            'extra_body={"tts": {"beta": 0.5, "controller": "parallel_probe"}}'
            in await page.locator("#python").inner_text()
        )
        await visit.shoot(shot_name("ui-playground-asked", theme, width))
        assert await visit.overflow() <= 0
        assert await visit.barriers() == []


async def test_an_error_of_the_api_is_shown_in_the_playground(chromium: Chromium, served: Served) -> None:
    async with chromium.visit(served.url) as visit:
        await visit.open("/ui/playground")
        await visit.page.get_by_label("Token cap").fill("1")
        await visit.page.get_by_role("button", name="Ask").click()
        await expect(visit.page.locator("#problem")).to_contain_text("max_total_tokens")
        await expect(visit.page.get_by_role("button", name="Ask")).to_be_enabled()
        visit.problems = [problem for problem in visit.problems if "status of 400" not in problem]


async def test_the_playground_can_be_used_by_keyboard_alone(chromium: Chromium, served: Served) -> None:
    async with chromium.visit(served.url) as visit:
        page = visit.page
        await visit.open("/ui/playground")
        await page.keyboard.press("Tab")
        await expect(page.get_by_text("Skip to the content")).to_be_focused()
        assert await page.get_by_text("Skip to the content").bounding_box() is not None
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        await expect(page.get_by_label("Question")).to_be_focused()
        await page.keyboard.press("Tab")
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#beta-value")).to_have_text("0.55")
        await page.get_by_label("Question").focus()
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#result")).to_be_visible()


async def test_the_theme_that_was_chosen_is_kept(chromium: Chromium, served: Served) -> None:
    async with chromium.visit(served.url, color_scheme="light") as visit:
        page = visit.page
        await visit.open("/ui")
        colour = "getComputedStyle(document.body).backgroundColor"
        before = await page.evaluate(colour)
        await page.get_by_role("button", name="Switch between light and dark").click()
        after = await page.evaluate(colour)
        assert after != before
        await visit.open("/ui/requests")
        assert await page.evaluate(colour) == after


async def test_times_are_shown_in_the_zone_of_the_viewer(chromium: Chromium, served: Served) -> None:
    zone = "Asia/Tokyo"
    async with chromium.visit(served.url, timezone_id=zone, locale="en-GB") as visit:
        await visit.open("/ui/requests")
        time = visit.page.locator("table time").first
        sent = datetime.fromisoformat(await time.get_attribute("datetime") or "")
        await expect(time).to_contain_text(sent.astimezone(ZoneInfo(zone)).strftime("%H:%M"))


async def test_the_overview_refreshes_itself_unless_a_table_is_open(chromium: Chromium, served: Served) -> None:
    async with chromium.visit(served.url) as visit:
        page = visit.page
        await page.clock.install()
        await visit.open("/ui")
        async with page.expect_response(re.compile("/ui/overview/panels")) as refreshed:
            await page.clock.run_for(16_000)
        assert (await refreshed.value).status == 200
        await expect(page.locator("[data-chart] canvas")).to_have_count(4)
        await page.get_by_text("Figures as a table").first.click()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.clock.run_for(31_000)
        assert asked == []


async def test_feedback_and_what_if_on_the_page_of_a_request(chromium: Chromium, served: Served) -> None:
    async with chromium.visit(served.url) as visit:
        page = visit.page
        await visit.open(f"/ui/requests/{served.requests[0]}")
        for _ in range(50):
            if await page.get_by_role("button", name="Replay").count():
                break
            await visit.open(f"/ui/requests/{served.requests[0]}")
        await page.get_by_label("Controller").select_option("self_consistency")
        await page.get_by_role("button", name="Replay").click()
        await expect(page.locator("#what-if")).to_contain_text("self_consistency at β = 0.5")
        assert await visit.barriers() == []
        await page.get_by_role("button", name="Right").click()
        await expect(page.get_by_role("status")).to_contain_text("Thank you")


async def test_a_client_signs_in_and_sees_nobody_elses_requests(chromium: Chromium, keyed: Served) -> None:
    own, other = keyed.requests
    async with chromium.visit(keyed.url) as visit:
        page = visit.page
        await visit.open("/ui/requests")
        await visit.shoot("ui-sign-in-light-1280")
        assert await visit.barriers() == []
        await page.get_by_label("API key").fill("wrong")
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.get_by_role("alert")).to_contain_text("no key of this proxy")
        visit.problems.clear()  # Chromium logs the status of the refusal
        await page.get_by_label("API key").fill(ALICE)
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.get_by_role("heading", name="Requests", exact=True)).to_be_visible()
        hrefs = [await link.get_attribute("href") for link in await page.locator("tbody a").all()]
        assert hrefs == [f"/ui/requests/{own}"]
        assert await visit.open(f"/ui/requests/{other}") == 404
        visit.problems.clear()
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.get_by_label("API key")).to_be_visible()


async def test_an_admin_signs_in_and_sees_all_requests(chromium: Chromium, keyed: Served) -> None:
    async with chromium.visit(keyed.url, 390) as visit:
        page = visit.page
        await visit.open("/ui/sign-in")
        await visit.shoot("ui-sign-in-light-390")
        await page.get_by_label("API key").fill(ROOT_KEY)
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        await visit.open("/ui/requests")
        assert await page.locator("tbody a").count() == len(keyed.requests)
        keys = await page.locator("td[data-label=Key]").all_inner_texts()
        assert sorted(keys) == ["alice", "bob"]


def test_the_vendored_checker_is_what_was_taken() -> None:
    vendor = Path(__file__).parent / "vendor"
    (library,) = json.loads((vendor / "vendor.json").read_text())
    assert {path.name for path in vendor.iterdir()} == {"vendor.json", *library["sha256"]}
    for name, digest in library["sha256"].items():
        assert sha256((vendor / name).read_bytes()).hexdigest() == digest
