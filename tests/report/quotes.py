"""Figures that README and the manual quote from the report, and tables of figures that commands print.

A sentence that links to `report.md#SECTION` quotes that section: each of its figures must be there. A table of figures
stands in a section that quotes the report or has the command that prints it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from tests.report.aims import NUMBER

_LINK: Final = re.compile(r"\]\((?:docs/)?report\.md#([a-z0-9-]+)\)")
_PARAGRAPH_END: Final = re.compile(r"\n\s*\n|\n(?=\s*- )")
"""An empty line, or the beginning of an item of a list."""
_SENTENCE_END: Final = re.compile(r"(?<=[.:!?])\s+(?=[A-Z`*(\[])")
_FIGURE: Final = re.compile(r"\**[+−-]?\d[\d,]*(?:\.\d+)?\**\s*(?:%|ms|s|±|\(|\[|×|at|$)")
"""The beginning of a cell that has a figure."""
_FIGURES: Final = 4
"""A table with as many figures is a table of figures."""
_CODE: Final = re.compile(r"```sh$.*?^```|`python -m tests\.[^`]*`", re.DOTALL | re.MULTILINE)
"""Commands that print figures."""
_HEADING: Final = re.compile(r"^## (.+)$", re.MULTILINE)


class Quote(NamedTuple):
    """A sentence that quotes a section of the report."""

    sentence: str
    section: str
    figures: list[str]


def quotes_of(text: str) -> list[Quote]:
    """Return the sentences of a page that link to a section of the report, with their figures."""
    quotes = []
    for paragraph in _PARAGRAPH_END.split(text):
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            for link in _LINK.finditer(sentence):
                words = re.sub(r"\]\([^)]*\)|`[^`]*`", " ", sentence)
                quotes.append(Quote(sentence, link[1], NUMBER.findall(words)))
    return quotes


def section_texts(page: str) -> dict[str, str]:
    """Return the text of each section of the report by the anchor of its heading."""
    starts = list(_HEADING.finditer(page))
    ends = [*(start.start() for start in starts[1:]), len(page)]
    return {anchor(start[1]): page[start.end() : end] for start, end in zip(starts, ends, strict=True)}


def tables_without_source(text: str) -> list[str]:
    """Return the headings of a page's sections that have a table of figures, but neither a command nor a quote."""
    unsourced = []
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        cells = [cell.strip() for line in section.splitlines() if line.startswith("|") for cell in line.split("|")]
        figures = sum(_FIGURE.match(cell) is not None for cell in cells)
        if figures >= _FIGURES and not _CODE.search(section) and not _LINK.search(section):
            unsourced.append(section.partition("\n")[0])
    return unsourced


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def wrong_quotes(document: Path, sections: dict[str, str]) -> list[str]:
    """Return a sentence for each quote of a document whose section or figure is not in the report."""
    complaints = []
    for quote in quotes_of(document.read_text("utf-8")):
        if quote.section not in sections:
            complaints.append(f"{document.name}: the report has no section #{quote.section}: {quote.sentence}")
            continue
        present = set(NUMBER.findall(sections[quote.section]))
        complaints += [
            f"{document.name}: {figure} is not in #{quote.section} of the report: {quote.sentence}"
            for figure in quote.figures
            if figure not in present
        ]
    return complaints
