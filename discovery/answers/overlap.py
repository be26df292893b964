"""Word overlap: how similar texts are by the words that they share, and which text is most similar to the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from typing import Final

MAX_WORDS: Final = 20_000
"""Maximum number of words of a text that are compared."""
MAX_COMPARED: Final = 4_000_000
"""Maximum number of words that are compared in all pairs of texts."""

_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""A word; in Chinese and Japanese, which have no spaces, a character."""


def word_counts(text: str, most: int = MAX_WORDS) -> Mapping[str, int]:
    """Return how often each of the first `most` words occurs in a text, ignoring case and punctuation."""
    return Counter(match[0].casefold() for match in islice(_WORD.finditer(text), most))


def word_overlap(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Return the F1 score of two multisets of words: twice the words they share, over all their words.

    Two texts without words overlap completely.
    """
    total = sum(first.values()) + sum(second.values())
    if len(first) > len(second):
        first, second = second, first
    shared = sum(min(count, second.get(word, 0)) for word, count in first.items())
    return 2 * shared / total if total else 1.0


def medoid(texts: Sequence[str]) -> int:
    """Return the index of the text with the largest mean overlap with the others; of equals, the first.

    There must be a text. The more texts, the fewer words of each are read, so that the time is bounded.
    """
    pairs = len(texts) * (len(texts) - 1) // 2
    counts = [word_counts(text, min(MAX_WORDS, MAX_COMPARED // max(1, pairs))) for text in texts]
    sums = [0.0] * len(counts)
    for i, j in combinations(range(len(counts)), 2):
        overlap = word_overlap(counts[i], counts[j])
        sums[i] += overlap
        sums[j] += overlap
    return sums.index(max(sums))
