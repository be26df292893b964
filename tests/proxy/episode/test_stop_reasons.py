"""The stop reason of a request without a reply says why there is none."""

from __future__ import annotations

import pytest

from controllers import Limits, State, Stop
from proxy.episode.run import _stop_reason


@pytest.mark.parametrize(
    ("stop", "outcome", "reason"),
    [
        (None, "disconnected", "disconnected"),
        (Stop.ANSWERED, "disconnected", "disconnected"),
        (Stop.DEADLINE, "disconnected", "disconnected"),
        (Stop.UPSTREAM_ERROR, "draining", "draining"),
        (None, "failed", "failed"),
        (Stop.ANSWERED, "failed", "failed"),
        (Stop.MAX_TOKENS, "failed", "failed"),
        (Stop.DEADLINE, "failed", "deadline"),
        (Stop.CONTROLLER_ERROR, "failed", "controller_error"),
        (Stop.UPSTREAM_ERROR, "failed", "upstream_error"),
    ],
)
def test_a_request_without_a_reply_ends_for_what_prevented_it(stop: Stop | None, outcome: str, reason: str) -> None:
    state = State(Limits(10))
    state.stop = stop
    assert _stop_reason(state, None, outcome) == reason
