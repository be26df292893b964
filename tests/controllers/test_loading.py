"""Loading controllers from files and names: what is accepted, and the error for what is not."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from controllers import BetaError, Limits, State, Stop, UnknownController, run_episode, run_sync
from controllers.builtin import BUILT_IN
from controllers.errors import BadController
from controllers.loading import LARGEST, Spec, make, parse_spec
from tests.fakes import ScriptedEnvironment, chain

GOOD = """
from __future__ import annotations
from dataclasses import dataclass
from controllers import State, advance, answer, branch, TO_END

@dataclass
class Mine:
    beta: float

    def decide(self, state: State) -> list:
        return [answer(state.leader())] if state.width else [branch(TO_END)]
"""


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_gives_a_spec_named_after_it_with_a_digest_of_its_source(tmp_path: Path) -> None:
    spec = parse_spec(write(tmp_path, GOOD))
    assert (spec.name, spec.is_foreign, spec.chains) == ("mine", True, 0)
    made = make(spec, 0.5)
    assert type(made).__name__ == "Mine"
    assert spec.digest != Spec("mine", GOOD + "#").digest


def test_a_name_must_be_that_of_a_known_controller() -> None:
    assert parse_spec("asc@12") == Spec("asc@12")
    assert (Spec("asc@12").chains, Spec("cmc").chains, Spec("cmc").is_foreign) == (12, 0, False)
    with pytest.raises(UnknownController, match="there is no controller 'nobody'"):
        parse_spec("nobody")
    with pytest.raises(BetaError):
        make(Spec("cmc"), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("import nowhere", "line 1: import nowhere: a controller may import controllers, math"),
        ("x = 1", "one class with a decide method, not none"),
        (GOOD + GOOD.replace("Mine", "Other").replace("from __future__ import annotations", ""), "not Mine, Other"),
        (b"\xff\xfe", "codec can't decode"),
        ("#" * (LARGEST + 1), "larger than 65536 bytes"),
    ],
)
def test_a_file_without_a_valid_controller_is_refused_with_the_reason(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(BadController, match=message):
        parse_spec(write(tmp_path, text))


def test_parsing_a_file_does_not_run_it(tmp_path: Path) -> None:
    spec = parse_spec(write(tmp_path, GOOD + "raise SystemExit(3)"))
    with pytest.raises(BadController, match="SystemExit: 3"):
        _ = spec.factory


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere", "ModuleNotFoundError"),
        ("x = 1", "one class with a decide method, not none"),
        (GOOD + GOOD.replace("Mine", "Other").replace("from __future__ import annotations", ""), "not Mine, Other"),
    ],
)
def test_unchecked_source_without_a_controller_fails_when_it_is_loaded(text: str, message: str) -> None:
    with pytest.raises(BadController, match=message):
        _ = Spec("mine", text).factory


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadController, match="No such file"):
        parse_spec(str(tmp_path / "none.py"))


def test_a_constructor_that_raises_becomes_a_bad_controller_error(tmp_path: Path) -> None:
    failing = GOOD.replace(
        "    beta: float\n", "    beta: float\n\n    def __post_init__(self):\n        raise SystemExit\n"
    )
    spec = parse_spec(write(tmp_path, failing))
    with pytest.raises(BadController, match="mine: its constructor raised SystemExit"):
        make(spec, 0)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")
@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (fifo, "not a regular file; name a file that contains a controller"),
        (device, "not a regular file; name a file that contains a controller"),
        (folder, "Is a directory"),
        (link_to_itself, "Too many levels of symbolic links"),
        (listening, "No such device or address"),
    ],
)
def test_a_path_that_is_not_a_regular_file_is_refused_without_blocking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_it: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make_it(Path("mine.py"))
    with pytest.raises(BadController, match=f"mine.py: {message}"):
        parse_spec("mine.py")


@pytest.mark.parametrize("text", [b"x = 1\0", b"\0" * 100, b"\xed\xa0\x80", b"\xef\xbb\xbf\0"])
def test_a_file_that_is_not_valid_text_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(BadController, match=r"mine\.py"):
        parse_spec(write(tmp_path, text))


def test_a_file_replaced_while_it_is_read_keeps_its_first_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing the path after it was opened does not change the source that is read."""
    path = Path(write(tmp_path, GOOD))
    other = tmp_path / "other"
    other.write_text("secret")
    opened = os.open

    def open_and_replace(name: str, flags: int) -> int:
        descriptor = opened(name, flags)
        path.unlink()
        path.symlink_to(other)
        return descriptor

    monkeypatch.setattr("controllers.loading.os.open", open_and_replace)
    assert parse_spec(str(path)).source == GOOD


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        (GOOD, False),
        (GOOD.replace("TO_END\n", "TO_END, probe\n", 1), True),
        (GOOD.replace("TO_END\n", "TO_END, probe as ask\n", 1), True),
        (GOOD + "import controllers\nask = controllers.probe\n", True),
        (GOOD + "from controllers import *\n", True),
        ("def f(:", True),
    ],
)
def test_a_file_that_refers_to_probes_needs_them(source: str, needs: bool) -> None:
    assert Spec("mine", source).needs_probes is needs


def test_built_in_controllers_that_probe_declare_it() -> None:
    """Each is run where branches cannot be probed: those that do not declare probes never ask for one."""
    assert {name for name in BUILT_IN if Spec(name).needs_probes} == {
        "answer_consistency",
        "cmc",
        "mars",
        "parallel_probe",
    }
    assert Spec("mars@8").needs_probes


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not Spec(name).needs_probes])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_controller_without_declared_probes_plays_where_there_are_none(name: str, beta: float) -> None:
    chains = [chain("7" if i % 3 else "8", 40 + 7 * (i % 9), mark=chr(97 + i % 26)) for i in range(64)]
    state = State(Limits(10, has_probes=False))
    run_sync(run_episode(make(Spec(name), beta), ScriptedEnvironment(chains, 10), state))
    assert state.stop is Stop.ANSWERED
    assert state.answer is not None
