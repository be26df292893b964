"""Code blocks and shell commands are parsed from Markdown pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import Block, fenced_blocks, shell_commands


def test_fenced_blocks_have_their_language_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```sh\none\ntwo\n```\n\n```\nplain\n```\n")
    assert list(fenced_blocks(page, tmp_path)) == [
        Block("page.md", 4, "sh", "one\ntwo\n"),
        Block("page.md", 9, "", "plain\n"),
    ]


@pytest.mark.parametrize(
    ("code", "commands"),
    [
        ("a b\n\nc\n", ["a b", "c"]),
        ("a  # why\n# a comment\nb '#1'  # two\n", ["a", "b '#1'"]),
        ("a \\\n  b\nc", ["a \\\n  b", "c"]),
        ("a '{\n  1}'\nc", ["a '{\n  1}'", "c"]),
        ("a > '#b'", ["a > '#b'"]),
    ],
)
def test_shell_commands_over_several_lines_stay_together(code: str, commands: list[str]) -> None:
    assert list(shell_commands(code)) == commands


def test_a_command_with_an_unclosed_quotation_raises_value_error() -> None:
    with pytest.raises(ValueError, match="has no end"):
        list(shell_commands("a 'b\nc\n"))
