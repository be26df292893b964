"""A tiny reasoning model, trained from scratch by this repository, served by vLLM for CPU."""

from __future__ import annotations

from typing import Final

SERVED_MODEL_NAME: Final = "autotts-tiny"
"""Name under which it is served."""
