"""Report of a loop: one HTML page with every figure and its interval, which needs no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from discovery.data.atomic_files import atomic_write
from discovery.promotion.verdict import GateReport, GateVerdict
from proxy.commands.loop.live_requests import LiveEstimate
from proxy.commands.loop.measurements import RIVALS
from proxy.commands.loop.stages import LoopStages

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Discovery loop</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1e293b }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .25rem .75rem; border-bottom: 1px solid #cbd5e1 }}
td {{ text-align: right }} td:first-child, th {{ text-align: left }}
svg {{ max-width: 100%; height: auto }}
</style></head><body>
{body}
</body></html>
"""


def write_report(stages: LoopStages) -> list[str]:
    """Write `report.html` into the loop's folder and return the summary, a sentence a line. Raises FileWriteError."""
    summary = summarise(stages)
    with atomic_write(stages.folder / "report.html") as file:
        file.write(_page(stages, summary).encode())
    return summary


def summarise(stages: LoopStages) -> list[str]:
    """Return what the loop has shown, a sentence a line."""
    progress, lines = stages.progress, []
    finding, measured = progress.get("discover"), progress.get("measure")
    lines.append(f"The search tried {finding['candidates']} candidates and chose {finding['name']}.")
    for report in stages.verdicts():
        lines.append(_verdict_text(report))
    target = measured["self_consistency"]
    tokens = measured["tokens_at_its_accuracy"][finding["name"]]
    reached = (
        f"{finding['name']} does not reach the accuracy of self-consistency at β = 1 ({target['accuracy']:.1f} %)."
        if tokens is None
        else f"{finding['name']} reaches the accuracy of self-consistency at β = 1 ({target['accuracy']:.1f} %) with "
        f"{100 * tokens / target['tokens']:.0f} % of its tokens."
    )
    lines.append(reached)
    rollout = progress.get("rollout")
    if not rollout["promoted"]:
        lines.append("It was not rolled out, because the gate did not promote it against every champion.")
        return lines
    if not stages.is_promoted():
        lines.append("It was rolled out by --force, although the gate did not promote it against every champion.")
    before, after = progress.get("before"), rollout
    lines.append(
        f"Live, {stages.plan.requests} fresh questions at β = {stages.plan.beta:g}: accuracy "
        f"{before['accuracy'][0]:.1f} → {after['accuracy'][0]:.1f} %, tokens {before['tokens'][0]:,.0f} → "
        f"{after['tokens'][0]:,.0f}."
    )
    outcomes = live_outcomes(stages)
    lines.append(
        f"With 95 % confidence, all {len(outcomes)} predicted intervals hold at once."
        if measured.get("predicted_jointly")
        else f"Each of the {len(outcomes)} predicted intervals holds with 95 % confidence, but not all at once."
    )
    for name, live in outcomes:
        predicted = LiveEstimate(*measured["predictions"][name])
        inside = "inside" if predicted.contains(live) else "OUTSIDE"
        lines.append(f"{name}: {live:,.1f} live, predicted {predicted.low:,.1f} to {predicted.high:,.1f} ({inside}).")
    back = progress.get("rollback")
    lines.append(
        f"After the rollback {', '.join(back['serving'])} serves."
        if back["rolled_back"]
        else f"The rollback did not take effect: {', '.join(back['serving'])} serves."
    )
    return lines


def live_outcomes(stages: LoopStages) -> list[tuple[str, float]]:
    """Return the live figures by the names of their predictions."""
    before, after = stages.progress.get("before"), stages.progress.get("rollout")
    return [
        ("accuracy before", before["accuracy"][0]),
        ("accuracy after", after["accuracy"][0]),
        ("accuracy gained", after["accuracy"][0] - before["accuracy"][0]),
        ("tokens before", before["tokens"][0]),
        ("tokens after", after["tokens"][0]),
        ("tokens added", after["tokens"][0] - before["tokens"][0]),
    ]


def _verdict_text(report: GateReport) -> str:
    interval = "" if report.interval is None else f" (95 %: {report.interval[0]:+.2f} to {report.interval[1]:+.2f})"
    text = (
        f"Gate against {report.champion}: {report.verdict}; ΔAFS {report.delta_afs:+.2f} points{interval}, "
        f"p = {report.p:.2g} at level {report.alpha:.2g}, {report.questions} questions."
    )
    if report.verdict is GateVerdict.UNDECIDED:
        detectable = "no gain" if report.mde is None else f"a gain of {report.mde:.2f} points"
        text += f" So many questions detect {detectable} reliably; record more with --held-out."
        if report.more is not None:
            text += f" If the observed gain is real, about {report.more:,} more questions would decide."
    for condition in report.failed:
        text += f" Not met: {condition.name} ({condition.words})."
    return text


def _page(stages: LoopStages, summary: Sequence[str]) -> str:
    measured, finding = stages.progress.get("measure"), stages.progress.get("discover")
    picture = (stages.folder / "frontier.svg").read_text()
    points = [
        (
            point["controller"],
            f"{point['beta']:g}",
            f"{point['tokens']:,.0f}",
            f"{point['accuracy']:.1f}",
            f"{point['low']:.1f} to {point['high']:.1f}",
            f"{point['path_p95']:,.0f}",
        )
        for point in measured["points"]
    ]
    target = measured["self_consistency"]
    shares = [
        (name, "not reached" if tokens is None else f"{tokens:,.0f}", "" if tokens is None else _share(tokens, target))
        for name in (*RIVALS, finding["name"])
        for tokens in [measured["tokens_at_its_accuracy"][name]]
    ]
    plan = [(name.replace("_", " "), f"{value:g}") for name, value in asdict(stages.plan).items()]
    return _PAGE.format(
        body="\n".join(
            [
                "<h1>Discovery loop on the embedded model</h1>",
                "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in summary) + "</ul>",
                "<h2>Accuracy over tokens, held-out questions</h2>",
                picture[picture.index("<svg") :],
                _table(("controller", "β", "tokens", "accuracy %", "95 % interval", "path p95"), points),
                f"<h2>Tokens for the accuracy of self-consistency at β = 1 ({target['accuracy']:.1f} %)</h2>",
                _table(("controller", "tokens", "share of its tokens"), shares),
                *(_gate_section(report) for report in stages.verdicts()),
                "<h2>Size of the loop</h2>",
                _table(("", ""), plan),
            ]
        )
    )


def _share(tokens: float, target: dict[str, Any]) -> str:
    return f"{100 * tokens / target['tokens']:.0f} %"


def _gate_section(report: GateReport) -> str:
    rows = [(condition.name, "yes" if condition.held else "no", condition.words) for condition in report.conditions]
    verdict = f"<h2>Gate against {escape(report.champion)}: {report.verdict}</h2>"
    return f"{verdict}<p>{escape(_verdict_text(report))}</p>{_table(('condition', 'met', 'result'), rows)}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
