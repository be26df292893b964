r"""Units and currencies: `5\text{ cm}`, `5 centimetres`; `\$5`, `5 dollars`."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Final

_NAMES: Final = {
    "°": "deg degs degree degrees",
    "%": "percent pct percentage",
    "dollar": "dollars usd $ buck bucks",
    "cent": "cents ¢",
    "euro": "euros eur €",
    "pound": "pounds gbp £ lb lbs",
    "yen": "¥ jpy",
    "rupee": "rupees ₹ inr rs",
    "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetre millimetres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "g": "gram grams",
    "kg": "kilogram kilograms kilo kilos",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "l": "liter liters litre litres",
    "ml": "milliliter milliliters millilitre millilitres",
    "mi/h": "mph",
    "km/h": "kph kmh",
    "rad": "radian radians",
    "": "unit units",
}
_KNOWN: Final = MappingProxyType(
    {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split()) if name}
)
_LEADING = re.compile(r"(?P<sign>[€£¥₹]|(?:US)?\\?\$)\s*(?P<body>[-+]?[\d.(\\].*)", re.DOTALL)
_FUNCTION = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ORDINAL = re.compile(r"(?P<body>.*[0-9)}])\s*\^?\s*\{?\s*(?:st|nd|rd|th)\s*\}?", re.DOTALL)
_SIGN = re.compile(r"(?P<body>.*?[^\s\\])\s*(?P<sign>\\?%|\^\s*\{?\s*\\circ\s*\}?|\\?\$|[€£¥₹¢])", re.DOTALL)
_WORD = r"(?:[a-zA-Z]{2,}|(?<=\s)[a-zA-Z])"
_WORDS = re.compile(
    rf"(?P<body>.*?[\d)}}\]!])(?P<gap>\s*)(?P<unit>{_WORD}(?:[\s/-]+(?:per\s+)?[a-zA-Z]+){{0,3}})"
    r"(?P<power>\s*\^\s*\{?\s*[23]\s*\}?|\s+squared|\s+cubed|)",
    re.DOTALL,
)
_MODULUS = re.compile(
    r"(?P<body>.*?\S)\s*(?:\\pmod|\(\s*\\?b?mod|\\bmod|\\mod|\bmod)\s*\{?\s*(?P<modulus>\w+)\s*\}?\s*\)?"
)
_POWERS: Final = MappingProxyType({"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"})
_NO_UNITS: Final = frozenset(
    ["or", "and", "if", "when", "mod", "is", "are", "to", "than", "plus", "minus", "times", "over"]
)


def split_unit(text: str) -> tuple[str, str]:
    """What `text` says without its unit, and the unit in one spelling; empty if it has none."""
    if (match := _LEADING.fullmatch(text)) is not None:
        body, unit = split_unit(match["body"])
        return body, unit or _KNOWN.get(match["sign"].lstrip("\\US"), "dollar")
    if (match := _SIGN.fullmatch(text)) is not None:
        sign = match["sign"]
        if "circ" not in sign:
            return match["body"], _KNOWN[sign.lstrip("\\")]
        return (text, "") if _FUNCTION.search(text) else (match["body"], "°")
    if (match := _ORDINAL.fullmatch(text)) is not None:
        return match["body"], "th"
    if text[-1:].isalnum() or text[-1:] in "})":
        if (match := _MODULUS.fullmatch(text)) is not None and any(char.isdigit() for char in match["body"]):
            return match["body"], f"mod {match['modulus']}"
        worded = _WORDS.fullmatch(text)
        if worded is not None and (named := _named(worded)) is not None:
            return worded["body"], named
    return text, ""


def _named(match: re.Match[str]) -> str | None:
    words = match["unit"].split()
    if any(word.casefold() in _NO_UNITS for word in words):
        return None
    power = "".join(char for char in match["power"] if char in "23")
    power = f"^{power}" if power else {"squared": "^2", "cubed": "^3"}.get(match["power"].strip(), "")
    if words[0].casefold().rstrip(".") in _POWERS and len(words) == 2:
        power = _POWERS[words.pop(0).casefold()]
    if len(words[0]) == 1 and words[0] not in _KNOWN:
        return None
    parts = [part for part in re.split(r"\s*/\s*|\s+per\s+", " ".join(words)) if part]
    if not match["gap"] and any(part.casefold() not in _KNOWN for part in parts):
        return None  # 5abc is a product, not 5 of something
    spelled = "/".join(_singular(part.casefold()) for part in parts)
    return spelled + power if spelled else ""


def _singular(word: str) -> str:
    known = _KNOWN.get(word)
    if known is not None:
        return known
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
