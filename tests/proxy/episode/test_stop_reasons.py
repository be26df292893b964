"""The stop reason of a request without a reply says why there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from controllers import Limits, State, Stop
from proxy.episode import run
from proxy.episode.reply import deadline_error
from proxy.episode.run import _stop_reason
from proxy.errors import DeadlinePassed


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


async def test_a_deadline_while_the_reply_is_composed_is_no_failure_of_the_upstream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def late(*_: object) -> object:
        raise deadline_error()

    monkeypatch.setattr(run, "compose_reply", late)
    state = State(Limits(10))
    state.stop = Stop.ANSWERED
    runner: Any = SimpleNamespace(fallback=None, escalated_beta=None)
    plan: Any = SimpleNamespace(remaining_s=None)
    environment: Any = SimpleNamespace(branches=[object()])
    with pytest.raises(DeadlinePassed):
        await run._compose(runner, plan, environment, state, None, [])
    assert state.stop is Stop.DEADLINE
