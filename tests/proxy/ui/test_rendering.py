"""Templates, static files and vendored libraries: nothing is interpreted as HTML, and nothing comes from elsewhere."""

from __future__ import annotations

import gzip
import json
import re
from datetime import UTC, datetime
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from starlette.requests import Request

from proxy.admission.auth import Caller
from proxy.errors import BadRequest
from proxy.ui import paging, rendering
from proxy.ui.charts import Axis, Chart, ChartKind, Scale, Series
from proxy.ui.page import Page, ViewAccess, Viewer
from proxy.ui.static_files import FOLDER, serve_static, static_hashes, static_url
from tests.proxy.ui.conftest import Browser

TEMPLATES = sorted((FOLDER.parent / "templates").glob("*.html"))
SCRIPTS = sorted(FOLDER.glob("*.js"))
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
VIEWER = Viewer(Caller("t", True), True)


class Tags(HTMLParser):
    """Collects the tags of a page and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    @property
    def executed(self) -> list[dict[str, str | None]]:
        """Scripts that a browser would run."""
        return [at for tag, at in self.tags if tag == "script" and at.get("type") != "application/json"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_have_no_inline_script_or_style_and_trust_no_value(template: Path) -> None:
    text = template.read_text()
    assert not re.search(r"\sstyle\s*=|<style|\son[a-z]+\s*=|javascript:|hx-on|\| *safe|autoescape", text)
    for attributes in Tags(text).executed:
        assert (attributes.get("src") or "").startswith("{{ static(")
    assert not re.search(r"""(?:src|href|action)=["'](?:https?:)?//""", text)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_what_can_be_scrolled_has_a_name_and_a_role_and_headers_of_tables_have_text(template: Path) -> None:
    text = template.read_text()
    for tag, attributes in Tags(text).tags:
        if tag in ("pre", "div") and ("tabindex" in attributes or "aria-label" in attributes):
            assert attributes.get("role"), attributes  # screen readers ignore names of elements without a role
            assert attributes.get("aria-label") or attributes.get("aria-labelledby"), attributes
    assert not re.search(r"<th[^>]*>\s*</th>", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_write_text_never_html_and_load_nothing_from_other_hosts(script: Path) -> None:
    text = script.read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://", text
    )


def test_hostile_text_is_shown_as_text() -> None:
    page = rendering.render(
        "error.html", title=HOSTILE, message=HOSTILE, viewer=VIEWER, csrf=HOSTILE, path="/ui", query={}
    )
    tags = Tags(page)
    assert not [at for tag, at in tags.tags if any(name.startswith("on") for name in at)]
    assert all((at.get("src") or "").startswith("/ui/static/") for at in tags.executed)
    assert [at["src"] for tag, at in tags.tags if tag == "img"] == [static_url("icon.svg")]


@pytest.mark.parametrize(
    ("failed", "late", "state"),
    [(0, 0, ""), (5, 5, ""), (0, 6, " warn"), (6, 0, " bad"), (6, 6, " bad")],
)
def test_the_requests_tile_warns_of_many_late_requests_and_more_of_many_failed_ones(
    failed: int, late: int, state: str
) -> None:
    macros = '{% import "macros.html" as m %}'
    line = next(
        text
        for text in (FOLDER.parent / "templates" / "overview_panels.html").read_text().splitlines()
        if 'm.tile("Requests"' in text
    )
    tile = rendering._environment().from_string(macros + line).render(requests=100, failed=failed, late=late)
    assert f'<div class="tile{state}"><dt>Requests</dt><dd>100</dd>' in tile
    if state:
        assert f".tile{state.replace(' ', '.')} dd:not(.note)" in (FOLDER / "components.css").read_text()


def test_hostile_text_in_the_data_of_a_chart_cannot_leave_its_attribute() -> None:
    series = Series(HOSTILE, [(1, 2.0), (3, None)], notes=[HOSTILE, "\u2028"], low=[1.0, None], high=[3.0, None])
    chart = Chart("c", HOSTILE, ChartKind.LINE, Axis(HOSTILE, "s"), Axis("y"), [series], summary=HOSTILE)
    text = (
        rendering._environment().from_string('{% import "macros.html" as m %}{{ m.chart(chart) }}').render(chart=chart)
    )
    tags = Tags(text)
    assert not tags.executed
    assert not [tag for tag, _ in tags.tags if tag == "img"]
    (chart_text,) = [at["data-chart"] for _, at in tags.tags if "data-chart" in at]
    assert json.loads(chart_text or "")["series"][0]["name"] == HOSTILE
    assert json.loads(chart_text or "")["title"] == HOSTILE


def test_hostile_text_in_a_block_of_json_cannot_end_it() -> None:
    block = rendering._environment().from_string("{{ data | tojson }}").render(data={HOSTILE: HOSTILE})
    assert "<" not in block
    assert json.loads(block) == {HOSTILE: HOSTILE}


def test_a_chart_without_points_says_so_instead_of_drawing() -> None:
    chart = Chart("c", "t", ChartKind.AREA, Axis("x"), Axis("y"), [Series("a", [])], empty="Ask something first.")
    text = (
        rendering._environment().from_string('{% import "macros.html" as m %}{{ m.chart(chart) }}').render(chart=chart)
    )
    assert "Ask something first." in text
    assert "data-chart" not in text


def test_figures_that_are_no_numbers_are_shown_as_missing() -> None:
    points = [(1.0, float("nan")), (2.0, float("inf")), (3.0, 4.0)]
    chart = Chart("c", "t", ChartKind.LINE, Axis("x"), Axis("y"), [Series("s", points)])
    text = (
        rendering._environment().from_string('{% import "macros.html" as m %}{{ m.chart(chart) }}').render(chart=chart)
    )
    (shown,) = [at["data-chart"] for _, at in Tags(text).tags if "data-chart" in at]
    assert json.loads(shown or "")["series"][0]["points"] == [[1.0, None], [2.0, None], [3.0, 4.0]]
    assert text.count('<td class="number">–</td>') == 2


def test_the_table_of_a_chart_has_the_figures_of_every_point() -> None:
    series = Series("β", [(0.0, 1.0), (60.0, 12345.0)], low=[0.5, 12000.0], high=[1.5, 13000.0])
    chart = Chart("c", "t", ChartKind.LINE, Axis("Time", scale=Scale.TIME), Axis("Tokens", "tokens"), [series])
    assert chart.columns == ["Series", "Time", "Tokens (tokens)", "Low", "High"]
    assert chart.rows == [["β", 0.0, 1.0, 0.5, 1.5], ["β", 60.0, 12345.0, 12000.0, 13000.0]]
    text = (
        rendering._environment().from_string('{% import "macros.html" as m %}{{ m.chart(chart) }}').render(chart=chart)
    )
    assert '<time datetime="1970-01-01T00:01:00Z">' in text
    assert "12,345" in text


def test_series_over_the_same_times_share_a_table_with_a_column_each() -> None:
    both = [Series("a", [(0.0, 1.0), (60.0, 2.0)]), Series("b", [(0.0, 3.0), (60.0, None)])]
    chart = Chart("c", "t", ChartKind.AREA, Axis("Time", scale=Scale.TIME), Axis("Tokens"), both)
    assert chart.columns == ["Time", "a", "b"]
    assert chart.rows == [[0.0, 1.0, 3.0], [60.0, 2.0, None]]
    text = rendering._environment().from_string('{% import "macros.html" as m %}{{ m.chart(chart) }}')
    assert text.render(chart=chart).count('<th scope="row"><time') == 2
    apart = [both[0], Series("b", [(1.0, 3.0)])]
    assert Chart("c", "t", ChartKind.LINE, Axis("x"), Axis("y"), apart).columns == ["Series", "x", "y"]


def test_a_template_that_lacks_a_value_fails_instead_of_showing_nothing() -> None:
    with pytest.raises(UndefinedError):
        rendering.render("error.html", viewer=VIEWER, csrf="", path="/ui", query={}, title="t")


@pytest.mark.parametrize(
    ("written", "expected_text"),
    [
        (rendering.count(1234.4), "1,234"),
        (rendering.count(None), "–"),
        (rendering.percent(0.256), "26 %"),
        (rendering.seconds(0.25), "250 ms"),
        (rendering.seconds(61.0), "61.0 s"),
        (rendering.seconds(600.0), "10 min"),
        (rendering.seconds(10_000.0), "2.8 h"),
        (rendering.seconds(None), "–"),
        (rendering.beta(0.5), "0.5"),
        (rendering.beta(0.0), "0"),
        (rendering.beta(1.0), "1"),
        (rendering.figure(0.123456), "0.1235"),
        (rendering.instant(None), "–"),
        (
            rendering.instant(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
            '<time datetime="2026-01-02T03:04:05Z">2026-01-02 03:04:05 UTC</time>',
        ),
    ],
)
def test_values_are_written_with_their_units(written: str, expected_text: str) -> None:
    assert written == expected_text


@pytest.mark.parametrize(
    ("is_admin", "is_known", "expected_names"),
    [(True, True, {"a", "v"}), (False, True, {"v"}), (False, False, set())],
)
def test_the_navigation_lists_the_pages_that_a_viewer_may_open(
    monkeypatch: pytest.MonkeyPatch, is_admin: bool, is_known: bool, expected_names: set[str]
) -> None:
    pages = (Page("v", "V", (), "/ui/v"), Page("a", "A", (), "/ui/a", ViewAccess.ADMIN), Page("none", "N", ()))
    monkeypatch.setattr("proxy.ui.pages.registry.PAGES", pages)
    shown = rendering._navigation(Viewer(Caller("t", is_admin), is_admin, is_known=is_known))
    assert {page.name for page in shown} == expected_names


# Static files


def static_request(name: str, digest: str, encoding: str = "") -> Request:
    headers = [(b"accept-encoding", encoding.encode())]
    params = {"name": name, "hash": digest}
    return Request({"type": "http", "method": "GET", "path": "/", "headers": headers, "path_params": params})


async def test_static_files_are_kept_by_browsers_and_sent_compressed_to_those_who_can_read_it() -> None:
    digest = static_hashes()["app.js"]
    plain = await serve_static(static_request("app.js", digest))
    packed = await serve_static(static_request("app.js", digest, "gzip, br"))
    assert bytes(plain.body) == (FOLDER / "app.js").read_bytes() == gzip.decompress(bytes(packed.body))
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    for response in (plain, packed):
        assert "immutable" in response.headers["cache-control"]
        assert response.headers["vary"] == "accept-encoding"


async def test_only_files_of_the_static_folder_are_served(local: Browser) -> None:
    for path in ("/ui/static/0/app.js", "/ui/static/x/page.py", "/ui/static/x/vendor"):
        assert (await local.get(path)).status == 404
    reply = await local.get(static_url("vendor/htmx.min.js"))
    assert (reply.status, reply.headers["content-type"]) == (200, "text/javascript; charset=utf-8")


def test_vendored_libraries_are_those_that_were_taken_and_have_their_licences() -> None:
    vendor = FOLDER / "vendor"
    libraries = json.loads((vendor / "vendor.json").read_text())
    listed = {"vendor.json"}
    for library in libraries:
        assert {"name", "version", "licence", "source", "file", "licence_files", "sha256"} == set(library)
        assert library["licence_files"]
        assert {library["file"], *library["licence_files"]} == set(library["sha256"])
        listed |= set(library["sha256"])
        for name, digest in library["sha256"].items():
            assert sha256((vendor / name).read_bytes()).hexdigest() == digest, name
    assert {path.name for path in vendor.iterdir()} == listed


# Parameters of URLs


def test_links_keep_other_parameters_and_leave_out_empty_ones() -> None:
    assert paging.link("/ui/x", {"a": "1", "b": "", "c": "ü&"}, a=None, d="2") == "/ui/x?c=%C3%BC%26&d=2"
    assert paging.link("/ui/x", {}) == "/ui/x"


@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf", "1e99"])
def test_a_parameter_that_is_no_number_is_refused_with_its_name(text: str) -> None:
    with pytest.raises(BadRequest, match=r"tokens: .* is not a number from 0 to 1e"):
        paging.number({"tokens": text}, "tokens")
    assert paging.number({"tokens": " "}, "tokens", default=3) == 3


def test_a_parameter_with_an_unknown_value_is_refused_with_the_known_ones() -> None:
    assert paging.choice({}, "range", ("hour", "day"), "day") == "day"
    with pytest.raises(BadRequest, match="'year' is not one of hour, day"):
        paging.choice({"range": "year"}, "range", ("hour", "day"), "day")
