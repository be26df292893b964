r"""Answer extraction: find the final answer of a text, with its canonical form."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Iterator
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any, Final, NamedTuple

from discovery.answers.forms import CanonicalForm, FormType, canonical, choice
from discovery.answers.kinds import AUTO, AnswerKind, ExtractionMethod
from discovery.answers.stated_answers import VOTABLE_TYPES, YES_NO, last_stated_answer, stated_choice, stated_number

LONGEST_LONE: Final = 80
"""Maximum characters of a text that is read as a bare answer."""
MOST_BARE: Final = 16
"""Maximum boxes without braces that are read, from the end of the text."""
LONGEST_READ: Final = 100_000
"""Characters at the end of a text that are searched for a box, a stated answer, a choice or a number."""
MOST_TRIED: Final = 1024
"""Maximum openings at the end of a text that are tried as JSON, if those at its beginning take too long."""
MOST_SCANNED: Final = 1_000_000
"""Maximum cost, in characters, of searching for JSON from the beginning of a text, and again from its end."""
ATTEMPT: Final = 16
"""Cost of an attempt to parse JSON, in characters, besides those that it reads."""
DEEPEST_JSON: Final = 64
"""Maximum nesting of JSON; deeper values are not answers."""
LONGEST_MATCHED: Final = 32_768
"""Characters at the end of a text in which a client's pattern is matched."""
MOST_MATCHES: Final = 10_000
"""Maximum matches of a client's pattern; a text with more has no answer."""
PATTERN_S: Final = 0.5
"""Default limit in CPU seconds for matching a client's pattern; a text that takes longer has no answer."""


class Answer(NamedTuple):
    """An extracted answer. `written` is the part of the text it was read from."""

    written: str
    form: CanonicalForm


_BOX = r"\\(?:boxed|fbox|Box|box)\s{0,9}\{"
_BRACE = re.compile(rf"{_BOX}|\\[{{}}]|[{{}}]")
_BARE = re.compile(
    r"\\(?:boxed|fbox)(?:\s{0,9}(?=[-+−\d.$])|\s{1,9}(?=[A-Ja-z]\b)|(?=\\[a-zA-Z]))([^\n]{1,80}?)(?=[.,;:!?]?(?:[\s$]|\\[)\]]|$))"
)
r"""A box without braces: `\boxed 5`, `\boxed5`."""
_AFTER_BARE = re.compile(r"[.,;:!?$*\s]{0,9}(?:\\[)\]])?[.,;:!?$*\s]{0,9}(?:$|[A-Za-z(])")
_SIGNS = r"(?:[\s$.,;*]|\\[()\[\]]){0,9}"
_JOINT = re.compile(rf"\}}{_SIGNS}(?:(?:\\text\{{)?\s{{0,9}}(?:and|or)\s{{0,9}}\}}?)?{_SIGNS}{_BOX}")
_LONE_CHOICE = re.compile(r"\W{0,20}([A-Ja-j])\W{0,20}")
_LED_CHOICE = re.compile(r"[\s*_]*\(?([A-J])[).:*]+(?:\s.*)?")
_DIGITS = r"[-+−]?(?:\\?[$€£¥])?[-+−]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_CONNECTED = (
    r"(?:\s?(?:[-+*/×÷^:√xX·−–]|\\times|\\cdot|\*\*)\s?|\s(?:to|or)\s|\s(?:hours?|hrs?|minutes?|mins?|days?|weeks?|years?|"
    r"feet|foot|ft|pounds?|lbs?|dollars?)(?:\sand)?\s|\s)"
)
_NUMBER = re.compile(
    rf"(?<![\w.,/^√])(?:√\s?)?{_DIGITS}(?:{_CONNECTED}{{1,3}}{_DIGITS})*(?:\s?(?:\\?%|°)|\s(?:hundred|thousand|million|billion|trillion|dozen)\b)?"
    r"(?![\w/^√!])"
)
"""Numbers that belong together, such as `4 4/9` or `5 to 10`: one answer or none."""
_LONE = re.compile(
    r"[\s*_`]*(?:(?:the )?answer:)?[\s*_`]*(?P<inner>\S.*?)[\s*_`]*\.?[\s*_`]*", re.DOTALL | re.IGNORECASE
)
_OPENING = re.compile(r"\{(?=[ \t\n\r]*[\"}])|\[(?=[ \t\n\r]*(?:[\"\[\]{\d-]|true|false|null))")
"""A bracket that may open JSON; `x_{n}` and `[see]` do not."""
_FENCES: Final = ("```", "~~~")


def read_answer(text: str, kind: AnswerKind = AUTO, *, seconds: float = PATTERN_S) -> Answer | None:
    """Return the final answer of `text`; None if there is none that can be read. Never raises.

    Run time is linear in the text, and most kinds search only its last `LONGEST_READ` characters. A client's pattern
    may take up to `seconds` of CPU time, so match it off the event loop.
    """
    match kind.method:
        case ExtractionMethod.AUTO:
            return _auto(text[-LONGEST_READ:])
        case ExtractionMethod.BOXED:
            return _boxed(text[-LONGEST_READ:])
        case ExtractionMethod.CHOICE:
            return _choice(text[-LONGEST_READ:])
        case ExtractionMethod.NUMBER:
            return _number(text[-LONGEST_READ:])
        case ExtractionMethod.JSON:
            return _json(text)
        case ExtractionMethod.REGEX:
            return _pattern(text, kind, seconds)
        case ExtractionMethod.CODE | ExtractionMethod.TEXT:
            return _compared(text, kind)
        case ExtractionMethod.TOOLS | ExtractionMethod.SELECT | ExtractionMethod.SYNTHESISE:
            return None


def canonical_answer(text: str, kind: AnswerKind = AUTO) -> str | None:
    """Return the canonical form of the final answer of `text`; None if there is none that can be read."""
    answer = read_answer(text, kind)
    return None if answer is None else answer.form.text


def boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{…}` of `text`, with balanced braces; None if there is none."""
    span = _last_box(text)
    return None if span is None else text[slice(*span)]


def _last_box(text: str) -> tuple[int, int] | None:
    """Return begin and end of the content of the last complete box."""
    boxes = _boxes(text)
    return max(boxes) if boxes else None


def _boxes(text: str) -> list[tuple[int, int]]:
    opened: list[int] = []  # start of the content of each open brace; -1 for braces that are not boxes
    boxes: list[tuple[int, int]] = []
    for token in _BRACE.finditer(text):
        sign = token[0]
        if sign == "}":
            begin = opened.pop() if opened else -1
            if begin >= 0:
                boxes.append((begin, token.start()))
        elif sign == "{":
            opened.append(-1)
        elif len(sign) > 2:
            opened.append(token.end())
    for match in deque(_BARE.finditer(text), maxlen=MOST_BARE):
        if _AFTER_BARE.match(text, match.end(1)) and canonical(match[1]) is not None:
            boxes.append(match.span(1))
    return boxes


def _boxed(text: str) -> Answer | None:
    """Read the last box, together with the boxes before it that are separated only by commas or "and"."""
    boxes = sorted(_boxes(text))
    if not boxes:
        return None
    begin, end = boxes[-1]
    first, parts = begin, [text[begin:end]]
    for earlier, close in reversed(boxes[:-1]):
        joint = _JOINT.match(text, close)
        if joint is None or joint.end() != first:
            break
        first = earlier
        parts.append(text[earlier:close])
    form = canonical(", ".join(reversed(parts))) if first != begin else None
    if form is not None:
        return Answer(text[text.rindex("\\", 0, first) : end + 1], form)
    return _answer(parts[0])


def _auto(text: str) -> Answer | None:
    if "box" in text or "Box" in text:
        boxed_answer = _boxed(text)
        if boxed_answer is not None or _last_box(text) is not None:
            return boxed_answer
    if (last := last_stated_answer(text)) is not None:
        return Answer(last.written, last.form)
    return _lone(text)


def _lone(text: str) -> Answer | None:
    """Read a text that consists only of an answer."""
    if len(text) > LONGEST_LONE or (match := _LONE.fullmatch(text)) is None:
        return None
    answer = _answer(match["inner"])
    if answer is None:
        return None
    form = answer.form
    if form.type is FormType.WORDS:
        return answer if form.text in YES_NO else None
    is_formula = form.type in (FormType.NUMBER, FormType.CHOICE) or match["inner"].startswith(("$", "\\"))
    return answer if is_formula and form.type in VOTABLE_TYPES else None


def _choice(text: str) -> Answer | None:
    inner = boxed(text)
    for part in (text,) if inner is None else (inner, text):
        lone = _LONE_CHOICE.fullmatch(part)
        if lone is not None:
            return Answer(lone[1], choice(lone[1].upper()))
        form = canonical(part)
        if form is not None and form.type is FormType.CHOICE:
            return Answer(form.text, form)
    stated = stated_choice(text)
    led = _LED_CHOICE.fullmatch(text.strip().rpartition("\n")[2]) if stated is None else None
    letter = stated.written if stated is not None else led[1] if led is not None else None
    return None if letter is None else Answer(letter, choice(letter))


def _number(text: str) -> Answer | None:
    inner = boxed(text)
    if inner is not None and (answer := _quantity(inner)) is not None:
        return answer
    for part in (text,) if inner is None else (inner, text):
        last, is_unread = stated_number(part)
        if last is not None:
            return Answer(last.written, last.form)
        if is_unread:
            return None
        for match in deque(_NUMBER.finditer(part), maxlen=1):
            if (answer := _quantity(match[0])) is not None:
                return answer
    return None


def _quantity(written: str) -> Answer | None:
    answer = _answer(written)
    return answer if answer is not None and answer.form.type is FormType.NUMBER else None


class _JSONAttempt(NamedTuple):
    """Result of parsing JSON at one position of a text. `answer` is None if there is none."""

    answer: Answer | None
    end: int  # of the value; the position after the opening if there is none
    cost: int  # in characters


def _json(text: str) -> Answer | None:
    """Read the last object or array that is not inside another one.

    Openings are tried in order, because what a value contains is skipped then. If the text makes that too slow, the
    rest of it is tried from the end, where the largest value around the last one is searched within the same bounds.
    """
    answer: Answer | None = None
    at = failed = 0
    while (match := _OPENING.search(text, at)) is not None:
        attempt = _parse_json(text, match.start())
        at = attempt.end
        if attempt.answer is not None:
            answer = attempt.answer
            continue
        failed += attempt.cost
        if failed > MOST_SCANNED:
            return _last_json(text, at) or answer
    return answer


def _last_json(text: str, begin: int) -> Answer | None:
    """Return the last value after `begin`, or the largest one found around it."""
    answer: Answer | None = None
    last = scanned = 0  # `last` is where the answer ends
    for match in reversed(deque(_OPENING.finditer(text, begin), maxlen=MOST_TRIED)):
        attempt = _parse_json(text, match.start())
        if attempt.answer is not None and attempt.end > last:
            answer, last = attempt.answer, attempt.end
        scanned += attempt.cost
        if scanned > MOST_SCANNED:
            break
    return answer


def _parse_json(text: str, begin: int) -> _JSONAttempt:
    try:
        value, end = _DECODER.raw_decode(text, begin)
        spelled = "".join(_normalized_json(value))
    except json.JSONDecodeError as error:
        # the error counts the lines before it, about 64 characters in the time of parsing one
        return _JSONAttempt(None, begin + 1, error.pos - begin + error.pos // 64 + ATTEMPT)
    except (ValueError, ArithmeticError, RecursionError):  # the position of the failure is unknown
        return _JSONAttempt(None, begin + 1, len(text) - begin + ATTEMPT)
    answer = Answer(text[begin:end], CanonicalForm(spelled, FormType.OTHER))
    return _JSONAttempt(answer, end, end - begin + ATTEMPT)


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse)


def _normalized_json(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield normalized JSON: keys sorted, numbers normalized. Raises ValueError if it is nested too deeply."""
    if depth > DEEPEST_JSON:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        yield "{"
        for position, key in enumerate(sorted(value)):
            yield f"{',' if position else ''}{json.dumps(key)}:"
            yield from _normalized_json(value[key], depth + 1)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for position, element in enumerate(value):
            yield "," if position else ""
            yield from _normalized_json(element, depth + 1)
        yield "]"
    elif isinstance(value, Decimal):
        yield _plain(value)
    else:
        yield json.dumps(value)


def _plain(number: Decimal) -> str:
    """Return a number without trailing zeros. No digit is lost, however many there are."""
    if not number:
        return "0"
    digits = len(number.as_tuple().digits)
    return str(number.normalize(Context(prec=digits, Emin=MIN_EMIN, Emax=MAX_EMAX)))


def _pattern(text: str, kind: AnswerKind, seconds: float) -> Answer | None:
    """Return the last match of a client's pattern, or of its first group. Each match is linear in the text."""
    last = None
    until = time.thread_time() + seconds
    matches = kind.pattern.finditer(text, max(0, len(text) - LONGEST_MATCHED))
    for number, last in enumerate(matches):  # noqa: B007 - only the last match is wanted
        if number == MOST_MATCHES or time.thread_time() > until:
            return None
    if last is None:
        return None
    written = last.group(1 if kind.pattern.groups else 0)
    if not written:
        return None
    form = canonical(written)
    return Answer(
        written, form if form is not None and form.type is FormType.NUMBER else CanonicalForm(written, FormType.OTHER)
    )


def _compared(text: str, kind: AnswerKind) -> Answer | None:
    written = _last_block(text) if kind.method is ExtractionMethod.CODE else text
    spelled = kind.comparator(written)
    return None if spelled is None else Answer(written, CanonicalForm(spelled, FormType.OTHER))


def _last_block(text: str) -> str:
    """Return the content of the last complete fenced block; all of `text` if there is none."""
    content: str | None = None
    block: list[str] | None = None
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith(_FENCES):
            if block is not None:
                content = "".join(block)
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
    return text if content is None else content


def _answer(written: str) -> Answer | None:
    form = canonical(written)
    return None if form is None else Answer(written.strip(), form)
