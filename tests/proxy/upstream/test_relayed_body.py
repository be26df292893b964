"""A body that is passed through knows whether the upstream may have worked on it, over several attempts."""

from __future__ import annotations

import pytest

from proxy.upstream.relayed_body import RelayedBody

UNSENT, REFUSED, LOST, UNDER_WAY = "no connection", "status 503", "connection broke", "no response yet"


@pytest.mark.parametrize(
    ("attempts", "is_sent"),
    [
        ([], False),
        ([UNSENT], False),
        ([REFUSED, UNSENT], False),
        ([UNDER_WAY], True),
        ([REFUSED, UNSENT, UNDER_WAY], True),
        ([LOST, UNSENT], True),
        ([LOST, REFUSED, UNSENT], True),
    ],
)
def test_a_body_is_sent_if_the_upstream_may_have_worked_for_an_attempt(attempts: list[str], is_sent: bool) -> None:
    body = RelayedBody(b"{}")
    for attempt in attempts:
        if attempt != UNSENT:
            assert body.encode() == b"{}"
            assert body.is_sent
        if attempt != UNDER_WAY:
            body.note_failure(is_unprocessed=attempt != LOST)
    assert body.is_sent is is_sent
