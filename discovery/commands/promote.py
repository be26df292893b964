"""`autotts promote`, `rollback` and `controllers`: change what a running proxy serves."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from controllers.builtin import DEFAULT
from controllers.loading import Spec, read
from controllers.rollout_state import RolloutStage, RolloutState
from discovery.commands.console import wide_console
from discovery.commands.gate import judge_in_subprocess
from discovery.commands.options import AnyPlace, AsJson, LedgerPlace, RegistryPlace, Who, registry_place, user_name
from discovery.data.safe_json import parse_json
from discovery.errors import PromotionError, RegistryAway
from discovery.promotion.gate import GateJob
from discovery.promotion.registry import ChangeCause, Registry
from discovery.promotion.requirements import check_installed, check_models, check_report, judged_models
from discovery.promotion.searched_questions import SEARCHED
from discovery.promotion.storage.cards import Card, InstalledCards, built_in_problem
from discovery.store import StorePlace, parse_place
from discovery.store.records import utc_now

LEDGER: Final = "ledger.jsonl"
"""Default name of the gate's ledger, in the registry's folder."""
CONTROLLER_VARIABLE: Final = "AUTOTTS_CONTROLLER"
"""Variable of the proxy's setting that names the controller that serves without a champion."""
TAIL: Final = 10
"""Lines of the audit log that are shown."""
DAMAGED: Final = 1
"""Exit status of `autotts controllers` if it cannot use a card. Everything else is listed nevertheless."""

Why = Annotated[str, typer.Option(help="reason for the audit log")]
ForModel = Annotated[
    str | None, typer.Option("--model", help="model it is for (default: all models without a champion of their own)")
]


def promote(
    what: Annotated[
        str, typer.Argument(help="FILE.py, a built-in controller's name, or the digest prefix of an installed one")
    ],
    stage: Annotated[RolloutStage, typer.Option("--as", help="rollout stage to put it at")],
    registry: RegistryPlace = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="share of requests for a canary")] = 0.1,
    model: ForModel = None,
    why: Why = "",
    who: Who = None,
    report: Annotated[Path | None, typer.Option(help="the gate's JSON report on the file")] = None,
    recordings: Annotated[
        AnyPlace | None,
        typer.Option(parser=parse_place, metavar="STORE|FILE|FOLDER", help="run the gate now on these recordings"),
    ] = None,
    against: Annotated[str, typer.Option("--champion", help="for --recordings: champion to beat")] = DEFAULT,
    ledger: LedgerPlace = None,
    shuffles: Annotated[int, typer.Option(min=1, help="for --recordings: branch orders per question")] = 100,
    probe_tokens: Annotated[
        int | None, typer.Option(min=0, help="for --recordings: tokens charged per probe (default: as recorded)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="promote without a passed gate, or despite a quarantine")
    ] = False,
) -> None:
    """Put a controller at a rollout stage; running proxies follow within two seconds."""
    place = registry_place(registry)
    opened, by = Registry(place), ChangeCause(who or user_name(), why, datetime.now(UTC), force)
    before = opened.read()
    if what.endswith(".py"):
        spec = read(Path(what))
        if recordings is not None:
            judged_in = ledger or default_ledger(place)
            report = run_gate_on(Path(what), recordings, against, judged_in, shuffles, by.who, model, probe_tokens)
        card = {**discovery_card(Path(what)), **card_of(spec, report, force)}
        after = install(opened, spec, card, stage, share, by, model)
        digest = spec.digest
    else:
        digest, after = promote_known(opened, what, stage, share, by, model, report)
    if after.version == before.version:
        print_warning(f"nothing changed: {what} is {stage}{_of(model)} already")
    elif force:
        print_warning(
            f"FORCED: {what} is {stage} regardless of the gate and quarantines; the audit log and the card record this"
        )
    if stage is not RolloutStage.CHAMPION and after.own(model).champion is None and after.default.champion is None:
        _warn_of_itself(digest, stage)
    wide_console().print(_describe(opened, digest, stage, before, after, model), highlight=False, markup=False)
    _warn_of_unreadable(opened, after)


def rollback(
    registry: RegistryPlace = None,
    model: ForModel = None,
    canary: Annotated[bool, typer.Option("--canary", help="drop the canary only; the champion stays")] = False,
    shadow: Annotated[bool, typer.Option("--shadow", help="drop the shadow only; the champion stays")] = False,
    why: Why = "",
    who: Who = None,
) -> None:
    """Restore the previous champion and drop the canary, of one model or of the default."""
    if canary and shadow:
        raise typer.BadParameter("--canary and --shadow: give one of them")
    opened = Registry(registry_place(registry))
    before = opened.read()
    # of two at the same time, only one is made
    by = ChangeCause(who or user_name(), why, datetime.now(UTC), version=before.version)
    own = before.own(model)
    if canary or shadow:
        stage = RolloutStage.CANARY if canary else RolloutStage.SHADOW
        tried = own.stages[stage]
        if tried is None:
            raise PromotionError(f"{opened.place}: there is no {stage}{_of(model)}{_set_elsewhere(before, stage)}")
        after = (opened.drop_canary if canary else opened.drop_shadow)(tried, by, model)
    else:
        after = opened.roll_back(by, model)
    holder = after.own(model).champion
    if holder is not None:
        champion = _name(opened, holder)
    else:
        champion = "the configured controller" if model is None else "the default's champion"
    gone = RolloutStage.SHADOW if shadow else RolloutStage.CANARY
    wide_console().print(
        f"{opened.place}: {champion} is the champion{_of(model)}; there is no {gone}", highlight=False, markup=False
    )
    _warn_of_unreadable(opened, after)


def controllers(registry: RegistryPlace = None, as_json: AsJson = False) -> None:
    """List the installed controllers by model and stage, their cards, and the latest changes."""
    place = registry_place(registry)
    with Registry(place).session() as opened:
        installed, audit = opened.read(), opened.audit()[-TAIL:]
        cards = opened.cards(known_digests(installed, opened.digests()))
    if as_json:
        serving = {model: installed.of_model(model).as_json() for model in sorted(installed.models)}
        figures = {
            **installed.as_json(),
            "serving": serving,
            "cards": cards.readable,
            "damaged": cards.damaged,
            "audit": audit,
        }
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    else:
        console = wide_console()
        console.print(_stages(place, installed, cards))
        if isinstance(place, Path) and not place.exists():
            console.print(f"{place} does not exist yet; the first promotion makes it", highlight=False, markup=False)
        if audit:
            console.print(_changes(audit))
    for digest, problem in cards.damaged.items():
        print_warning(f"the card of {digest[:12]} cannot be used: {problem}")
    if cards.damaged:
        raise typer.Exit(DAMAGED)


def promote_known(
    registry: Registry,
    what: str,
    stage: RolloutStage,
    share: float,
    by: ChangeCause,
    model: str | None = None,
    report: Path | None = None,
) -> tuple[str, RolloutState]:
    """Put a built-in or an installed controller at a stage, and return its digest and the new state.

    `what` is its name or the beginning of its digest. Raises PromotionError; nothing has changed then.
    """
    if built_in_problem(what) is None:
        spec = Spec(what)
        return spec.digest, install(registry, spec, card_of(spec, report, by.forced), stage, share, by, model)
    if report is not None:
        raise PromotionError(f"--report is only for files; {what} is already installed")
    digest = registry.find(what)
    if not by.forced:
        check_installed(registry.card(digest), model)
    return digest, registry.promote(digest, stage, share, by, model)


def _warn_of_itself(digest: str, stage: RolloutStage) -> None:
    """Print a warning if a canary or shadow is the controller that proxies serve while there is no champion."""
    configured = os.environ.get(CONTROLLER_VARIABLE) or DEFAULT
    if digest == Spec(configured).digest:
        print_warning(
            f"{configured} is also the configured controller ({CONTROLLER_VARIABLE}), which serves while there is no "
            f"champion; as {stage} it is compared with itself, which shows nothing"
        )


def _warn_of_unreadable(registry: Registry, state: RolloutState) -> None:
    """Print a warning of each controller at a stage that proxies cannot load."""
    for digest in sorted(state.staged):
        try:
            registry.spec(digest)
        except RegistryAway:
            return  # the change is made, and this is only a warning
        except PromotionError as error:
            stages = [f"{stage}{_of(model)}" for model, stage in state.stages_of(digest)]
            is_champion = any(stage is RolloutStage.CHAMPION for _, stage in state.stages_of(digest))
            effect = "cannot follow this change" if is_champion else "serve without it"
            print_warning(f"proxies {effect}: {digest[:12]} ({', '.join(stages)}) cannot be loaded: {error}")


def default_ledger(registry: StorePlace) -> StorePlace:
    """Return the ledger of a registry: a file in its folder, or the one of its database."""
    return registry / LEDGER if isinstance(registry, Path) else registry


def run_gate_on(
    file: Path,
    recordings: StorePlace,
    champion: str,
    ledger: StorePlace,
    shuffles: int,
    who: str,
    model: str | None = None,
    probe_tokens: int | None = None,
) -> Path:
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
        model=model or "",
        shuffles=shuffles,
        probe_tokens=probe_tokens,
    )
    gate_report = judge_in_subprocess(job)
    wide_console().print(
        f"gate verdict: {gate_report.verdict} (p = {gate_report.p}); report: {report}", highlight=False, markup=False
    )
    return report


def install(
    registry: Registry,
    spec: Spec,
    card: Card,
    stage: RolloutStage,
    share: float,
    by: ChangeCause,
    model: str | None = None,
) -> RolloutState:
    """Put a controller at a stage if its card shows a passed gate, if it is built in, or if `by` forces it.

    A report that the gate made on one model is for that model only. Raises PromotionError; nothing has changed then.
    """
    report = card.get("report")
    if not by.forced and (spec.is_foreign or report is not None):
        if report is None and spec.digest in registry.digests():
            raise PromotionError(
                f"{spec.name} is installed already; promote it by its digest, {spec.digest[:12]}, or give --report FILE"
            )
        check_report(spec, report)
        check_models({**card, "name": spec.name, "models": judged_models(report)}, model)
    if models := judged_models(report):
        card = {**card, "models": models}
    return registry.install(spec, card, stage, share, by, model)


def card_of(spec: Spec, report: Path | None, forced: bool = False) -> Card:
    """Return a controller's card with the report in a file, if one is given. Raises PromotionError if it is not one."""
    if report is None:
        built_in = "" if spec.is_foreign else "built in"
        return {"headline": "forced without a report" if forced else built_in, "report": None}
    content = _json(report)
    if not isinstance(content, dict):
        raise PromotionError(f"{report}: not a report of the gate")
    return {"headline": str(content.get("headline") or f"verdict: {content.get('verdict')}"), "report": content}


def discovery_card(file: Path) -> dict[str, Any]:
    """Return the card that `autotts discover` wrote beside a controller's file; empty if there is none.

    The ids of the questions that the search has seen are left out: only the gate needs them.
    """
    card_file = file.with_suffix(".json")
    if not card_file.is_file():
        return {}
    content = _json(card_file)
    if isinstance(content, dict) and isinstance(content.get("data"), dict):
        content["data"].pop(SEARCHED, None)
    return {"discovery": content}


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


def _describe(
    registry: Registry,
    digest: str,
    stage: RolloutStage,
    before: RolloutState,
    after: RolloutState,
    model: str | None,
) -> str:
    text = f"{registry.place}: {_name(registry, digest)} is {stage}{_of(model)}"
    if stage is RolloutStage.CANARY:
        text += f" for {after.own(model).share:.0%} of the requests"
    ousted = before.own(model).stages[stage]
    if ousted not in (None, digest):
        text += f", in place of {ousted[:12]}"
    if model is not None and model not in before.models:
        text += f"\n{model} is new in this registry; it is served only if GET /v1/models lists that name"
    return text


def _set_elsewhere(state: RolloutState, stage: RolloutStage) -> str:
    """Return a hint at the models that have a controller at this stage; empty if none has."""
    models = [name for name in (None, *sorted(state.models)) if state.own(name).stages[stage] is not None]
    named = ["the default" if name is None else f"--model {name}" for name in models]
    return f"; there is one of {', '.join(named)}" if named else ""


def _of(model: str | None) -> str:
    return "" if model is None else f" of model {model}"


def _name(registry: Registry, digest: str) -> str:
    """Return the name and digest of a controller; only the digest if its card cannot be used."""
    try:
        return f"{registry.card(digest)['name']} ({digest[:12]})"
    except PromotionError:  # the change is made, and its message must say so
        return digest[:12]


def known_digests(installed: RolloutState, digests: Iterable[str]) -> list[str]:
    """Return the digests of the controllers at a stage or in the history, by model, and then those of `digests`."""
    every = (installed.default, *installed.models.values())
    staged = [digest for holders in every for digest in reversed(holders.stages.values())]
    history = [digest for holders in every for digest in reversed(holders.previous)]
    return [digest for digest in dict.fromkeys((*staged, *history, *digests)) if digest is not None]


def _stages(place: StorePlace, installed: RolloutState, cards: InstalledCards) -> Table:
    table = Table(title=f"{place}, version {installed.version}", title_justify="left")
    for heading in ("model", "stage", "controller", "digest", "forced", "headline"):
        table.add_column(heading)
    if installed.default.champion is None:
        table.add_row("default", RolloutStage.CHAMPION, "the configured controller", "", "", "")
    for model in (None, *sorted(installed.models)):
        holders = installed.own(model)
        for stage, digest in reversed(holders.stages.items()):
            if digest is not None:
                share = f" ({holders.share:.0%})" if stage is RolloutStage.CANARY else ""
                table.add_row(escape(model or "default"), *_row(f"{stage}{share}", digest, installed, cards))
    for digest in (*cards.readable, *cards.damaged):
        if digest not in installed.staged:
            table.add_row("", *_row("none", digest, installed, cards))
    return table


def _row(stage: str, digest: str, installed: RolloutState, cards: InstalledCards) -> tuple[str, ...]:
    stage += ", quarantined" if digest in installed.quarantined else ""
    card = cards.readable.get(digest)
    if card is None:
        return stage, "[red]damaged card[/red]", digest[:12], "", ""
    forced = "[red]yes[/red]" if card.get("forced") else ""
    return stage, escape(card["name"]), digest[:12], forced, escape(str(card.get("headline", "")))


def _changes(audit: list[Any]) -> Table:
    table = Table(title="latest changes", title_justify="left")
    for heading in ("time", "who", "action", "model", "digest", "forced", "reason"):
        table.add_column(heading)
    for line in audit:
        forced = "[red]yes[/red]" if line["forced"] else ""
        digest = (line["digest"] or "")[:12]
        model = escape(line.get("model", ""))
        who, why = escape(line["who"]), escape(line["why"])
        table.add_row(line["when"][:19], who, line["action"], model, digest, forced, why)
    return table
