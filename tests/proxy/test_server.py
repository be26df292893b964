"""Ports that the server cannot listen on."""

from __future__ import annotations

import socket

import pytest

from proxy.errors import StartError
from proxy.server import listen


class RefusingSocket(socket.socket):
    """Socket whose port needs rights that this user lacks."""

    def bind(self, _: object) -> None:
        """Refuse the address."""
        raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(("port", "is_privileged"), [(80, True), (1024, False)])
def test_a_port_that_needs_the_rights_of_root_is_refused_with_the_way_out(
    port: int, is_privileged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", RefusingSocket)
    with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: Permission denied") as caught:
        listen("127.0.0.1", port)
    assert ("; ports below 1024 need root; use --port" in str(caught.value)) is is_privileged
