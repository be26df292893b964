"""Keys of requests for routing: requests whose prompts begin alike get the same key, and so share a prefix cache.

The key of a conversation is its beginning up to the user's first message. It stays the same in all later turns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final

from proxy.requests.generation_request import GenerationRequest

HEAD_CHARS: Final = 4096
"""Number of characters of a text prompt, and of a request that has no prompt, that make up its key."""
HEAD_TOKENS: Final = 1024
"""Number of token ids of a prompt that make up its key."""
MAX_MESSAGES_BYTES: Final = 256 * 2**10
"""Maximum bytes of messages that make up a key. Images may be far larger."""


def affinity_key(request: GenerationRequest, raw: bytes = b"") -> bytes:
    """Return the key of a request. `raw` is its body, which counts if the prompt has no form that is known here."""
    if messages := request.conversation:
        return _digest(_opening(messages))
    if request.prompt_ids is not None:
        return _digest(json.dumps(request.prompt_ids[:HEAD_TOKENS]).encode())
    if request.prompt_text is not None:
        return _digest(request.prompt_text[:HEAD_CHARS].encode(errors="replace"))
    return body_key(raw)


def body_key(raw: bytes) -> bytes:
    """Return the key of a request whose fields are unknown, by its body."""
    return _digest(raw[:HEAD_CHARS])


def _opening(messages: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the messages up to the first of the user as JSON."""
    roles = [message.get("role") for message in messages]
    end = roles.index("user") + 1 if "user" in roles else 1
    return json.dumps(messages[:end], sort_keys=True).encode()[:MAX_MESSAGES_BYTES]


def _digest(head: bytes) -> bytes:
    return blake2b(head, digest_size=16).digest()
