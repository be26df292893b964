"""Output of `autotts gate --plan`: a table of questions and branches, and the cheapest choice."""

from __future__ import annotations

from typing import Final

from rich.markup import escape
from rich.table import Table

from discovery.commands.console import wide_console
from discovery.promotion.power_plan import LIMITED, QUESTION_COUNTS, PlanRow, PowerPlan

NO_VARIANCE: Final = (
    "no variance between questions is left after that of branches and orders, so the table is rough: more --shuffles "
    "or questions estimate it better"
)


def show_plan(plan: PowerPlan) -> None:
    """Print a plan."""
    console = wide_console()
    console.print(_table(plan))
    for line in _lines(plan):
        console.print(line, highlight=False, markup=False)


def _table(plan: PowerPlan) -> Table:
    title = (
        f"{plan.finalist} against {plan.champion}: gain in points of AFS that is found with {plan.power:.0%} power at "
        f"α = {plan.alpha:.4f} (finalist {plan.k})"
    )
    table = Table(title=escape(title), title_justify="left")
    table.add_column("branches per question", justify="right")
    table.add_column("limited", justify="right")
    for count in QUESTION_COUNTS:
        table.add_column(f"{count} questions", justify="right")
    table.add_column(f"questions for {plan.gain:g}", justify="right")
    table.add_column("tokens to collect", justify="right")
    for row in plan.rows:
        table.add_row(
            f"{row.branches}{' *' if row == plan.recommended else ''}",
            "?" if row.limited is None else f"{row.limited:.0%}",
            *(f"{gain:.2f}" for gain in row.detectable),
            "too many" if row.questions is None else f"{row.questions:,}",
            "" if row.tokens is None else f"{row.tokens:,}",
        )
    return table


def _lines(plan: PowerPlan) -> list[str]:
    parts = plan.variance
    lines = [
        f"measured on {plan.measured_questions} questions of the search and validation splits with "
        f"{plan.measured_branches} branches in {plan.measured_orders} orders; gain there: {plan.observed_gain:+.2f}",
        f"planned for a judgement with {plan.orders.single} orders of the branches",
        f"standard deviation of a question's gain: {parts.between**0.5:.1f} between questions, "
        f"{(parts.within / plan.measured_branches) ** 0.5:.1f} with the mean over {plan.measured_branches} branches, "
        f"{(parts.by_order / plan.orders.single) ** 0.5:.1f} with that over {plan.orders.single} orders",
        *([NO_VARIANCE] if parts.between == 0 else []),
        "limited: episodes that open all branches and might open more, at the β with the most (?: not recorded); "
        f"up to {LIMITED:.0%} is recommended",
    ]
    best = plan.recommended
    if best is None or best.questions is None or best.tokens is None:
        return [*lines, f"no number of questions finds a gain of {plan.gain:g} points"]
    text = f"* cheapest: {best.questions:,} questions with {best.branches} branches each, {best.tokens:,} tokens"
    if best.limited is not None and best.limited > LIMITED:
        lines.append(_describe_limit(plan, best))
    if plan.interval is not None:
        text += f" (90 % in [{plan.interval[0]:,}, {plan.interval[1]:,}] questions, as the variance is estimated)"
    lines.append(text)
    if plan.sequential is not None:
        lines.append(
            f"a sequential judgement with {plan.orders.sequential} orders finds that gain after {plan.sequential:,} "
            "questions in half of the cases"
        )
    return lines


def _describe_limit(plan: PowerPlan, best: PlanRow) -> str:
    """Say why it is not known whether the recommended branches are enough."""
    if best.branches < plan.max_branches:
        return f"{best.branches} branches are too few for these controllers, and no more are recorded"
    return (
        f"{best.limited:.0%} of the episodes open all {plan.max_branches} branches that --max-branches allows; that is "
        f"enough only if requests may not open more either (AUTOTTS_MAX_BRANCHES={plan.max_branches})"
    )
