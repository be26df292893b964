"""The compiled core: it is used only if it fits the sources, and it behaves like the sources."""

from __future__ import annotations

import ast
import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controllers import Advanced, Branch, Limits, Probed, State, advance, branch, probe
from controllers.core import compiled
from controllers.core.compiled import MANIFEST, MODULES, PURE, ROOT, SUFFIX, USED, find_extensions, source_path

SUITES = (
    *("test_state.py", "test_state_machine.py", "test_episode.py", "test_baselines.py", "test_signals.py"),
    *("../contract", "../discovery/evaluation/test_replay.py", "../discovery/evaluation/test_replay_signals.py"),
    *("../discovery/evaluation/test_traced_rounds.py", "test_repeated_facts.py"),
)
"""Tests of `tests/controllers` that run with the compiled core as well. `.ci/run` runs more of them with it."""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources that compiled modules are made of."""
    for module in (*MODULES, *USED):
        target = source_path(module, tmp_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source_path(module), target)
    return tmp_path


@pytest.fixture
def extensions(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an extension module, which is empty, that fits these sources."""
    monkeypatch.delenv(PURE, raising=False)
    folder = sources / "extensions"
    folder.mkdir()
    (folder / f"controllers.state{SUFFIX}").touch()
    compiled.write_manifest(folder, ["controllers.state"], sources)
    return folder


def test_modules_are_used_that_were_compiled_from_the_present_sources(extensions: Path, sources: Path) -> None:
    assert find_extensions(extensions, sources) == {"controllers.state": extensions / f"controllers.state{SUFFIX}"}


@pytest.mark.parametrize("module", [*MODULES, *USED])
def test_a_change_of_any_source_turns_the_compiled_core_off(extensions: Path, sources: Path, module: str) -> None:
    with source_path(module, sources).open("a") as source:
        source.write("\n")
    assert "have changed" in str(find_extensions(extensions, sources))


def test_without_all_files_the_sources_are_interpreted(
    extensions: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PURE, "1")
    assert find_extensions(extensions, sources) == f"{PURE} is set"
    monkeypatch.delenv(PURE)
    (extensions / f"controllers.state{SUFFIX}").unlink()
    assert "is missing" in str(find_extensions(extensions, sources))
    source_path("controllers.state", sources).unlink()
    assert "a source is missing" in str(find_extensions(extensions, sources))
    (extensions / MANIFEST).write_text("")
    assert "cannot be read" in str(find_extensions(extensions, sources))
    (extensions / MANIFEST).unlink()
    assert "make compile" in str(find_extensions(extensions, sources))


def test_every_module_that_compiled_ones_import_counts_for_the_digest() -> None:
    """Compiled code contains constants of the modules that it imports."""
    imported = {
        node.module
        for module in MODULES
        for node in ast.walk(ast.parse(source_path(module).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None
    }
    ours = {module for module in imported if module.startswith(("controllers.", "discovery."))}
    assert ours - {*MODULES, *USED} == set()


def test_states_facts_and_actions_can_be_copied_and_pickled() -> None:
    state = State(Limits(10))
    actions = [branch(), branch(2)]
    state.check(actions)
    state.apply(actions, [Advanced(0, 1, 10, False), Advanced(1, 1, 4, True, 0, 900, 800)])
    for again in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert (again.spent, again.votes, again.active, again.last) == (14, {0: 1}, (0,), state.last)
        assert repr(again.branches) == repr(state.branches)
        again.check([advance(0), probe(0)])
    assert repr(pickle.loads(pickle.dumps(Branch()))) == repr(Branch())
    for value in (*actions, Advanced(1, 1, 4, True, 0, 900, 800), Probed(0, 1, 20, 500)):
        assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(value)


@pytest.fixture(scope="module")
def compiled_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the checkout with a compiled core."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("there is no C compiler")
    tree = tmp_path_factory.mktemp("compiled") / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.db*", "extensions")
    shutil.copytree(ROOT, tree, ignore=ignored)
    if (ROOT.parent / "shared").exists():
        (tree.parent / "shared").symlink_to(ROOT.parent / "shared")
    _run(tree, "setup.py", "--quiet", "compile_core")
    yield tree
    shutil.rmtree(tree)


def _run(tree: Path, *command: str) -> str:
    """Run Python in the tree and return its output; fail with it if the command fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", PURE))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=environment | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


REPORT = """
import controllers.state, discovery.evaluation.replay
from controllers import Action, Branch, Limits, State, Stop, advance
from controllers.core.compiled import CORE
from controllers.sandbox.spawner import spawner
print(CORE, controllers.state.__file__.rpartition(".")[2], discovery.evaluation.replay.__file__.rpartition(".")[2])
try:
    State(Limits(1)).check([advance(0)])
except Exception as error:
    at = error.__traceback__.tb_next
    print(error, at.tb_frame.f_code.co_filename.endswith("controllers/state.py"), at.tb_frame.f_code.co_name)
print(spawner().check().sealed)
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_the_compiled_core_passes_the_suites_of_controllers_and_of_replay(compiled_tree: Path) -> None:
    core, complaint, sealed = _run(compiled_tree, "-c", REPORT).splitlines()
    assert core == "compiled so so"
    assert complaint == "advance(): there is no branch 0; 0 are open True check"
    assert sealed == "True"
    suites = [f"tests/controllers/{suite}" for suite in SUITES]
    units = ("-m", "not (vllm or soak or process or slow)")
    assert " passed" in _run(compiled_tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *units, *suites)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_a_changed_source_is_interpreted_although_it_was_compiled(compiled_tree: Path) -> None:
    source = source_path("controllers.state", compiled_tree)
    before = source.read_text()
    try:
        source.write_text(before + "\nCHANGED = True\n")
        changed = (
            "from controllers import state\nfrom controllers.core.compiled import CORE\nprint(CORE, state.CHANGED)"
        )
        assert "the sources have changed" in _run(compiled_tree, "-c", changed)
    finally:
        source.write_text(before)
    assert _run(compiled_tree, "-c", "from controllers.core.compiled import CORE\nprint(CORE)") == "compiled\n"
