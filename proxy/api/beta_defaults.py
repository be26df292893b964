"""β of requests that leave it open: the operator's default, a token target, and where β does not pay."""

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

    def __init__(self, default: float | None, calibrations: Calibrations, champion: Callable[[], Spec]) -> None:
        self.calibrations = calibrations
        self._default = default
        self._champion = champion  # returns the controller that serves requests which name none

    def default_for(self, model: str) -> float | None:
        """Return β of requests that set none: the operator's, capped at the calibration's largest useful β."""
        return None if self._default is None else min(self._default, self._map(model).cap)

    def beta_for_tokens(self, model: str, options: TtsOptions) -> float:
        """Return the β that spends `options.target_tokens` on average.

        Raises BadRequest if the model or its controller was never calibrated.
        """
        first, champion, name = self.calibrations.get(model), self._champion(), options.controller
        if first is None:
            reason = f"there is no calibration for model {model!r}"
        elif calibration := first.of_digest(champion.digest) if name is None else first.of_name(name):
            return calibration.beta_for(options.target_tokens or 0)
        else:
            calibrated = ", ".join(known.controller for known in first.all)
            served = f"and {champion.name} serves" if name is None else f"not {name}"
            reason = f"model {model!r} was calibrated for {calibrated}, {served}"
        raise BadRequest(f"{reason}; set tts.beta instead", param="tts.target_tokens", code="no_calibration")

    def is_single(self, dial: EffectiveBeta, request: GenerationRequest, model: Model) -> bool:
        """Return whether one branch serves: the client wants no thought, or β does not pay on this model."""
        if dial.source is BetaSource.EFFORT and request.effort == NO_EFFORT:
            return True
        return not dial.is_from_client and self._map(model.id).arm is Arm.SINGLE

    def _map(self, model: str) -> BetaMap:
        """Return how β is best used on a model with the champion, as far as it was calibrated."""
        first = self.calibrations.get(model)
        calibration = None if first is None else first.of_digest(self._champion().digest)
        return FULL_RANGE if calibration is None else calibration.map
