"""Body of a request that is passed through, which knows whether the upstream may have worked on it."""

from __future__ import annotations


class RelayedBody:
    """Body of a request that is passed through, for one or several attempts to send it."""

    __slots__ = ("_content", "is_lost", "is_sent")

    def __init__(self, content: bytes) -> None:
        self.is_sent = False  # whether the upstream may have generated tokens for an attempt
        self._content = content
        self.is_lost = False  # whether it may have for an earlier attempt, which failed

    def encode(self) -> bytes:
        """Return the body for an attempt, which is sent now."""
        self.is_sent = True
        return self._content

    def note_failure(self, *, is_unprocessed: bool) -> None:
        """Note that an attempt failed. If it `is_unprocessed`, the upstream did no work for it."""
        self.is_lost = self.is_lost or (self.is_sent and not is_unprocessed)
        self.is_sent = self.is_lost
