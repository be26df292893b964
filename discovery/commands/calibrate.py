"""`autotts calibrate`: measure each β on each model, and choose a controller for each model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from controllers.builtin import DEFAULT
from controllers.dial import parse_beta
from controllers.loading import Spec, parse_spec
from controllers.rollout_state import RolloutStage
from discovery.commands.console import add_plain_row, print_plain, split_names, wide_console
from discovery.commands.options import (
    Address,
    Answers,
    AnyPlace,
    Benchmarks,
    Betas,
    EngineChoice,
    MaxBranches,
    Models,
    ProbeTokens,
    RecordingsPlace,
    Shuffles,
    Who,
    Workers,
    check_cluster_options,
    registry_option,
    user_name,
)
from discovery.data.atomic_files import check_output
from discovery.data.recordings import Split
from discovery.errors import PromotionError, RecordingsNotFound
from discovery.evaluation.calibration import (
    CALIBRATION_FILE,
    Arm,
    Calibrations,
    ChosenCalibration,
    calibrate_scores,
    score_with_rival,
    write_calibrations,
)
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import AnswerComparison
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.sources import open_source, select_cells
from discovery.promotion.controller_choice import (
    CONFIDENCE,
    SLOWDOWN,
    Advantage,
    Choice,
    ModelGains,
    choose,
    compare_choices,
    gains_over,
)
from discovery.promotion.registry import ChangeCause, Registry
from discovery.promotion.requirements import check_installed
from discovery.promotion.storage.cards import built_in_problem

log = logging.getLogger(__name__)


def calibrate_command(
    recordings: RecordingsPlace,
    out: Annotated[Path, typer.Option(help="file to write the calibration to (.json)")],
    controllers: Annotated[
        str,
        typer.Option(
            help="controllers to calibrate: names and FILE.py, separated by commas. With several, one is chosen for "
            "each model; the first is the default that the others must beat"
        ),
    ] = DEFAULT,
    betas: Betas = "0,0.25,0.5,0.75,1",
    shuffles: Shuffles = 100,
    models: Models = "",
    benchmarks: Benchmarks = "",
    split: Annotated[Split | None, typer.Option(help="split of the questions (default: all but held-out)")] = None,
    answers: Answers = AnswerComparison.AUTO,
    probe_tokens: ProbeTokens = None,
    max_branches: MaxBranches = 64,
    engine: EngineChoice = EngineName.PROCESS,
    workers: Workers = None,
    address: Address = None,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="probability that a chosen controller is better than the default")
    ] = CONFIDENCE,
    slowdown: Annotated[
        float, typer.Option(min=0, help="critical path of a chosen controller, at most this multiple of the default's")
    ] = SLOWDOWN,
    compare: Annotated[
        bool, typer.Option("--compare", help="compare a controller for each model with one for all, cross-validated")
    ] = False,
    registry: Annotated[
        AnyPlace | None,
        registry_option("make the chosen controllers champions of their models here; --controllers may name its own"),
    ] = None,
    who: Who = None,
) -> None:
    """Measure the cost and accuracy of each β on each model, and choose among several controllers for each model."""
    check_cluster_options(engine, address, workers)
    opened = None if registry is None else Registry(registry)
    specs = list({spec.digest: spec for spec in (_find(text, opened) for text in split_names(controllers))}.values())
    if not specs:
        raise typer.BadParameter("--controllers is empty; name at least one controller")
    if len(specs) == 1 and (compare or opened is not None):
        option = "--compare" if compare else "--registry"
        raise typer.BadParameter(f"{option} needs at least two --controllers: the default, and others to choose from")
    if opened is not None:
        _check_default(opened, specs[0])
    check_output(out, "--out", CALIBRATION_FILE)
    source = open_source(recordings)
    available = [cell for cell in source.cells() if split is not None or cell.split is not Split.HELD_OUT]
    if not available:
        raise RecordingsNotFound(f"{recordings}: holds held-out questions only; use them with --split held-out")
    cells = select_cells(available, split_names(models), split_names(benchmarks), split)
    beta_values = [parse_beta(text, "--betas") for text in split_names(betas)]
    if not beta_values:
        raise typer.BadParameter("--betas is empty; give at least one value")
    measured = score_with_rival(
        source,
        cells,
        specs,
        make_engine(engine, workers, address),
        ReplayRules(max_branches, probe_tokens),
        beta_values,
        shuffles,
        answers,
    )
    calibrations = calibrate_scores(measured, specs, probe_tokens)
    gains: dict[str, ModelGains] = {}
    if len(specs) > 1:
        sides = {side.spec.digest: side for side in measured.sides}
        gains = gains_over(sides[specs[0].digest], [sides[spec.digest] for spec in specs[1:]], measured, slowdown)
        calibrations = _with_choices(calibrations, choose(gains, confidence), specs, confidence)
    write_calibrations(calibrations, out)
    console = wide_console()
    for name in dict.fromkeys(one.controller for calibration in calibrations.values() for one in calibration.all):
        console.print(_table(name, calibrations))
    console.print(f"answer comparison: {next(iter(calibrations.values())).answers}", highlight=False)
    if probe_tokens is not None:
        console.print(f"tokens per probe: {probe_tokens}", highlight=False)
    console.print(
        f"mean chain: over all recorded chains; controllers are played in {shuffles} orders of them, so one chain of "
        "theirs may differ a little from it",
        highlight=False,
    )
    console.print(_reliability_table(calibrations))
    if gains:
        console.print(_choices(calibrations))
        for line in left_out(gains, [spec.name for spec in specs[1:]], slowdown):
            console.print(line, highlight=False)
    if compare:
        _print_comparison(console, gains, specs, confidence)
    if opened is not None:
        for line in install_choices(opened, calibrations, specs, who or user_name()):
            print_plain(console, line)


def _find(text: str, registry: Registry | None) -> Spec:
    """Return the controller of a name, a file, or the name or digest prefix of one that the registry has installed."""
    if registry is not None and not text.endswith(".py"):
        cards = registry.cards()
        digests = [digest for digest, card in cards.readable.items() if text in (card["name"], digest[:12])]
        digests += [digest for digest in cards.damaged if text == digest[:12]]
        if len(digests) > 1:
            listed = ", ".join(digest[:12] for digest in digests)
            raise PromotionError(f"several installed controllers are named {text}; give one of {listed} instead")
        if digests:
            return registry.spec(digests[0])
        for problem in cards.damaged.values() if built_in_problem(text) else ():
            log.warning("an installed controller that may be named %s is left out: %s", text, problem)
    return parse_spec(text)


def _name(registry: Registry, digest: str) -> str:
    """Return the name of an installed controller; the beginning of its digest if its card cannot be used."""
    card = registry.cards([digest]).readable.get(digest)
    return digest[:12] if card is None else str(card["name"])


def _check_default(registry: Registry, default: Spec) -> None:
    """Raise PromotionError if the choice would be compared with another controller than the registry's default."""
    champion = registry.read().default.champion
    if champion not in (None, default.digest):
        name = _name(registry, champion)
        raise PromotionError(
            f"the default's champion in {registry.place} is {name} ({champion[:12]}), but --controllers begins with "
            f"{default.name}; name {champion[:12]} first"
        )


def _with_choices(
    calibrations: Calibrations, choices: Mapping[str, Choice], specs: Sequence[Spec], confidence: float
) -> Calibrations:
    """Return the calibrations with the choice of each model. `specs` are the default and then the candidates."""
    made = {}
    for model, calibration in calibrations.items():
        choice = choices[model]
        chosen = specs[0 if choice.candidate is None else 1 + choice.candidate]
        evidence = ChosenCalibration(
            controller=chosen.name,
            digest=chosen.digest,
            default=specs[0].name,
            advantage=choice.advantage,
            error=choice.error if math.isfinite(choice.error) else None,
            shrunk=choice.shrunk,
            bound=choice.bound,
            confidence=confidence,
            questions=choice.questions,
        )
        made[model] = replace(calibration, choice=evidence)
    return made


def left_out(gains: Mapping[str, ModelGains], names: Sequence[str], slowdown: float) -> list[str]:
    """Return a line on each model that some candidates, of these `names`, may not serve."""
    lines = []
    for model, of_model in gains.items():
        slow = [name for name, is_allowed in zip(names, of_model.allowed, strict=True) if not is_allowed]
        if slow:
            limit = f"{slowdown:g} times the default's plus an interval (--slowdown)"
            lines.append(f"{model}: left out for a critical path of more than {limit}: {', '.join(slow)}")
    return lines


def install_choices(registry: Registry, calibrations: Calibrations, specs: Sequence[Spec], who: str) -> list[str]:
    """Make the chosen controllers champions of their models, and return a line on each model.

    A controller from a file must be installed already, so that it has passed the gate. A model for which the default
    was chosen is left as it is. Raises PromotionError; nothing has changed then.
    """
    by_digest = {spec.digest: spec for spec in specs}
    chosen = {model: each.choice for model, each in calibrations.items() if each.choice is not None}
    moves = {model: choice for model, choice in chosen.items() if choice.digest != specs[0].digest}
    for model, choice in moves.items():
        if by_digest[choice.digest].is_foreign:
            if choice.digest not in registry.digests():
                raise PromotionError(
                    f"{choice.controller}, chosen for model {model}, is a file that is not installed in "
                    f"{registry.place}; run the gate and `autotts promote FILE --as shadow --model {model}` first"
                )
            check_installed(registry.card(choice.digest), model)
        if choice.digest in registry.read().quarantined:
            raise PromotionError(f"{choice.controller}, chosen for model {model}, is quarantined because it failed")
    lines = []
    for model, choice in chosen.items():
        champion = registry.read().own(model).champion
        if choice.digest == champion:
            lines.append(f"model {model}: {choice.controller} is its champion already")
        elif model not in moves:
            kept = "" if champion is None else f"; it keeps its champion {_name(registry, champion)}"
            lines.append(f"model {model}: no controller is surely better than {choice.default}{kept}")
        else:
            why = (
                f"calibrate: {choice.advantage:+.2f} points of AFS over {choice.default}, cross-validated over "
                f"{choice.questions} questions; at least {choice.bound:+.2f} after shrinkage ({choice.confidence:.0%})"
            )
            by = ChangeCause(who, why, datetime.now(UTC))
            if choice.digest in registry.digests():
                registry.promote(choice.digest, RolloutStage.CHAMPION, 0, by, model)
            else:
                card = {"headline": "built in", "report": None, "choice": asdict(choice)}
                registry.install(by_digest[choice.digest], card, RolloutStage.CHAMPION, 0, by, model)
            lines.append(f"model {model}: {choice.controller} is champion, in place of {choice.default}")
    return lines


def _choices(calibrations: Calibrations) -> Table:
    (default, confidence), *_ = {
        (each.choice.default, each.choice.confidence) for each in calibrations.values() if each.choice is not None
    }
    table = Table(title=f"controller of each model; the default is {default}", title_justify="left")
    for heading in ("model", "chosen", "AFS gain, held out", "shrunk", f"at least ({confidence:.0%})", "questions"):
        table.add_column(heading, justify="left" if heading in ("model", "chosen") else "right")
    for model, calibration in calibrations.items():
        if (choice := calibration.choice) is not None:
            error = "" if choice.error is None else f" ± {choice.error:.2f}"
            add_plain_row(
                table,
                *(model, choice.controller, f"{choice.advantage:+.2f}{error}", f"{choice.shrunk:+.2f}"),
                *(f"{choice.bound:+.2f}", str(choice.questions)),
            )
    return table


def _print_comparison(
    console: Console, gains: Mapping[str, ModelGains], specs: Sequence[Spec], confidence: float
) -> None:
    """Print the cross-validated AFS of a controller for each model, less that of one controller for all models."""
    comparison = compare_choices(gains, confidence)
    names = [spec.name for spec in specs]
    table = Table(
        title="a controller for each model against one for all, AFS on unseen questions with 95 % intervals",
        title_justify="left",
    )
    for heading in ("model", f"over the default, {names[0]}", "over the best one for all", "chosen in folds"):
        table.add_column(heading, justify="right" if heading.startswith("over") else "left")
    for model, both in comparison.models.items():
        add_plain_row(table, model, *map(_shown, both), _counted(comparison.chosen[model], names))
    means = (comparison.over_default, comparison.over_single)
    singles = f"one for all: {_counted(comparison.singles, names)}"
    add_plain_row(table, "mean of models", *map(_shown, means), singles, style="bold")
    worst = [min((both[at] for both in comparison.models.values()), key=lambda each: each.mean) for at in (0, 1)]
    add_plain_row(table, "worst model", *map(_shown, worst), "", style="bold")
    console.print(table)


def _shown(advantage: Advantage) -> str:
    between = _between(advantage.low, advantage.high, "+.2f") if math.isfinite(advantage.low) else ""
    return f"{advantage.mean:+.2f} {between}"


def _counted(chosen: Sequence[int | None], names: Sequence[str]) -> str:
    """Return how often each controller was chosen; None stands for the first of `names`, the default."""
    picked = [names[0 if candidate is None else 1 + candidate] for candidate in chosen]
    return ", ".join(f"{picked.count(name)} {name}" for name in dict.fromkeys(picked))


def _table(controller: str, calibrations: Calibrations) -> Table:
    table = Table(title=f"{controller}: accuracy % and tokens, 95 % intervals over questions", title_justify="left")
    for heading in ("model", "β", "accuracy", "tokens", "worth it"):
        table.add_column(heading, justify="right" if heading in ("β", "accuracy", "tokens") else "left")
    for model, calibration in calibrations.items():
        controller_calibration = calibration.of_name(controller)
        if controller_calibration is None:
            continue
        advice = (
            controller_calibration.advice
            if controller_calibration.map.arm is Arm.CONTROLLER
            else f"[yellow]{controller_calibration.advice}[/yellow]"
        )
        table.add_row(
            model,
            "mean chain",
            f"{controller_calibration.single.accuracy:.1f}",
            f"{controller_calibration.single.tokens:,.0f}",
            advice,
        )
        for point in controller_calibration.points:
            accuracy = f"{point.accuracy:.1f} {_between(point.low, point.high, '.1f')}"
            tokens = f"{point.tokens:,.0f} {_between(point.tokens_low, point.tokens_high, ',.0f')}"
            table.add_row("", f"{point.beta:g}", accuracy, tokens)
    return table


def _reliability_table(calibrations: Calibrations) -> Table:
    """Return how often answers are right by agreement and confidence, for the controller chosen for each model."""
    table = Table(title="share of right answers by agreement and confidence, 95 % intervals", title_justify="left")
    for heading in ("model", "figure", "range", "mean", "right", "episodes", "questions"):
        table.add_column(heading, justify="left" if heading in ("model", "figure") else "right")
    for model, first in calibrations.items():
        calibration = first if first.choice is None else first.of_name(first.choice.controller)
        votes = None if calibration is None else calibration.reliability
        if calibration is None or votes is None:
            add_plain_row(table, model, "no episode had two votes", *[""] * 5)
            continue
        name = f"{model}, {calibration.controller}"
        for figure, reliability in (("agreement", votes.agreement), ("confidence", votes.confidence)):
            for each in reliability.bins:
                right = f"{each.accuracy:.1f} {_between(each.low, each.high, '.1f')}"
                span, counts = f"{each.start:g} to {each.end:g}", (f"{each.episodes:,}", str(each.questions))
                add_plain_row(table, name, figure, span, f"{each.predicted:.1f}", right, *counts)
                name = ""
            add_plain_row(
                table, "", f"{figure}: expected calibration error", "", "", f"{reliability.error:.1f}", "", ""
            )
        add_plain_row(table, "", "left out: a single vote", "", "", "", f"{votes.single_votes:,}", "")
    return table


def _between(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"({low:{form}} to {high:{form}})"
