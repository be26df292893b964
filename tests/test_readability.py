"""The project follows the rules of `tests/readability.py`, and that script finds every kind of violation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import readability

# The docstrings and names in this text are examples of what the rules reject.
UNREADABLE_MODULE = '''
"""What a module holds."""

LIMIT = 1
"""Those that count."""


class Plan:
    """Of a request."""

    words: str

    def run(self, one: int) -> int:
        """Run it."""
        found = [one for one in range(3)]
        return len(found)
'''


@pytest.mark.parametrize("rule", readability.RULES)
def test_no_file_breaks_a_rule_of_style(rule: str) -> None:
    assert readability.RULES[rule]() == []


@pytest.fixture
def unreadable_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose files break every rule."""
    folder = tmp_path / "proxy"
    folder.mkdir()
    for number in range(readability.MAX_MODULES + 1):
        (folder / f"m{number}.py").write_text(UNREADABLE_MODULE if number < 2 else "")
    (folder / "long.py").write_text("x = 1\n" * (readability.MAX_LINES + 1))
    (tmp_path / "README.md").write_text("line\n" * (readability.MAX_README_LINES + 1))
    monkeypatch.setattr(readability, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("unreadable_project")
def test_every_violation_is_listed_with_its_place() -> None:
    assert readability.crowded_folders() == ["proxy: 17 modules"]
    assert readability.repeated_classes() == ["proxy/m0.py:8, proxy/m1.py:8: class Plan"]
    assert [line.partition(": ")[0] for line in readability.riddles()] == [
        f"proxy/m{number}.py:{line}" for number in (0, 1) for line in (2, 5, 9)
    ]
    assert readability.long_files() == ["proxy/long.py: 401 lines"]
    assert readability.long_readme() == ["README.md: 151 lines"]
    assert readability.vague_names() == [
        f"proxy/m{number}.py:{line}" for number in (0, 1) for line in ("13: parameter one", "15: found")
    ]
