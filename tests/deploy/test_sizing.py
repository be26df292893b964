"""The figures of docs/deploy.md follow from its formulas."""

from __future__ import annotations

import json
import re

from tests.readability import ROOT

PAGE = (ROOT / "docs/deploy.md").read_text()
WORDS = " ".join(PAGE.split())
"""The page without its line breaks."""
ROWS = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)


def test_the_bytes_of_a_token_follow_from_the_formula() -> None:
    assert len(ROWS) == 2
    for name, *figures in ROWS:
        layers, heads, size, width, token = map(int, figures)
        assert token == 2 * layers * heads * size * width, name


def test_the_embedded_model_has_the_stated_shape() -> None:
    config = json.loads((ROOT / "deploy/embedded/model/config.json").read_text())
    shape = [config[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    assert [int(figure) for figure in ROWS[0][1:4]] == shape
    assert (config["dtype"], ROWS[0][4]) == ("float32", "4")


def test_the_worked_example_is_computed_correctly() -> None:
    (found,) = re.findall(r"\((\d+) \+ (\d+) · (\d+)\) · (\d+) bytes = ([\d.]+) GiB", WORDS)
    prompt, width, depth, token = map(int, found[:4])
    assert token == int(ROWS[1][5])
    assert found[4] == f"{(prompt + width * depth) * token / 2**30:.1f}"
