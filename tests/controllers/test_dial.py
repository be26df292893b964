"""Parsing β from text: only plain decimals from 0 to 1 are accepted."""

from __future__ import annotations

import pytest

from controllers import BetaError
from controllers.dial import parse_beta


@pytest.mark.parametrize(("text", "beta"), [("0", 0.0), ("1", 1.0), ("1.0", 1.0), (".5", 0.5), ("0.", 0.0), ("001", 1)])
def test_a_plain_decimal_from_0_to_1_is_parsed(text: str, beta: float) -> None:
    assert parse_beta(text, "β") == beta


@pytest.mark.parametrize(
    "text", ["", "nan", "inf", "1.01", "-0", "+1", "1e-3", "1_0", " 1", "0,5", "٠", "½", "0x1", "9" * 99]
)
def test_anything_but_a_plain_decimal_from_0_to_1_is_refused(text: str) -> None:
    with pytest.raises(BetaError, match="--betas must be a decimal number from 0 to 1"):
        parse_beta(text, "--betas")
