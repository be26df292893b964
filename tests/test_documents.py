"""Check the documents against the code: settings, metrics, links, files, commands and tables."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from typer.main import get_command

from controllers.builtin import ADMIN_ONLY, BUILT_IN
from controllers.loading import discovered
from controllers.state import Stop
from discovery.answers.kinds import ExtractionMethod
from discovery.search.explorers.catalogue import ExplorerName
from proxy.api.routes import ROUTES
from proxy.cli import app
from proxy.episode.plan import CONTEXT_EXCEEDED
from proxy.requests.generation_request import TtsOptions
from proxy.settings import EMBEDDED, SERVED, Settings
from tests.docs.generated import COMMAND, TABLES, in_page, main, registered, series_name, with_table
from tests.readability import PACKAGES, ROOT
from tests.report.quotes import anchor

MAX_README_COLUMNS = 120
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "deploy" / "embedded" / "README.md"],
)
SETTINGS = [line for line in (ROOT / "docs/settings.md").read_text().splitlines() if line.startswith("| `AUTOTTS_")]
FOLDERS = sorted(path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py"))


def text(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", TABLES)
def test_generated_tables_are_up_to_date(name: str) -> None:
    table = TABLES[name]
    assert in_page(text(table.page), name).splitlines() == table.make(), f"run {COMMAND}"


def test_writing_a_generated_table_changes_only_the_table() -> None:
    page = "before\n<!-- generated: x -->\n\nold\n\n<!-- end -->\nafter"
    assert with_table(page, "x", ["| new |"]) == page.replace("old", "| new |")
    with pytest.raises(LookupError, match="generated: y"):
        with_table(page, "y", [])


def test_checking_the_generated_tables_prints_nothing_when_they_are_up_to_date(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_every_package_folder_has_a_docstring(folder: Path) -> None:
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_the_manual_lists_every_setting_in_order() -> None:
    listed = [line.split("`")[1] for line in SETTINGS]
    assert listed == [f"AUTOTTS_{name.upper()}" for name in Settings.model_fields]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_defaults_in_the_manual_equal_those_of_the_settings(name: str) -> None:
    row = next(line for line in SETTINGS if line.startswith(f"| `AUTOTTS_{name.upper()}` |"))
    *_, cell, _ = row.split("|")
    written = re.findall(r"`([^`]*)`", cell)
    field = Settings.model_fields[name]
    default = SERVED.get(name, field.default)
    expected = [] if default is None else [default]
    expected += [EMBEDDED[name]] if name in EMBEDDED else []
    read = TypeAdapter[object](field.annotation or object).validate_python
    assert [read(value) for value in written] == [read(value) for value in expected], row


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_settings_and_metrics_named_in_documents_exist(document: Path) -> None:
    content = re.sub(r"<!-- generated.*?<!-- end -->", "", document.read_text(), flags=re.DOTALL)
    known = {f"AUTOTTS_{name.upper()}" for name in Settings.model_fields}
    known |= {"AUTOTTS_CONFIG", "AUTOTTS_EXPLORER_API_KEY", "AUTOTTS_PURE_PYTHON"}
    assert set(re.findall(r"\bAUTOTTS_[A-Z_]+\b", content)) - known == set()
    series = {series_name(metric) for metric in registered()}
    assert set(re.findall(r"`(autotts_[a-z_]+)", content)) - series == set()


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    headings = re.findall(r"^#+ +(.*)$", document.read_text(), re.MULTILINE)
    return set(map(anchor, headings))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_in_documents_have_existing_targets(document: Path) -> None:
    for link in re.findall(r"\]\(([^) ]+)\)", document.read_text()):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_files_named_in_documents_exist(document: Path) -> None:
    paths = re.findall(r"`((?:controllers|discovery|proxy|deploy|tests|docs)/[\w./-]*)`", document.read_text())
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []


def inline_code(document: Path) -> list[str]:
    """Return the code spans of a document's text, without its fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_commands_and_options_named_in_documents_exist(document: Path) -> None:
    for span in inline_code(document):
        program, *arguments = span.split()
        if program == "make" and arguments:
            assert arguments[0] in make_targets(), span
        if program == "autotts" and arguments:
            options = command_options(arguments)
            assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= options, span


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))


def test_contributing_names_every_make_target() -> None:
    assert (
        make_targets() - {span.split()[1] for span in inline_code(ROOT / "CONTRIBUTING.md") if span[:5] == "make "}
        == set()
    )


def command_options(arguments: list[str]) -> set[str]:
    """Return the options of the command that the arguments begin with. Raises KeyError if there is no such command."""
    command = get_command(app)
    options = {option for parameter in command.params for option in parameter.opts}
    for word in arguments:
        commands = getattr(command, "commands", None)
        if commands is None or word.startswith("-"):
            break
        command = commands[word.partition("|")[0]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {*options, "--help"}


def table_names(page: str) -> set[str]:
    """Return the names in the first cells of a page's tables."""
    cells = re.findall(r"^\| (`[^|]*) \|", text(page), re.MULTILINE)
    return {name.partition(":")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("page", ["README.md", "docs/beta.md"])
def test_tables_list_every_controller(page: str) -> None:
    names = {*BUILT_IN, *discovered()}
    assert names - table_names(page) == (ADMIN_ONLY if page == "README.md" else set())


def test_tables_list_every_explorer_and_answer_kind() -> None:
    assert {name.value for name in ExplorerName} - table_names("docs/discovery.md") == set()
    assert {method.value for method in ExtractionMethod} - table_names("docs/answers.md") == set()


def test_the_api_page_lists_every_request_option_and_stop_reason() -> None:
    assert {*TtsOptions.model_fields, *map(str, Stop)} - table_names("docs/api.md") == set()


def test_the_api_page_lists_every_route() -> None:
    endpoints = text("docs/api.md").partition("\n## Endpoints\n")[2].partition("\n### ")[0]
    listed = {span.rpartition(" ")[2].partition("?")[0] for span in re.findall(r"`([^`]+)`", endpoints)}
    paths = {route.path.replace("{model:path}", "NAME").replace("{request_id:path}", "ID") for route in ROUTES}
    assert paths - listed == {"/docs/{asset}"}


def error_codes() -> set[str]:
    """Return the `code` of every error that the proxy's source makes."""
    values = (
        value
        for path in (ROOT / "proxy").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for value in _values_of_code(node)
    )
    constants = (part for value in values for part in (value, *_branches(value)) if isinstance(part, ast.Constant))
    return {constant.value for constant in constants if isinstance(constant.value, str)}


def _values_of_code(node: ast.AST) -> list[ast.expr]:
    """Return the expressions that `node` passes as the argument `code`, or sets as the default code of a class."""
    if isinstance(node, ast.Call):
        return [keyword.value for keyword in node.keywords if keyword.arg == "code"]
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "default_code":
        return [node.value]
    return []


def _branches(value: ast.expr) -> list[ast.expr]:
    """Return the alternatives of a conditional expression."""
    return [value.body, value.orelse] if isinstance(value, ast.IfExp) else []


def test_the_api_page_lists_exactly_the_error_codes_of_the_proxy() -> None:
    codes = error_codes() | {CONTEXT_EXCEEDED}
    assert "bad_beta" in codes
    errors = text("docs/api.md").partition("\n## Errors\n")[2].partition("\n## ")[0]
    listed = {
        code for row in re.findall(r"^\| (`[^|]*) \|", errors, re.MULTILINE) for code in re.findall(r"`(\w+)`", row)
    }
    assert codes == listed


def test_no_line_of_the_readme_is_too_long() -> None:
    assert [line for line in text("README.md").splitlines() if len(line) > MAX_README_COLUMNS] == []


def test_the_readme_links_to_every_page_of_the_manual() -> None:
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - {"docs/index.md"}
    assert pages - set(re.findall(r"\]\(([^)#]+)", text("README.md"))) == set()


def test_the_top_level_holds_only_the_expected_files_and_folders() -> None:
    agreed = {"proxy", "discovery", "controllers", "tests", "deploy", "docs", "README.md", "pyproject.toml"}
    usual = {
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "constraints.txt",
        "setup.py",
    }
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and "egg-info" not in path.name}
    assert agreed <= shown
    made = {"build", "dist", "frontier.png", "autotts.db", "autotts.db-wal", "autotts.db-shm", "autotts.db.spill"}
    assert shown <= agreed | usual | made


def test_the_readme_does_not_repeat_the_version() -> None:
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    assert version not in text("README.md")
