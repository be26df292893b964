"""`autotts promote`, `rollback` and `controllers`: change what a running proxy serves."""

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
from discovery.commands.options import AsJson
from discovery.data.safe_json import parse_json
from discovery.errors import PromotionError
from discovery.promotion.gate import GateJob
from discovery.promotion.registry import Card, ChangeCause, Registry
from discovery.store.records import utc_now

PASSED: Final = "promote"
"""The verdict a report must have for a promotion."""
LEDGER: Final = "ledger.jsonl"
"""Default name of the gate's ledger, in the registry's folder."""
TAIL: Final = 10
"""Lines of the audit log that are shown."""

Folder = Annotated[
    Path, typer.Option("--registry", envvar="AUTOTTS_REGISTRY", help="folder of the installed controllers")
]
Who = Annotated[str, typer.Option(envvar="USER", help="name for the audit log")]
Why = Annotated[str, typer.Option(help="reason for the audit log")]


def promote(
    what: Annotated[str, typer.Argument(help="FILE.py, or the digest prefix of an installed controller")],
    registry: Folder,
    stage: Annotated[RolloutStage, typer.Option("--as", help="rollout stage to put it at")],
    share: Annotated[float, typer.Option(min=0, max=1, help="share of requests for a canary")] = 0.1,
    why: Why = "",
    who: Who = "unknown",
    report: Annotated[Path | None, typer.Option(help="the gate's JSON report on the file")] = None,
    recordings: Annotated[Path | None, typer.Option(help="run the gate now on these recordings")] = None,
    against: Annotated[str, typer.Option("--champion", help="for --recordings: champion to beat")] = "cmc",
    ledger: Annotated[Path | None, typer.Option(help="for --recordings: file that keeps the judgements")] = None,
    shuffles: Annotated[int, typer.Option(min=1, help="for --recordings: branch orders per question")] = 100,
    force: Annotated[
        bool, typer.Option("--force", help="promote without a passed gate, or despite a quarantine")
    ] = False,
) -> None:
    """Put a controller at a rollout stage; a running proxy follows within a second."""
    opened, by = Registry(registry), ChangeCause(who, why, datetime.now(UTC), force)
    if force:
        print_warning(
            f"FORCED: {what} becomes {stage} regardless of the gate and quarantines; "
            "the audit log and the card record this"
        )
    before = opened.read()
    if what.endswith(".py"):
        spec = read(Path(what))
        if recordings is not None:
            report = run_gate_on(Path(what), recordings, against, ledger or registry / LEDGER, shuffles, who)
        after = install(opened, spec, {**discovery_card(Path(what)), **card_of(spec, report, force)}, stage, share, by)
        digest = spec.digest
    elif report is not None:
        raise PromotionError(f"--report is only for files; {what} is already installed")
    else:
        digest = opened.find(what)
        after = opened.promote(digest, stage, share, by)
    wide_console().print(_describe(opened, digest, stage, before, after), highlight=False, markup=False)


def rollback(registry: Folder, why: Why = "", who: Who = "unknown") -> None:
    """Restore the previous champion and drop the canary."""
    opened = Registry(registry)
    after = opened.roll_back(ChangeCause(who, why, datetime.now(UTC)))
    champion = "the configured controller" if after.champion is None else _name(opened, after.champion)
    wide_console().print(f"{registry}: {champion} is the champion; there is no canary", highlight=False, markup=False)


def controllers(registry: Folder, as_json: AsJson = False) -> None:
    """List the installed controllers by stage, their cards, and the latest changes."""
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
    """Run the gate on a file in another process; return the path of the report beside the file. Raises GateError."""
    report = file.with_suffix(".report.json")
    job = GateJob(
        finalist=str(file),
        champion=champion,
        recordings=recordings,
        ledger=ledger,
        report=report,
        created=utc_now(),
        who=who,
        shuffles=shuffles,
    )
    gate_report = judge_in_subprocess(job)
    wide_console().print(
        f"gate verdict: {gate_report.verdict} (p = {gate_report.p}); report: {report}", highlight=False, markup=False
    )
    return report


def install(
    registry: Registry, spec: Spec, card: Card, stage: RolloutStage, share: float, by: ChangeCause
) -> RolloutState:
    """Put a controller at a stage if its card shows a passed gate, or if `by` forces it.

    Raises PromotionError; nothing has changed then.
    """
    if not by.forced:
        check_report(spec, card.get("report"))
    return registry.install(spec, card, stage, share, by)


def check_report(spec: Spec, report: Any) -> None:
    """Raise PromotionError unless `report` is about this controller and its verdict is to promote it."""
    if report is None:
        raise PromotionError(f"{spec.name}: needs a passed gate; give --report FILE, or use --force")
    if report.get("digest") != spec.digest:
        raise PromotionError(
            f"{spec.name}: the report is about {str(report.get('digest'))[:12]}, not {spec.digest[:12]}"
        )
    if report.get("verdict") != PASSED:
        raise PromotionError(f"{spec.name}: the gate's verdict is {report.get('verdict')!r}, not {PASSED!r}")


def card_of(spec: Spec, report: Path | None, forced: bool = False) -> Card:
    """Return a controller's card with the report in a file, if one is given. Raises PromotionError if it is not one."""
    if report is None:
        return {"headline": "forced without a report" if forced else "", "report": None}
    content = _json(report)
    if not isinstance(content, dict):
        raise PromotionError(f"{report}: not a report of the gate")
    return {"headline": str(content.get("headline") or f"verdict: {content.get('verdict')}"), "report": content}


def discovery_card(file: Path) -> dict[str, Any]:
    """Return the card that `autotts discover` wrote beside a controller's file; empty if there is none."""
    card_file = file.with_suffix(".json")
    return {"discovery": _json(card_file)} if card_file.is_file() else {}


def _json(path: Path) -> Any:
    """Parse a JSON file. Raises PromotionError, which names the file."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise PromotionError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise PromotionError(f"{path}: {error}") from None


def print_warning(text: str) -> None:
    """Print a warning in bold red on stderr."""
    Console(stderr=True).print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _describe(registry: Registry, digest: str, stage: RolloutStage, before: RolloutState, after: RolloutState) -> str:
    text = f"{registry.folder}: {_name(registry, digest)} is {stage}"
    if stage is RolloutStage.CANARY:
        text += f" for {after.share:.0%} of the requests"
    ousted = before.stages[stage]
    return text if ousted in (None, digest) else f"{text}, in place of {ousted[:12]}"


def _name(registry: Registry, digest: str) -> str:
    return f"{registry.card(digest)['name']} ({digest[:12]})"


def _known(registry: Registry, installed: RolloutState) -> list[str]:
    """Return the digests of all installed controllers, by stage and history."""
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
        stage_text = f"canary ({installed.share:.0%})" if stage is RolloutStage.CANARY else str(stage or "none")
        stage_text += ", quarantined" if digest in installed.quarantined else ""
        forced = "[red]yes[/red]" if card.get("forced") else ""
        table.add_row(stage_text, card["name"], digest[:12], forced, str(card.get("headline", "")))
    return table


def _changes(audit: list[Any]) -> Table:
    table = Table(title="latest changes", title_justify="left")
    for heading in ("time", "who", "action", "digest", "forced", "reason"):
        table.add_column(heading)
    for line in audit:
        forced = "[red]yes[/red]" if line["forced"] else ""
        digest = (line["digest"] or "")[:12]
        table.add_row(line["when"][:19], line["who"], line["action"], digest, forced, line["why"])
    return table
