"""Requirements of a promotion: what a card or the gate's report on a controller must show. `--force` waives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from controllers.loading import Spec
from discovery.data.recordings import Split
from discovery.errors import PromotionError
from discovery.promotion.registry import judged_splits
from discovery.promotion.storage.cards import Card

PASSED: Final = "promote"
"""The verdict a report must have for a promotion."""


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
    check_held_out_report(spec.name, report)


def check_held_out_report(name: str, report: Any) -> None:
    """Raise PromotionError unless all questions of a report were held out."""
    splits = judged_splits(report)
    if splits != [Split.HELD_OUT]:
        raise PromotionError(
            f"{name}: the gate's report is about questions of the {' and '.join(splits)} split, which searches may "
            "see; run the gate on held-out questions, or use --force"
        )


def check_installed(card: Card, model: str | None) -> None:
    """Raise PromotionError if an installed controller was not forced and has not passed the gate for the model."""
    if card.get("report") is not None and not card.get("forced"):
        check_held_out_report(card["name"], card["report"])
    check_models(card, model)


def check_models(card: Card, model: str | None) -> None:
    """Raise PromotionError if the controller passed the gate on other models only."""
    judged = card.get("models")
    if judged and model not in judged:
        left_out = left_out_by(card.get("report"))
        way_out = (
            "run the gate without --models and --benchmarks" if left_out and model is None else "run the gate there"
        )
        raise PromotionError(
            f"{card['name']} passed the gate on model {' and '.join(judged)} only, not on "
            f"{'all models' if model is None else model}{f' ({left_out})' if left_out else ''}; give --model, or "
            f"{way_out}, or use --force"
        )


def judged_models(report: Any) -> list[str]:
    """Return the models that a report is about; empty if it is about all models.

    A report on a selection of the recorded models or benchmarks is about the models that were judged.
    """
    if not isinstance(report, Mapping):
        return []
    if report.get("model"):
        return [report["model"]]
    return sorted({cell["model"] for cell in report["cells"]}) if left_out_by(report) else []


def left_out_by(report: Any) -> str:
    """Describe which recorded models or benchmarks a report on all models leaves out; empty if it leaves out none.

    A sequence takes one benchmark only, so there the others are not missing.
    """
    if not isinstance(report, Mapping) or report.get("model"):
        return ""
    names = ["models_left_out"] if report.get("sequence") else ["models_left_out", "benchmarks_left_out"]
    return "; ".join(f"{name}: {', '.join(report[name])}" for name in names if report.get(name))
