"""Format of an endpoint: how its request is read, and how a reply is written whole and as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, NamedTuple

from proxy.api.formats.prompt_batch import Batch
from proxy.requests.generation_request import GenerationRequest
from proxy.types import Plan, Reply

EpisodeNews = AsyncGenerator[str | Reply | None]
"""Lines of progress of one episode, None where a ping is due, and the reply last."""


class PromptNews(NamedTuple):
    """Progress or the reply of one prompt of several."""

    prompt: int  # its index in the request
    content: str | Reply


BatchNews = AsyncGenerator[PromptNews | Batch | None]
"""Progress and replies of several prompts, None where a ping is due, and the whole batch last."""


class Format(NamedTuple):
    """Format of one endpoint."""

    model: type[GenerationRequest]  # of the request
    prefix: str  # of ids of responses
    to_json: Callable[[Any, Reply], Mapping[str, Any]]  # the whole response to a request
    stream: Callable[[Any, Plan, EpisodeNews], AsyncGenerator[bytes]]  # the response as server-sent events
