r"""Normalization of LaTeX and Unicode: remove spacing, sizes and fonts, and write every symbol in one way."""

from __future__ import annotations

import re
import unicodedata
from types import MappingProxyType
from typing import Final

_SIGNS: Final = MappingProxyType(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "∙": r"\cdot ",
        "∗": "*", "÷": "/", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
        "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ",
        "º": r"^\circ ", "√": r"\sqrt ", "⟨": r"\langle ", "⟩": r"\rangle ", "∅": r"\emptyset ", "θ": r"\theta ",
        "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "µ": r"\mu ", "μ": r"\mu ",
        "′": "'", "‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": r"\,", "\u2009": r"\,", "\u200b": "",
        "\ufeff": "", "…": "...", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
        "ℂ": r"\mathbb{C}",
    }
)  # fmt: skip
_COMMANDS: Final = MappingProxyType(
    {
        "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "leq": r"\le", "geq": r"\ge", "leqslant": r"\le",
        "geqslant": r"\ge", "lt": "<", "gt": ">", "neq": r"\ne", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[",
        "rbrack": "]", "lparen": "(", "rparen": ")", "colon": ":", "degree": r"^\circ", "textdegree": r"^\circ",
        "varnothing": r"\emptyset", "N": r"\mathbb{N}", "Z": r"\mathbb{Z}", "Q": r"\mathbb{Q}", "R": r"\mathbb{R}",
        "C": r"\mathbb{C}", "ldots": "...", "cdots": "...", "dots": "...", "euro": "€", "pounds": "£",
        "textdollar": r"\$",
        "simeq": r"\approx", "dotsc": "...", "lor": " or ", "land": " and ", "vee": " or ", "wedge": " and ",
        "mid": "|",
        "quad": " ", "qquad": " ", "displaystyle": "", "textstyle": "", "limits": "", "left": "", "right": "",
        "big": "",
        "Big": "", "bigg": "", "Bigg": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "biggl": "", "biggr": "",
        "middle": "", "hfill": "", "bf": "", "rm": "", "it": "", "tt": "", "sf": "", "nonumber": "",
    }
)  # fmt: skip
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_NAMED = re.compile(r"\\([a-zA-Z]+)\s*(\.(?=\s*$)|)")
_SPACING = re.compile(r"(?<!\\)\\[;:! \n]|\\[hv]space\*?\{[^{}]*\}|(?<!\\)~")
_THIN = re.compile(r"(?<=\d)(?:,?\\[,! ]|\{,\}|\\,\{\})\s*(?=\d{3}(?!\d))")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}")
_COMBINATIONS = re.compile(
    r"(?:\{\s*\}\s*|(?<![\w)}\]]))\^\s*(?:\{\s*(\d+)\s*\}|(\d))\s*C_\s*(?:\{\s*(\d+)\s*\}|(\d))(?!\d)"
)
_UNEQUAL = re.compile(r"(?<=\s)!=|\\not\s*=")
_MICRO = re.compile(r"(?<=\d)\s*[µμ](?=[gms](?![a-zA-Z]))")
_MICRO_NAMED = re.compile(r"(?<=\d)(?:\s|\\[,; ])*\\mu\s*\\(?:text|mathrm)\s*\{\s*([gms])\s*\}")
_TIMES_TEN = re.compile(r"(?<=[0-9.}])\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_TO_THE = re.compile(r"(?<=[0-9a-zA-Z)}])\*\*(?=[0-9({-])")
_REPEATING = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?: \d{3})+(?![\d/])")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT = re.compile(r"√\s*(\d+)")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_WORDS = re.compile(r"\\(?:text\w*|mbox|hbox|mathrm|mathsf|mathtt|operatorname\*?|emph)\s*\{([^{}]*)\}")
_FONT = re.compile(
    r"\\(?:mathbf|mathit|mathcal|boldsymbol|bm|pmb|boxed|fbox|ensuremath|underline|underbrace|color\{\w+\}|mathop|text\w*)"
    r"\s*(?=\{)"
)
_WHOLE_GROUP = re.compile(r"\{([^{}]*)\}")
_BRACE = re.compile(r"\\.|[{}()\[\]]", re.DOTALL)


def normalize_latex(text: str) -> str:
    """Return `text` with one notation for every symbol and without formatting commands."""
    if not text.isascii():
        text = _from_unicode(text)
    text = _joined(text)
    text = _THIN.sub("", text)
    text = _COMBINATIONS.sub(r"\\binom{\1\2}{\3\4}", text)
    if "\\" in text or "~" in text:
        text = _MICRO_NAMED.sub(r" u\1", text)
        text = _SPACING.sub(" ", text).replace("\\,", " ")
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
        text = _REPEATING.sub(_repeating, text)
        text = _WORDS.sub(r" \1 ", text)
        text = _FONT.sub("", text)
        text = _joined(_NAMED.sub(_named, text))
    text = _TIMES_TEN.sub(r"\\times ", _UNEQUAL.sub(r"\\ne ", text))
    text = _TO_THE.sub("^", text)
    text = _GROUPED.sub(lambda match: match[0].replace(" ", ""), text)
    text = _unquoted(_undollared(text.strip()).strip("`*").strip())
    while text.endswith((".", ";", ",")) and not text.endswith("..."):
        text = text[:-1].rstrip()
    if (group := _WHOLE_GROUP.fullmatch(text)) is not None:
        text = group[1].strip()
    return text


def _joined(text: str) -> str:
    """Collapse runs of white space into one space, because long runs make patterns slow."""
    return " ".join(text.split())


def balanced(text: str) -> bool:
    """Return whether braces and brackets are balanced. Intervals may close with the other bracket: `[0, 1)`."""
    curly = round_ = 0
    for match in _BRACE.finditer(text):
        sign = match[0]
        curly += (sign == "{") - (sign == "}")
        round_ += (sign in "([") - (sign in ")]")
        if curly < 0 or round_ < 0:
            return False
    return curly == round_ == 0


def split_top_level(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split `text` at every match of `separator` outside brackets."""
    parts: list[str] = []
    begin = depth = at = 0
    while at < len(text):
        char = text[at]
        match = separator.match(text, at) if depth == 0 else None
        if match is not None and match.end() > at:
            parts.append(text[begin:at])
            begin = at = match.end()
        elif char == "\\" and at + 1 < len(text) and not text[at + 1].isalpha():
            depth += (text[at + 1] == "{") - (text[at + 1] == "}")
            at += 2
        elif char == "\\":
            depth += text.startswith("\\langle", at) - text.startswith("\\rangle", at)
            at += 1
        else:
            depth += (char in "([{") - (char in ")]}")
            at += 1
    return [*parts, text[begin:]]


def _from_unicode(text: str) -> str:
    text = _MICRO.sub(" u", text)
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    text = _VULGAR.sub(lambda match: _vulgar(match[0]), text)
    text = _RAISED.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0]).replace('−', '-')}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = _SIGN.sub(lambda match: _SIGNS[match[0]], text)
    text = _SIGN.sub(lambda match: _SIGNS[match[0]], unicodedata.normalize("NFKC", text))
    return "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in text)


def _vulgar(sign: str) -> str:
    over, _, under = unicodedata.normalize("NFKC", sign).partition("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


def _repeating(match: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction."""
    digits, period = match[1] + match[2], match[3] or match[4]
    over = int(digits + period) - int(digits or "0")
    return rf"\frac{{{over}}}{{{'9' * len(period)}{'0' * len(match[2])}}}"


def _named(match: re.Match[str]) -> str:
    name = match[1]
    known = _COMMANDS.get(name)
    if known is None:
        return match[0]
    return known + (" " if known[-1:].isalpha() else "")


def _unquoted(text: str) -> str:
    """Remove the quotes around `text`. A quote only at its end means a prime, feet or inches."""
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text


def _undollared(text: str) -> str:
    """Remove the delimiters of a formula, such as dollars. A single dollar is a currency sign."""
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            if text.endswith("\\$"):
                break
            return text[len(opening) : -len(closing)].strip()
    if text.endswith("$") and not text.endswith("\\$") and "$" not in text[:-1]:
        return text[:-1].rstrip()
    return text
