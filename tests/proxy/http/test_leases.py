"""Callbacks at the end of a request run once each, in reverse order, whatever fails."""

from __future__ import annotations

import pytest

from proxy.http.leases import Leases


def test_callbacks_run_once_and_in_reverse_order() -> None:
    ran: list[int] = []
    with Leases() as leases:
        for number in range(3):
            leases.callback(lambda number=number: ran.append(number))  # type: ignore[misc]
        assert ran == []
    leases.close()
    assert ran == [2, 1, 0]


def test_an_error_of_a_callback_is_raised_after_the_others_have_run() -> None:
    ran: list[str] = []

    def fail() -> None:
        raise ValueError("failed")

    leases = Leases()
    for callback in (lambda: ran.append("first"), fail, lambda: ran.append("last")):
        leases.callback(callback)
    with pytest.raises(ValueError, match="failed"):
        leases.close()
    assert ran == ["last", "first"]


def test_an_error_of_the_request_is_raised_after_the_callbacks() -> None:
    ran: list[str] = []

    def serve() -> None:
        with Leases() as leases:
            leases.callback(lambda: ran.append("ran"))
            raise KeyError

    with pytest.raises(KeyError):
        serve()
    assert ran == ["ran"]
