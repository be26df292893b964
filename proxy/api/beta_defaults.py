"""β of requests that do not set it: the operator's default, token targets, and models on which β does not pay."""

from __future__ import annotations

from collections.abc import Callable

from controllers.loading import Spec
from discovery.evaluation.calibration import FULL_RANGE, Arm, BetaMap, Calibrations
from proxy.errors import BadRequest
from proxy.requests.beta import NO_EFFORT
from proxy.requests.generation_request import GenerationRequest, TtsOptions
from proxy.types import BetaSource, EffectiveBeta, Model


class BetaDefaults:
    """Apply the operator's β and the calibrations to requests."""

    def __init__(self, default: float | None, calibrations: Calibrations, champion: Callable[[str], Spec]) -> None:
        self.calibrations = calibrations
        self._default = default
        self._champion = champion  # returns the champion of a model

    def default_for(self, model: str, own: float | None = None) -> float | None:
        """Return the β of requests that set none, capped at the largest useful β of the calibration.

        It is the `own` one of the caller's key, or else the operator's.
        """
        default = self._default if own is None else own
        return None if default is None else min(default, self._map(model).cap)

    def beta_for_tokens(self, model: str, options: TtsOptions) -> float:
        """Return the β at which requests cost `options.target_tokens` on average.

        Raises BadRequest if there is no calibration of the model with the request's controller.
        """
        first, champion, name = self.calibrations.get(model), self._champion(model), options.controller
        if first is None:
            reason = f"there is no calibration for model {model!r}"
        elif calibration := first.of_digest(champion.digest) if name is None else first.of_name(name):
            return calibration.beta_for(options.target_tokens or 0)
        else:
            calibrated = ", ".join(each.controller for each in first.all)
            wanted = f"but {champion.name} serves this request" if name is None else f"not {name}"
            reason = f"model {model!r} was calibrated for {calibrated}, {wanted}"
        raise BadRequest(
            f"{reason}; set tts.beta instead, and tts.max_total_tokens to limit the tokens of a request",
            param="tts.target_tokens",
            code="no_calibration",
        )

    def is_single(self, beta: EffectiveBeta, request: GenerationRequest, model: Model) -> bool:
        """Return whether to generate one branch only: the client wants no reasoning, or β does not pay on the model."""
        if beta.source is BetaSource.EFFORT and request.effort == NO_EFFORT:
            return True
        return not beta.is_from_client and self._map(model.id).arm is Arm.SINGLE

    def _map(self, model: str) -> BetaMap:
        """Return the useful range of β on a model with its champion; the full range if it was not calibrated."""
        first = self.calibrations.get(model)
        calibration = None if first is None else first.of_digest(self._champion(model).digest)
        return FULL_RANGE if calibration is None else calibration.map
