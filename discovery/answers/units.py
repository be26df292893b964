r"""Units and currencies: `5\text{ cm}`, `5 centimetres`; `\$5`, `5 dollars`."""

from __future__ import annotations

import contextlib
import re
from types import MappingProxyType
from typing import Final

from discovery.answers.algebra import NotAnExpression, TooHard, normalize_expression

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
    "um": "micrometer micrometers micrometre micrometres micron microns",
    "mm": "millimeter millimeters millimetre millimetres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "ug": "microgram micrograms",
    "g": "gram grams",
    "kg": "kilogram kilograms kilo kilos",
    "us": "microsecond microseconds",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "l": "liter liters litre litres",
    "ml": "milliliter milliliters millilitre millilitres",
    "mi/h": "mph",
    "km/h": "kph kmh",
    "rad": "radian radians",
    "N": "newton newtons",
    "V": "volt volts",
    "J": "joule joules",
    "kJ": "kilojoule kilojoules",
    "W": "watt watts",
    "kW": "kilowatt kilowatts",
    "Hz": "hertz",
    "kHz": "kilohertz",
    "MHz": "megahertz",
    "Pa": "pascal pascals",
    "kPa": "kilopascal kilopascals",
    "K": "kelvin kelvins",
    "mol": "mole moles mols",
    "Ω": "ohm ohms",
    "°C": "celsius centigrade",
    "°F": "fahrenheit",
    "": "unit units",
}
_KNOWN: Final = MappingProxyType(
    {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split()) if name}
)
_SCALES: Final = MappingProxyType(
    {
        **{"hundred": "100", "thousand": "10^3", "million": "10^6", "billion": "10^9", "trillion": "10^{12}"},
        **{"lakh": "10^5", "crore": "10^7", "dozen": "12", "mn": "10^6", "mil": "10^6", "mln": "10^6", "bn": "10^9"},
    }
)
_PARTS: Final = MappingProxyType(
    {
        **{"half": "1/2", "halve": "1/2", "third": "1/3", "fourth": "1/4", "fifth": "1/5", "sixth": "1/6"},
        **{"seventh": "1/7", "eighth": "1/8", "ninth": "1/9", "tenth": "1/10", "hundredth": "1/100"},
        "thousandth": "1/1000",
    }
)
_SCALED = re.compile(r"(?P<body>.*?[\d)}\]!])\s*(?P<scale>[a-zA-Z]{2,})\b\s*(?P<rest>.*)", re.DOTALL)
_LEADING = re.compile(r"(?P<sign>[€£¥₹]|(?:US)?\\?\$)\s*(?P<body>[-+]?[\d.(\\].*)", re.DOTALL)
_FUNCTION = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ORDINAL = re.compile(r"(?P<body>.*[0-9)}])\s*\^?\s*\{?\s*(?:st|nd|rd|th)\s*\}?", re.DOTALL)
_SIGN = re.compile(
    r"(?P<body>.*?[^\s\\])\s*(?P<sign>\\?%|\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF])?|\\?\$|[€£¥₹¢])", re.DOTALL
)
_WORD = r"(?:[a-zA-Z]{2,}|(?<=\s)[a-zA-Z])"
_WORDS = re.compile(
    rf"(?P<body>.*?[\d)}}\]!])(?P<gap>\s*)(?P<unit>{_WORD}(?:[\s/-]+(?:per\s+)?[a-zA-Z]+){{0,3}})"
    r"(?P<power>\s*\^\s*\{?\s*[23]\s*\}?|\s+squared|\s+cubed|)",
    re.DOTALL,
)
_MODULUS = re.compile(
    r"(?P<body>.*?\S)\s*(?P<sign>\\pmod|\(\s*\\?b?mod(?:ulo)?|\\bmod|\\mod|\bmod(?:ulo)?)(?![a-zA-Z])"
    r"\s*\{?\s*(?P<modulus>\w+)\s*\}?\s*\)?",
    re.IGNORECASE,
)
_INTEGER = re.compile(r"-?[0-9]+")
_DEGREES = re.compile(r"deg(?:ree)?s?\s+(?=(?:celsius|centigrade|fahrenheit)$)", re.IGNORECASE)
_POWERS: Final = MappingProxyType({"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"})
_NO_UNITS: Final = frozenset(
    [
        *("or", "and", "if", "when", "mod", "is", "are", "to", "than", "plus", "minus", "times", "over", "squared"),
        *("cubed", "factorial", "choose", "through", "divided", "multiplied", "by", "base", "not", "out"),
        *("modulo", "div", "rem", "remainder", "gcd", "gcf", "hcf", "lcm", "xor", "nand", "nor", "max", "floor"),
        *("ceil", "abs", "pow", "exp", "log", "ln", "lg", "sin", "cos", "tan", "cot", "sec", "csc", "sqrt", "cbrt"),
        *("permute", "raised", "added", "subtracted", "equals", "equal", "vs", "versus", "into", "upon", "twice"),
        *("thrice", "without", "except"),
    ]
)
_CASED = re.compile(r"[Mm](?:W|Wh|J|V|A|Ah|eV|Pa|N|T|S|C|F|H|K|Hz|g|m|s|mol|b|bps)|[KGTP]b(?:ps)?")
"""Symbols of units that only capitals tell apart, such as `meV` and `MeV`. Words in one case are compared without case,
as others are: `MW` equals `mw`, but neither equals `mW`.
"""
_OPERAND = re.compile(r"(?<!/)(?<!per)\s+[ijknpqrtxyz](?![a-zA-Z])")
"""A variable after a word: `5 pick k` is an operation, not a quantity with a unit."""


def split_unit(text: str) -> tuple[str, str]:
    """Split `text` into the part without its unit, and the normalized unit; the unit is empty if there is none."""
    if (match := _LEADING.fullmatch(text)) is not None:
        body, unit = split_unit(match["body"])
        return body, unit or _KNOWN.get(match["sign"].lstrip("\\US"), "dollar")
    if (match := _SIGN.fullmatch(text)) is not None:
        sign = match["sign"]
        if "circ" not in sign:
            return match["body"], _KNOWN[sign.lstrip("\\")]
        unit = f"°{sign[-1]}" if sign[-1] in "CF" else "°"
        return (text, "") if _FUNCTION.search(text) else (match["body"], unit)
    if (match := _SCALED.fullmatch(text)) is not None and (scaled := _scaled(match)) is not None:
        return scaled
    if (match := _ORDINAL.fullmatch(text)) is not None:
        return match["body"], "th"
    if text[-1:].isalnum() or text[-1:] in "})":
        if (match := _MODULUS.fullmatch(text)) is not None and (residue := _residue(match)) is not None:
            return residue
        worded = _WORDS.fullmatch(text)
        if worded is not None and (named := _named(worded)) is not None:
            return worded["body"], named
    return text, ""


def _residue(match: re.Match[str]) -> tuple[str, str] | None:
    r"""Return the least residue and its modulus: `12 mod 5` is 2, with the unit `mod 5`.

    A residue class that is not an integer's, `k \pmod 5`, keeps its body. An operation of unknown value, `12 mod n`,
    gives None.
    """
    modulus, value = match["modulus"], None
    if not any(char.isdigit() for char in match["body"]):
        return None
    if _INTEGER.fullmatch(modulus):
        modulus = modulus.lstrip("0")
        with contextlib.suppress(NotAnExpression, TooHard):
            value = normalize_expression(match["body"]).text
        if modulus and value is not None and _INTEGER.fullmatch(value):
            return str(int(value) % int(modulus)), f"mod {modulus}"
    is_class = match["sign"].startswith("(") or match["sign"].casefold() == "\\pmod"
    return (match["body"], f"mod {modulus}") if is_class and modulus else None


def _scaled(match: re.Match[str]) -> tuple[str, str] | None:
    """Read number words: `15 million dollars` is 15·10^6 dollars, `2 thirds` is 2/3. None if the word is not one."""
    word, rest = match["scale"].casefold(), match["rest"].strip()
    singular = word.removesuffix("s")
    part = _PARTS.get(singular) if word != singular or match["body"] == "1" else None
    if part is not None and (not rest or rest.startswith("of ")):
        return f"({match['body']})({part})", ""
    scale = _SCALES.get(singular)
    if scale is None:
        return None
    body = f"({match['body']})({scale})"
    if not rest:
        return body, ""
    more = f"1 {rest.removeprefix('of ')}"
    factor, unit = split_unit(more)
    return None if factor == more else (f"{body}({factor})", unit)


def _named(match: re.Match[str]) -> str | None:
    unit_words = match["unit"].split()
    if any(word.casefold() in _NO_UNITS for word in unit_words) or _OPERAND.search(match["unit"]):
        return None
    power = "".join(char for char in match["power"] if char in "23")
    power = f"^{power}" if power else {"squared": "^2", "cubed": "^3"}.get(match["power"].strip(), "")
    if unit_words[0].casefold().rstrip(".") in _POWERS and len(unit_words) == 2:
        power = _POWERS[unit_words.pop(0).casefold()]
    if len(unit_words[0]) == 1 and unit_words[0] not in _KNOWN:
        return None
    parts = [part for part in re.split(r"\s*/\s*|\s+per\s+", " ".join(unit_words)) if part]
    parts = [_DEGREES.sub("", part) for part in parts]
    if not match["gap"] and any(not _is_known(part) or (len(part) == 1 and part.isupper()) for part in parts):
        return None  # 5abc is a product, not a quantity with a unit
    spelled = "/".join(_singular(part) for part in parts)
    return spelled + power if spelled else ""


def _is_known(word: str) -> bool:
    return word in _KNOWN or (len(word) > 1 and word.casefold() in _KNOWN)


def _singular(word: str) -> str:
    if word not in _KNOWN and not word.isupper() and not word.islower() and _CASED.fullmatch(word):
        return word
    if _is_known(word):
        return _KNOWN.get(word) or _KNOWN[word.casefold()]
    word = word.casefold()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
