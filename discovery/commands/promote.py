"""`autotts promote`, `rollback` and `controllers`: what the proxy serves, changed without stopping it."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from controllers.loading import Spec, read
from controllers.rollout_state import RolloutStage, RolloutState
from discovery.commands.console import wide_console
from discovery.commands.gate import judge_in_subprocess
from discovery.data.safe_json import parse_json
from discovery.errors import PromotionError
from discovery.promotion.gate import GateJob
from discovery.promotion.registry import Card, ChangeCause, Registry
from discovery.store.records import utc_now

PASSED: Final = "promote"
"""The verdict of a report that a controller may be promoted by."""
LEDGER: Final = "ledger.jsonl"
"""In a registry's folder: the judgements its controllers have passed, if no other place is named."""
TAIL: Final = 10
"""Lines of the audit that are shown."""

Folder = Annotated[Path, typer.Option("--registry", envvar="AUTOTTS_REGISTRY", help="the folder of what is installed")]
Who = Annotated[str, typer.Option(envvar="USER", help="who the audit names")]
Why = Annotated[str, typer.Option(help="why, for the audit")]


def promote(
    what: Annotated[str, typer.Argument(help="FILE.py, or the beginning of an installed controller's digest")],
    registry: Folder,
    stage: Annotated[RolloutStage, typer.Option("--as", help="what it is to do")],
    share: Annotated[float, typer.Option(min=0, max=1, help="of the requests, a canary's")] = 0.1,
    why: Why = "",
    who: Who = "unknown",
    report: Annotated[Path | None, typer.Option(help="the gate's report on the file, as JSON")] = None,
    recordings: Annotated[Path | None, typer.Option(help="run the gate now, on these recordings")] = None,
    against: Annotated[str, typer.Option("--champion", help="for --recordings: whom to beat")] = "cmc",
    ledger: Annotated[Path | None, typer.Option(help="for --recordings: where judgements are kept")] = None,
    shuffles: Annotated[int, typer.Option(min=1, help="for --recordings: orders of branches")] = 100,
    force: Annotated[bool, typer.Option("--force", help="without a passed gate, or in spite of a quarantine")] = False,
) -> None:
    """Put a controller at a stage; a running proxy follows within a second."""
    opened, by = Registry(registry), ChangeCause(who, why, datetime.now(UTC), force)
    if force:
        print_warning(
            f"FORCED: {what} becomes {stage} whatever the gate or a quarantine says; the audit and its card say so"
        )
    before = opened.read()
    if what.endswith(".py"):
        spec = read(Path(what))
        if recordings is not None:
            report = run_gate_on(Path(what), recordings, against, ledger or registry / LEDGER, shuffles, who)
        after = install(opened, spec, {**found(Path(what)), **card_of(spec, report, force)}, stage, share, by)
        digest = spec.digest
    elif report is not None:
        raise PromotionError(f"--report is for a file; {what} has been installed by one already")
    else:
        digest = opened.find(what)
        after = opened.promote(digest, stage, share, by)
    wide_console().print(_told(opened, digest, stage, before, after), highlight=False, markup=False)


def rollback(registry: Folder, why: Why = "", who: Who = "unknown") -> None:
    """Return to the champion before this one, and drop the canary."""
    opened = Registry(registry)
    after = opened.roll_back(ChangeCause(who, why, datetime.now(UTC)))
    champion = "the configured controller" if after.champion is None else _name(opened, after.champion)
    wide_console().print(f"{registry}: {champion} is champion, there is no canary", highlight=False, markup=False)


def controllers(registry: Folder, as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Who is at which stage, how they got there, and what was changed last."""
    opened = Registry(registry)
    installed, audit = opened.read(), opened.audit()[-TAIL:]
    cards = {digest: opened.card(digest) for digest in _known(opened, installed)}
    if as_json:
        figures = {**installed.as_json(), "cards": cards, "audit": audit}
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    console = wide_console()
    console.print(_stages(registry, installed, cards))
    if audit:
        console.print(_changes(audit))


def run_gate_on(file: Path, recordings: Path, champion: str, ledger: Path, shuffles: int, who: str) -> Path:
    """The gate's report on a file, made in another process and left beside the file. Raises GateError."""
    report = file.with_suffix(".report.json")
    order = GateJob(
        finalist=str(file),
        champion=champion,
        recordings=recordings,
        ledger=ledger,
        report=report,
        created=utc_now(),
        who=who,
        shuffles=shuffles,
    )
    told = judge_in_subprocess(order)
    wide_console().print(f"the gate: {told.verdict} (p = {told.p}); {report}", highlight=False, markup=False)
    return report


def install(
    registry: Registry, spec: Spec, card: Card, stage: RolloutStage, share: float, by: ChangeCause
) -> RolloutState:
    """Put a controller at a stage by what its card says of it: that it has passed the gate, unless `by` forces it.

    Raises PromotionError; nothing has changed then.
    """
    if not by.forced:
        check(spec, card.get("report"))
    return registry.install(spec, card, stage, share, by)


def check(spec: Spec, report: Any) -> None:
    """Raise PromotionError unless `report` is of this controller and says that it has passed."""
    if report is None:
        raise PromotionError(f"{spec.name}: it needs a passed gate: give --report FILE, or --force it")
    if report.get("digest") != spec.digest:
        raise PromotionError(f"{spec.name}: the report is of {str(report.get('digest'))[:12]}, not {spec.digest[:12]}")
    if report.get("verdict") != PASSED:
        raise PromotionError(f"{spec.name}: the gate's verdict is {report.get('verdict')!r}, not {PASSED!r}")


def card_of(spec: Spec, report: Path | None, forced: bool = False) -> Card:
    """The card of a controller by the report in a file, if there is one. Raises PromotionError if that is no report."""
    if report is None:
        return {"headline": "forced without a report" if forced else "", "report": None}
    told = _json(report)
    if not isinstance(told, dict):
        raise PromotionError(f"{report}: that is no report of the gate's")
    return {"headline": str(told.get("headline") or f"verdict: {told.get('verdict')}"), "report": told}


def found(file: Path) -> dict[str, Any]:
    """What `autotts discover` has left beside a controller's file; nothing if it has left nothing."""
    beside = file.with_suffix(".json")
    return {"discovery": _json(beside)} if beside.is_file() else {}


def _json(path: Path) -> Any:
    """What a file says. Raises PromotionError, naming it."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise PromotionError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise PromotionError(f"{path}: {error}") from None


def print_warning(words: str) -> None:
    """On stderr, where nobody can miss it."""
    Console(stderr=True).print(words, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _told(registry: Registry, digest: str, stage: RolloutStage, before: RolloutState, after: RolloutState) -> str:
    words = f"{registry.folder}: {_name(registry, digest)} is {stage}"
    if stage is RolloutStage.CANARY:
        words += f" for {after.share:.0%} of the requests"
    ousted = before.stages[stage]
    return words if ousted in (None, digest) else f"{words}, in place of {ousted[:12]}"


def _name(registry: Registry, digest: str) -> str:
    return f"{registry.card(digest)['name']} ({digest[:12]})"


def _known(registry: Registry, installed: RolloutState) -> list[str]:
    """Everybody who is installed, each once, by how much they have to say."""
    named = (*reversed(installed.stages.values()), *reversed(installed.previous), *registry.digests())
    return [digest for digest in dict.fromkeys(named) if digest is not None]


def _stages(folder: Path, installed: RolloutState, cards: dict[str, Card]) -> Table:
    table = Table(title=f"{folder}, version {installed.version}", title_justify="left")
    for heading in ("stage", "controller", "digest", "forced", "headline"):
        table.add_column(heading)
    if installed.champion is None:
        table.add_row(RolloutStage.CHAMPION, "the configured controller", "", "", "")
    for digest in cards:
        card, stage = cards[digest], installed.stage_of(digest)
        did = f"canary ({installed.share:.0%})" if stage is RolloutStage.CANARY else str(stage or "none")
        did += ", quarantined" if digest in installed.quarantined else ""
        forced = "[red]yes[/red]" if card.get("forced") else ""
        table.add_row(did, card["name"], digest[:12], forced, str(card.get("headline", "")))
    return table


def _changes(audit: list[Any]) -> Table:
    table = Table(title="changed last", title_justify="left")
    for heading in ("when", "who", "what", "digest", "forced", "why"):
        table.add_column(heading)
    for line in audit:
        forced = "[red]yes[/red]" if line["forced"] else ""
        digest = (line["digest"] or "")[:12]
        table.add_row(line["when"][:19], line["who"], line["action"], digest, forced, line["why"])
    return table
