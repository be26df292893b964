"""Files in the folder of a search: none that somebody else wrote is replaced."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from discovery.errors import FileWriteError, HistoryError
from discovery.search.explorers import Candidate
from discovery.search.explorers.transcript import Transcript
from discovery.search.history import History
from discovery.search.output_files import check_new_run, check_resumed_run, controller_file, winner_file
from discovery.search.prompt import HEADING

SETTINGS: dict[str, Any] = {"explorer": "grammar", "seed": 3, "cells": ["m b search"]}
WINNER, OTHER = (Candidate("a b", f"# {number}\n", "grammar") for number in range(2))
TRIED = (OTHER, WINNER)


def write_card(path: Path, candidate: Candidate, **settings: object) -> None:
    """Write the card of a candidate in a run with these settings."""
    card = {"digest": candidate.digest, "settings": {**SETTINGS, **settings}}
    path.write_text(json.dumps(card))


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History.begin(tmp_path / "history.jsonl", SETTINGS)


@pytest.mark.parametrize("name", ["context.md", "folder"])
def test_a_new_run_replaces_no_file_or_folder(tmp_path: Path, name: str) -> None:
    context, folder = tmp_path / "context.md", tmp_path / "folder"
    context.touch()
    folder.mkdir()
    check_new_run(tmp_path / "history.jsonl", (context, folder, tmp_path / "none"))
    (context if name == "context.md" else folder / "file").write_text("mine")
    with pytest.raises(FileWriteError, match=rf"{name}: this search did not write it; move it away, or name another"):
        check_new_run(tmp_path / "history.jsonl", (context, folder))


def test_a_new_run_does_not_replace_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "context.md").symlink_to(tmp_path / "none")
    with pytest.raises(FileWriteError, match=r"context\.md"):
        check_new_run(tmp_path / "history.jsonl", (tmp_path / "context.md",))


def test_a_recorded_run_is_named_rather_than_its_files(history: History) -> None:
    (history.path.parent / "context.md").write_text(HEADING)
    with pytest.raises(HistoryError, match="continue it with --resume"):
        check_new_run(history.path, (history.path.parent / "context.md",))


def test_a_resumed_run_replaces_the_context_of_a_search_only(tmp_path: Path) -> None:
    context = tmp_path / "context.md"
    check_resumed_run(context)
    for text in ("", f"{HEADING}\nA controller decides"):
        context.write_text(text)
        check_resumed_run(context)
    for content in (b"# The languages", b"\xff"):
        context.write_bytes(content)
        with pytest.raises(FileWriteError, match=r"context.md: this search did not write it; move it away"):
            check_resumed_run(context)


def test_a_controller_is_named_like_its_candidate_and_replaces_one_of_the_same_run(history: History) -> None:
    folder = history.path.parent
    expected = folder / "a-b.py"
    assert controller_file(folder, history, WINNER, TRIED) == expected
    expected.write_text(WINNER.source)  # stopped before the card was written
    assert controller_file(folder, history, WINNER, TRIED) == expected
    for source in (OTHER.source, WINNER.source):  # the second was stopped between both files
        expected.write_text(source)
        write_card(folder / "a-b.json", OTHER)
        assert controller_file(folder, history, WINNER, TRIED) == expected


@pytest.mark.parametrize("case", ["source", "card", "edited", "settings", "unknown"])
def test_a_controller_does_not_replace_files_of_others(
    history: History, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = history.path.parent
    file, card = folder / "a-b.py", folder / "a-b.json"
    if case == "source":
        file.write_text("mine")
    elif case == "card":
        card.write_text("{}")
    elif case == "edited":
        file.write_text("# edited\n")
        write_card(card, OTHER)
    elif case == "settings":
        file.write_text(OTHER.source)
        write_card(card, OTHER, seed=4)
    else:
        write_card(card, Candidate("a b", "# 2\n", "grammar"))
    expected = folder / f"a-b-{WINNER.digest[:12]}.py"
    with caplog.at_level(logging.WARNING):
        assert controller_file(folder, history, WINNER, TRIED) == expected
    assert f"the controller is written to {expected} instead" in caplog.text
    expected.write_text("mine, too")
    with pytest.raises(FileWriteError, match="this search did not write them; move them away, then continue with"):
        controller_file(folder, history, WINNER, TRIED)


def test_a_line_that_no_search_wrote_is_not_removed_as_a_torn_one(tmp_path: Path) -> None:
    notes = tmp_path / "notes.jsonl"
    notes.write_text("mine")
    with pytest.raises(HistoryError, match="its last line is not a recorded exchange; move the file away"):
        Transcript(notes)
    with pytest.raises(HistoryError, match="not the record of a run; move it away, or name another folder"):
        History.resume(notes, SETTINGS)
    assert notes.read_text() == "mine"
    notes.write_text('{"ki')
    assert History.resume(notes, SETTINGS).bodies("begun") == [SETTINGS]


def test_the_winner_is_the_file_that_the_run_chose_last(history: History, tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="has not chosen a winner"):
        winner_file(history.path)
    for stem, candidate in (("a", OTHER), ("b", WINNER)):
        (tmp_path / f"{stem}.py").write_text(candidate.source)
        write_card(tmp_path / f"{stem}.json", candidate)
        history.append("chosen", {"digest": candidate.digest})
        assert winner_file(history.path) == tmp_path / f"{stem}.py"
    (tmp_path / "b.json").unlink()
    with pytest.raises(HistoryError, match="the winner's file or card is missing"):
        winner_file(history.path)
