"""The report's program: what it runs, keeps, renders and quotes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bench.rows import Row
from tests.readability import ROOT
from tests.report.aims import Aim, AimOutcome, outcomes, read_number
from tests.report.document import page
from tests.report.measuring import SectionResult, measure, read_result
from tests.report.quotes import quotes_of, section_texts, tables_without_source, wrong_quotes
from tests.report.sections import Section, list_items, sections

OF_DEFINITIONS = {"api.md"}
"""Pages whose tables have codes and limits."""
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPORT = ROOT / "docs" / "report.md"
ROWS = [
    Row("forwarding, 50 connections", "4,560 /s", "bare FastAPI: 6,443 /s", "0.71", "0.65 to 0.81"),
    Row("200 SSE streams", "918 /s", "direct: 1,010 /s", "0.91"),
    Row("200 SSE streams", "918 /s", "bare FastAPI: 890 /s", "1.03"),
    Row("200 SSE streams, first byte p50", "27 ms", "direct: 1 ms; bare FastAPI: 47 ms", "+26 ms"),
    Row("own CPU of a request, 16 branches, 10 rounds of 64 tokens: controller in the process", "13.0 ms", "", ""),
]


def section(name: str, code: str, *, has_rows: bool = False, timeout_s: float = 60.0) -> Section:
    """Return a section that runs a Python program of one line."""

    def command(folder: Path) -> Sequence[str]:
        return sys.executable, "-c", code, str(folder / f"{name}.rows.json")

    return Section(name, f"About {name}", "What it is.", command, f"make {name}", has_rows, timeout_s=timeout_s)


def result(name: str, *, status: int = 0, text: str = "", rows: Sequence[Row] = ()) -> SectionResult:
    return SectionResult(name, "abc", "2026-11-30", 60.0, status, text, list(rows))


def test_every_section_has_an_explanation_and_its_own_name() -> None:
    listed = sections(10.0, with_peers=True)
    assert len({one.name for one in listed}) == len(listed)
    assert [one.name for one in listed if not one.about] == []


@pytest.mark.process
def test_a_section_is_measured_once_for_the_same_code(tmp_path: Path) -> None:
    lines = "import json, sys; print('run'); open(sys.argv[1], 'w').write(json.dumps([['a', 'b', 'c', 'd', 'e']]))"
    counted = f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); {lines}"
    first = measure(section("one", counted, has_rows=True), tmp_path, "code 1")
    assert (first.status, first.text, first.rows) == (0, "run\n", [Row("a", "b", "c", "d", "e")])
    assert measure(section("one", counted, has_rows=True), tmp_path, "code 1") == first
    assert (tmp_path / "runs").read_text() == "x"
    measure(section("one", counted, has_rows=True), tmp_path, "code 2")
    assert (tmp_path / "runs").read_text() == "xx"


@pytest.mark.process
def test_the_lists_of_a_page_are_the_summary_of_its_section(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<ul><li>5 &lt; 7</li><li><b>all</b>\nwell </li></ul><p>no item</p>")
    summarised = section("one", "")._replace(summary=lambda folder: list_items(folder / "page.html"))
    assert measure(summarised, tmp_path, "code").text == "5 < 7\nall\nwell"


@pytest.mark.process
def test_a_failed_section_is_reported_and_run_again(tmp_path: Path) -> None:
    failed = measure(section("one", "raise SystemExit(3)"), tmp_path, "code")
    assert failed.status == 3
    assert measure(section("one", "print('well')"), tmp_path, "code").status == 0
    (tmp_path / "one.json").write_text("{")
    assert read_result(tmp_path / "one.json") is None
    assert measure(section("one", "print('well')"), tmp_path, "code").text == "well\n"


@pytest.mark.process
def test_a_section_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    late = measure(section("one", "import signal; signal.pause()", timeout_s=0.5), tmp_path, "code")
    assert late.status < 0


@pytest.mark.parametrize("minutes", [5.0, 30.0, 120.0])
def test_a_long_soak_has_the_time_it_needs(minutes: float) -> None:
    (soak,) = [section for section in sections(minutes, with_peers=False) if section.name == "soak"]
    assert soak.timeout_s >= 60 * minutes + 600  # warm-up, start and stop of its servers


def test_aims_are_compared_with_the_figures_of_their_rows() -> None:
    aims = (
        Aim("forwarding, 50", "ratio", 1.0),
        Aim("200 SSE streams$", "ratio", 0.9, compared="direct"),
        Aim("no such", "ratio", 1),
    )
    assert [(each.measured, each.is_reached) for each in outcomes(ROWS, aims)] == [(0.71, False), (0.91, True)]
    both = [Row("speed", "1", "", "2.0"), Row("speed (compiled core)", "1", "", "3.0")]
    assert [each.measured for each in outcomes(both, (Aim("speed", "ratio", 1.0, is_compiled=True),))] == [3.0]
    assert [each.measured for each in outcomes(both, (Aim("speed", "ratio", 1.0, is_compiled=False),))] == [2.0]
    assert AimOutcome(Aim("x", "ratio", 0.3, is_minimum=False), "x", 0.3).is_reached
    assert read_number("direct: 152,273.5 /s; bare: +0.30 ms") == 152_273.5
    assert read_number("+0.30 ms") == 0.3
    assert read_number("none") is None


def test_a_page_shows_figures_and_names_what_is_missing() -> None:
    measured = section("rows", "", has_rows=True)
    listed = [
        measured,
        section("words", "")._replace(headlines="all .*"),
        section("broken", "")._replace(headlines=".*", shortfalls=".*"),
        section("late", ""),
        section("later", ""),
        section("empty", "", has_rows=True),
    ]
    results = {
        "rows": result("rows", rows=ROWS),
        "words": result("words", text=f"all well  \nwritten: {ROOT}/build/x.svg\n"),
        "broken": result("broken", status=2),
        "late": result("late", status=-15),
        "empty": result("empty"),
    }
    text = page(listed, results, {"words": "images/words.svg"})
    assert "## In short\n\n- [About words](#about-words): all well.\n" in text
    assert "| forwarding, 50 connections | 4,560 /s |" in text
    short, _, reached = text.partition("## What reached its aim")
    assert "| forwarding, 50 connections | ≥ 1 | 0.71 |" in short
    assert (
        "| own CPU of a request, 16 branches, 10 rounds of 64 tokens: controller in the process | ≤ 15 | 13 |"
        in reached
    )
    assert "What it is. It took 60 seconds." in text
    assert "```text\nall well\nwritten: build/x.svg\n```\n\n![about words](images/words.svg)" in text
    assert "- About broken: failed, exit status 2 (`make broken`)" in text
    assert "- About late: failed, ended by SIGTERM (`make late`)" in text
    assert "- About later: not measured (`make later`)" in text
    assert "- About empty: needs the public recordings" in text
    assert "## About broken" not in text


def test_a_live_figure_outside_its_prediction_fell_short() -> None:
    (loop,) = (one for one in sections(10.0, with_peers=False) if one.name == "loop")
    printed = (
        "accuracy before: 87.5 live, predicted 61.0 to 84.0 (OUTSIDE).\n"
        "accuracy after: 72.5 live, predicted 55.9 to 78.5 (inside).\n"
    )
    short = page([loop], {"loop": result("loop", text=printed, rows=ROWS)}, {}).partition("## What fell short")[2]
    short = short.partition("\n## ")[0]
    assert "- [The loop of discovery](#the-loop-of-discovery): accuracy before: 87.5 live, predicted 61.0 to" in short
    assert "inside" not in short
    assert "not as predicted" not in page([loop], {"loop": result("loop", text="(inside)\n")}, {})


def test_a_quoted_figure_must_be_in_the_section(tmp_path: Path) -> None:
    sections_of_page = section_texts("# Report\n\n## Benchmark: edge\n\n| forwarding | 0.71 |\n\n## Other\n\n0.9\n")
    assert sections_of_page.keys() == {"benchmark-edge", "other"}
    document = tmp_path / "page.md"
    document.write_text(
        "It has 0.71 of\nthe speed ([report](report.md#benchmark-edge)). This 5 is not quoted.\n\n"
        "It has 0.9 ([report](report.md#benchmark-edge)). None ([report](report.md#gone))."
    )
    complaints = wrong_quotes(document, sections_of_page)
    assert len(complaints) == 2
    assert "0.9 is not in #benchmark-edge" in complaints[0]
    assert "no section #gone" in complaints[1]
    assert quotes_of("no link: 7") == []
    items = quotes_of(
        "- 0.71 ([report](report.md#benchmark-edge)).\n- This 5 is not quoted.\n- 6 ([report](report.md#other))"
    )
    assert [(quote.section, quote.figures) for quote in items] == [("benchmark-edge", ["0.71"]), ("other", ["6"])]


@pytest.mark.skipif(not REPORT.exists(), reason="the report has not been written; `make report` writes it")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_manual_quotes_figures_of_the_report(document: Path) -> None:
    assert wrong_quotes(document, section_texts(REPORT.read_text("utf-8"))) == []


@pytest.mark.skipif(not REPORT.exists(), reason="the report has not been written; `make report` writes it")
def test_the_multiples_of_what_a_beta_costs_are_those_of_the_report() -> None:
    demo = section_texts(REPORT.read_text("utf-8"))["accuracy-over-tokens-on-the-embedded-model"]
    tokens = {cells[1].strip(): float(cells[3].replace(",", "")) for cells in rows_of(demo, "│") if len(cells) > 4}
    page = (ROOT / "docs" / "beta.md").read_text("utf-8").partition("| tokens at |")[2]
    shown = {cells[1].strip(): cells[2].strip() for cells in rows_of(page, "|") if cells[1].startswith(" β = ")}
    table = dict(list(shown.items())[:4])
    assert table == {beta: f"{tokens[beta] / tokens['single sample']:.1f} ×" for beta in table}
    plain = [round(tokens[beta] / tokens["single sample"]) for beta in ("β = 0.25", "β = 0.5", "β = 1")]
    said = "about {}, {} and {} times as many".format(*plain)
    assert said in " ".join((ROOT / "README.md").read_text("utf-8").split())


def rows_of(text: str, bar: str) -> list[list[str]]:
    """Return the cells of each line that begins with a bar."""
    return [line.split(bar) for line in text.splitlines() if line.startswith(bar)]


def test_a_table_of_figures_needs_a_command_or_a_quote() -> None:
    table = "| a | 1.5 ms | **+2** |\n| b | 3 % | -1 (0 to 2) |\n"
    assert tables_without_source(f"# Page\n\n## Bare\n\n{table}\n## Next\n\n```sh\nmake x\n```\n") == ["## Bare"]
    assert tables_without_source(f"## Printed\n\n```sh\nmake x\n```\n\n{table}") == []
    assert tables_without_source(f"## Simulated\n\n`python -m tests.simulate` prints\n\n{table}") == []
    assert tables_without_source(f"## Quoted ([report](report.md#benchmark-own))\n\n{table}") == []
    assert tables_without_source("## Words\n\n| a | 1 |\n| b | 3.2 is enough |\n") == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_table_of_figures_has_a_command_that_prints_it(document: Path) -> None:
    if document.name not in {*OF_DEFINITIONS, REPORT.name}:
        assert tables_without_source(document.read_text("utf-8")) == []
