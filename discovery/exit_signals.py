"""Signals that end a command in order."""

from __future__ import annotations

import signal


def exit_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that a service manager or a closed terminal sends.

    SIGHUP is left out if it is ignored, so that `nohup` keeps its meaning.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if is_ignored else (signal.SIGTERM, signal.SIGHUP)
