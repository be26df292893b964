"""Agreement of a reply: what the request asks for, and the fields and metrics that say whether the reply has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controllers import State
from controllers.voting import agreement, lead_probability
from proxy.errors import BadRequest
from proxy.requests.generation_request import TtsOptions
from proxy.settings import Settings
from proxy.types import AgreementRule, EffectiveBeta, Otherwise


def agreement_rule(options: TtsOptions, settings: Settings, beta: EffectiveBeta) -> AgreementRule | None:
    """Return the agreement that a request asks for, or None. Raises BadRequest for options without effect."""
    minimum = settings.min_agreement if options.min_agreement is None else options.min_agreement
    if minimum is None:
        for name in ("otherwise", "escalate_beta"):
            if getattr(options, name) is not None:
                message = f"tts.{name} has no effect without tts.min_agreement; set that too, or leave tts.{name} out"
                raise BadRequest(message, param=f"tts.{name}")
    asked = beta.value if beta.requested is None else beta.requested
    if options.escalate_beta is not None and options.escalate_beta < asked:
        raise BadRequest(
            f"tts.escalate_beta is {options.escalate_beta:g}, but the request already has β = {asked:g}; raise "
            "tts.escalate_beta, or leave it out",
            param="tts.escalate_beta",
        )
    if not minimum:
        return None
    otherwise = options.otherwise or settings.otherwise
    larger = settings.escalate_beta if options.escalate_beta is None else options.escalate_beta
    larger = beta.shrunk_alike(larger)
    escalates = otherwise is Otherwise.ESCALATE and larger > beta.value
    return AgreementRule(minimum, otherwise, larger if escalates else None)


def agreement_fields(
    state: State, answer: int | None, rule: AgreementRule | None, escalated_beta: float | None
) -> dict[str, Any]:
    """Return the fields of the `tts` object on the votes of an ended episode.

    `answer` is the label of the reply. `escalated_beta` is the β at which it continued, or None.
    """
    votes = state.deciding_votes()
    share = agreement(votes, answer)
    fields: dict[str, Any] = {"agreement": share, "confidence": lead_probability(votes, answer)}
    if rule is not None:
        fields["min_agreement"] = rule.minimum
        fields["flagged"] = rule.otherwise is not Otherwise.ANSWER and not rule.is_met(share)
    if escalated_beta is not None:
        fields["escalated_beta"] = escalated_beta
    return fields


def agreement_headers(tts: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers for the fields that `agreement_fields` added to a `tts` object."""
    headers = {f"x-tts-{name}": f"{tts[name]:.4g}" for name in ("agreement", "confidence") if tts[name] is not None}
    if tts.get("flagged"):
        headers["x-tts-flagged"] = "true"
    if "escalated_beta" in tts:
        headers["x-tts-escalated-beta"] = f"{tts['escalated_beta']:g}"
    return headers


def low_agreement_outcome(rule: AgreementRule, tts: Mapping[str, Any]) -> str | None:
    """Return what became of a reply whose first agreement was too low, as a metric label; None if it was not."""
    is_escalated = "escalated_beta" in tts
    if rule.is_met(tts["agreement"]):
        return "escalated" if is_escalated else None
    if rule.otherwise is Otherwise.ANSWER:
        return "answered"
    return "escalated_flagged" if is_escalated else "flagged"
