"""Tables of the documentation that are generated from the code.

`python -m tests.docs.generated` lists the tables that are out of date; `--write` brings them up to date.

A table stands in its page between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from prometheus_client.metrics import MetricWrapperBase

from controllers import Advanced, Limits, State, Verb
from controllers.builtin import create
from proxy.settings import EMBEDDED, PREFIX, SERVED, Settings
from proxy.telemetry.metrics import Metrics
from tests.readability import PACKAGES, ROOT

RULES: Final = ROOT / "deploy" / "prometheus" / "rules.yml"
COMMAND: Final = "python -m tests.docs.generated --write"


class Table(NamedTuple):
    """A generated table and the page it stands in."""

    page: str  # relative to the project
    make: Callable[[], list[str]]


def settings() -> list[str]:
    """Return the table of all settings, in the order of the settings object."""
    rows = [
        (f"`{PREFIX}{name.upper()}`", field.description or "", _default(name))
        for name, field in Settings.model_fields.items()
    ]
    return _table(("variable", "meaning", "default"), rows)


def metrics() -> list[str]:
    """Return the table of all Prometheus metrics, in the order they are registered."""
    rows = [
        (f"`{series_name(metric)}`", str(metric._type), _codes(metric._labelnames), metric._documentation)
        for metric in registered()
    ]
    return _table(("metric", "type", "labels", "meaning"), rows)


def alerts() -> list[str]:
    """Return the table of all Prometheus alerts."""
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    rows = [
        (f"`{rule['alert']}`", rule["labels"]["severity"], f"`{' '.join(rule['expr'].split())}`", rule.get("for", ""))
        for rule in rules
    ]
    return _table(("alert", "severity", "when", "for"), rows)


def folders() -> list[str]:
    """Return the table of all source folders, each with the first paragraph of its docstring."""
    paths = sorted(path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py"))
    rows = [(f"`{path.relative_to(ROOT)}/`", _first_paragraph(path / "__init__.py")) for path in paths]
    return _table(("folder", "what it holds"), rows)


def waves() -> list[str]:
    """Return the table of the branches and waves of the default controller, if all answers agree and if none do."""
    rows = []
    for beta in (0.0, 0.25, 0.5, 0.75, 1.0):
        (alike, _), (different, rounds) = (_branches_and_rounds(beta, is_alike) for is_alike in (True, False))
        rows.append((f"{beta:g}", str(alike), str(different), "1" if rounds == 1 else f"1 to {rounds}"))
    return _table(("β", "branches if the first ones agree", "most branches", "waves"), rows)


def _branches_and_rounds(beta: float, is_alike: bool) -> tuple[int, int]:
    """Return how many branches the default controller opens, and in how many rounds it opens them."""
    controller, state, rounds = create("adaptive_consistency", beta), State(Limits(1)), 0
    while state.stop is None:
        actions = controller.decide(state)
        facts = [
            Advanced(index, 1, 1, True, 0 if is_alike else index)
            for index, action in enumerate(actions, state.width)
            if action.verb is Verb.BRANCH
        ]
        rounds += bool(facts)
        state.apply(actions, facts)
    return state.width, rounds


TABLES: Final = {
    "waves": Table("docs/beta.md", waves),
    "settings": Table("docs/settings.md", settings),
    "metrics": Table("docs/metrics.md", metrics),
    "alerts": Table("docs/metrics.md", alerts),
    "folders": Table("ARCHITECTURE.md", folders),
}


def registered() -> list[MetricWrapperBase]:
    """Return all metrics of the proxy."""
    collectors = Metrics().registry._collector_to_names
    return [collector for collector in collectors if isinstance(collector, MetricWrapperBase)]


def series_name(metric: MetricWrapperBase) -> str:
    """Return the name by which queries find a metric."""
    return f"{metric._name}_total" if metric._type == "counter" else metric._name


def in_page(text: str, name: str) -> str:
    """Return the table that stands in a page's text. Raises LookupError if the page has no place for it."""
    if (place := _place(name).search(text)) is None:
        raise LookupError(f"there is no line '<!-- generated: {name} -->' with an '<!-- end -->' after it")
    return place[2]


def with_table(text: str, name: str, lines: Iterable[str]) -> str:
    """Return a page's text with a table put in its place."""
    in_page(text, name)
    table = "\n".join(lines)
    return _place(name).sub(lambda place: f"{place[1]}{table}{place[3]}", text)


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- generated: {name} -->\n\n)(.*?)(\n\n<!-- end -->)", re.DOTALL)


def _default(name: str) -> str:
    value = SERVED.get(name, Settings.model_fields[name].default)
    shown = [] if value is None else [f"`{_written(value)}`"]
    shown += [f"embedded `{_written(EMBEDDED[name])}`"] if name in EMBEDDED else []
    return ", ".join(shown)


def _written(value: object) -> str:
    """Return a value as an environment variable sets it."""
    if isinstance(value, bool):
        return str(value).lower()
    return value.value if isinstance(value, StrEnum) else str(value)


def _first_paragraph(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in cells]


def main(arguments: Sequence[str]) -> int:
    """List the tables that are out of date, or write them."""
    stale = 0
    for name, table in TABLES.items():
        page = ROOT / table.page
        text = page.read_text()
        updated = with_table(text, name, table.make())
        if updated != text:
            stale += 1
            if "--write" in arguments:
                page.write_text(updated)
            sys.stdout.write(f"{table.page}: {name} {'written' if '--write' in arguments else 'is out of date'}\n")
    return 0 if "--write" in arguments else int(stale > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
