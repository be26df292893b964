r"""Answers stated in prose: `The answer is 5.`, `#### 5`, `12 + 15 = 27`.

A stated answer is read to the end of its clause, and as a whole or not at all: `The answer is 4 4/9.` is never read
as 4.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from discovery.answers.forms import canonical
from discovery.answers.types import CanonicalForm, FormType

MOST_STATED: Final = 8
"""Maximum statements of each kind that are tried, from the end of the text."""
LONGEST_LINE: Final = 600
"""Maximum characters of the last line that are searched for a conclusion."""
SHORT: Final = 3
"""Maximum words of a clause that may be an answer without a digit."""
YES_NO: Final = ("yes", "no", "true", "false")
VOTABLE_TYPES: Final = (FormType.NUMBER, FormType.EXPRESSION, FormType.COLLECTION, FormType.CHOICE)
"""Types of answers that count as votes wherever they are found. Words are not among them, because they may be prose."""

_IS = r"(?:\sis(?:\sequal\sto)?|\sare|\swould\sbe|\sequals|:|=|→)"
_LEAD = (
    rf"(?i:\b(?:answer|option|choice|result|solution)(?:\s(?:choice|option))?(?:\s{{0,9}}[*_]{{0,3}}{_IS}){{1,2}}"
    r"[\s*_:]{0,9}(?:(?:therefore|thus|option|choice|approximately)\s)?[*_]{0,3})"
)
_LEADS = re.compile(rf"{_LEAD}|<answer>\s{{0,9}}|^[ \t]{{0,9}}[*_]{{0,3}}A(?:ns)?:[*_\s]{{1,9}}", re.MULTILINE)
_CHOICE = re.compile(
    rf"{_LEAD}[(\[]?([A-J])(?![A-Za-z0-9'])(?!\s+[a-z])(?![)\]*.:,]{{0,3}}\s{{0,3}}(?:or|and|&|/)\s{{0,3}}\(?[A-J]\b)"
)
_WORD = re.compile(rf"{_LEAD}(?i:(yes|no|true|false))\b")
_HASHES = re.compile(r"(?m)^####\s?(\S[^\n]{0,80})$")
_CLAUSE = re.compile(
    r"[^\n]{1,300}?(?=</answer>|(?<!\.)\.(?:[\s\"'*)\]$_]|$)|!(?:\s+[A-Z]|[\"'*_]|$)|;(?!\s*[-\d])|\n|$)", re.MULTILINE
)
_FOLLOWED = re.compile(
    r",\s+(?!or\b|and\b)(?=[a-z])|\s+(?:because|since|as|so|which|where|for|"
    r"(?:and\s)?not|rather\sthan|instead\sof)(?![a-zA-Z])|\s+\((?!or\b|and\b)|\s+[—–]\s|\s+-\s(?=[a-zA-Z]{3})"
)
"""Pattern of the text that may follow an answer in its clause."""
_TRAILING = re.compile(r"\s(?:in\stotal|in\sall|altogether|total|left|remaining|overall)\s*$")
_MARKUP = re.compile(r"\\[()\[\]]|(?<![0-9a-zA-Z)}])[*_`]{2,3}(?=\S)|(?<=\S)[*_`]{2,3}(?![0-9a-zA-Z(])|^[*_`]|[*_`]$")
"""Markdown around an answer or a part of it; `2**5` is a power."""
_NUMERAL = re.compile(r"[\d¼-¾⅐-⅞]")
_SHOWN = re.compile(r"[\d¼-¾⅐-⅞$\\√π]")
_OPERATION = re.compile(
    r"[\d)}%]\s{0,3}(?:[a-z]{1,20}\s{0,3}){0,3}[-+*/×÷^·−]|\d\s?[xX]\s?\d|\\(?:times|cdot|div|frac)(?![a-zA-Z])"
)
_OPERATED = re.compile(
    r"[\d\s.,+\-*/×÷^·−()$€£%{}]|\\(?:times|cdot|div|d?frac|left|right|sqrt|text)(?![a-zA-Z])|(?<=\d)[xX](?=\d)|"
    r"(?<=\d\s)[xX](?=\s\d)|(?<![^\s({])[A-Za-z][a-z]{1,20}(?![a-z])"
)
"""Parts of a calculation, units included. Beside other text an equals sign may be code."""
_CONCLUDED = re.compile(
    r"(?:^|[\s,;])(?i:so|thus|therefore|hence|then|gives|get|have)[,:]?\s{1,3}\$?(?:\\\()?[a-zA-Z]\s?=\s?(?P<value>[^\n=]{1,40})$"
)
_COUNTED = re.compile(
    r"\b(?i:sum|product|difference|quotient|total|remainder|average|mean)\b[^\n.=]{0,80}?\s(?:is|equals|is\sequal\sto)\s"
    r"(?P<value>[^\n=]{1,60})$|\d[^\n=]{0,80}\s(?:equals|is\sequal\sto)\s(?P<equal>[^\n=]{1,60})$"
)


class StatedAnswer(NamedTuple):
    """A stated answer and its position."""

    begin: int
    written: str
    form: CanonicalForm


def last_stated_answer(text: str) -> StatedAnswer | None:
    """Return the last answer that `text` states, in any form; None if it cannot be read as a whole."""
    led, is_unread = _introduced(text)
    candidates = [
        last for last in (led, _last(_CHOICE, text), _last(_WORD, text), _last(_HASHES, text)) if last is not None
    ]
    if candidates:
        return max(candidates, key=lambda answer: answer.begin)
    return None if is_unread else _concluded(text)


def stated_number(text: str) -> tuple[StatedAnswer | None, bool]:
    """Return the last number that `text` states, and whether its last statement is something other than a number."""
    led, is_unread = _introduced(text)
    candidates = [
        last for last in (led, _last(_HASHES, text)) if last is not None and last.form.type is FormType.NUMBER
    ]
    is_other = led is not None and led.form.type is not FormType.NUMBER
    return max(candidates, key=lambda answer: answer.begin, default=None), is_unread or is_other


def stated_choice(text: str) -> StatedAnswer | None:
    """Return the last choice letter that `text` states."""
    return _last(_CHOICE, text)


def _introduced(text: str) -> tuple[StatedAnswer | None, bool]:
    """Return the answer after the last introduction such as "the answer is", and whether that text was unreadable."""
    leads = deque(_LEADS.finditer(text), maxlen=MOST_STATED)
    for lead in reversed(leads):
        clause = _CLAUSE.match(text, lead.end())
        if clause is None:
            continue
        answer = _read_clause(clause[0], lead.end())
        if answer is not None or _NUMERAL.search(clause[0]) or len(clause[0].split()) <= SHORT:
            return answer, answer is None
    return None, False


def _read_clause(clause: str, begin: int) -> StatedAnswer | None:
    """Read a clause as an answer, if necessary without the words that may follow one."""
    for candidate in _candidates(clause):
        if not _SHOWN.search(candidate):
            continue
        form = canonical(without_markup(candidate))
        if form is not None and form.type in VOTABLE_TYPES:
            return StatedAnswer(begin, candidate.strip("*_` "), form)
    return None


def _candidates(clause: str) -> Iterator[str]:
    written = clause.strip()
    yield written
    cut = _FOLLOWED.search(written)
    if cut is not None and cut.start() > 0:
        yield written[: cut.start()]


def without_markup(clause: str) -> str:
    """Return a clause without markup and without formula delimiters."""
    plain = _TRAILING.sub("", _MARKUP.sub("", clause))
    dollars = plain.replace("\\$", "").count("$")
    return re.sub(r"(?<!\\)\$", " ", plain).strip() if dollars > 1 else plain.strip()


def _concluded(text: str) -> StatedAnswer | None:
    """Return the number a text ends with: `12 + 15 = 27`, `so x = 5`, `the sum of 12 and 15 is 27`."""
    ended = text.rstrip(" \n.!*_`$")
    line = ended[max(ended.rfind("\n") + 1, len(ended) - LONGEST_LINE) :]
    begin = len(ended) - len(line)
    left, equals, value = line.rpartition("=")
    if equals:
        operated = re.split(r"[=:;]|[.,]\s", left)[-1]
        if not _OPERATION.search(operated) or _OPERATED.sub("", operated):
            match = _CONCLUDED.search(line)
            if match is None:
                return None
    else:
        match = _COUNTED.search(line)
        if match is None:
            return None
        value = match["value"] or match["equal"]
    answer = _read_clause(value, begin + len(line) - len(value))
    return answer if answer is not None and answer.form.type is FormType.NUMBER else None


def _last(pattern: re.Pattern[str], text: str) -> StatedAnswer | None:
    """Return the last match of a pattern, if it can be read as an answer."""
    for match in deque(pattern.finditer(text), maxlen=1):
        form = canonical(match[1])
        if form is not None and (form.type in VOTABLE_TYPES or form.text in YES_NO):
            return StatedAnswer(match.start(1), match[1].strip(), form)
    return None
