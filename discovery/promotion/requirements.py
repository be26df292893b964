"""Requirements of a promotion: what a card or the gate's report on a controller must show. `--force` waives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from controllers.loading import Spec
from discovery.data.recordings import Split
from discovery.errors import PromotionError
from discovery.promotion.registry import Card, judged_splits

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
        raise PromotionError(
            f"{card['name']} passed the gate on model {' and '.join(judged)} only, not on "
            f"{'all models' if model is None else model}; give --model, or run the gate there, or use --force"
        )


def judged_models(report: Any) -> list[str]:
    """Return the one model that a report is about; empty if it is about all models."""
    return [report["model"]] if isinstance(report, Mapping) and report.get("model") else []
