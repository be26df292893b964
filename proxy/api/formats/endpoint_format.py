"""Format of an endpoint: the model of its requests, and its replies as JSON and as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, NamedTuple

from proxy.api.formats.prompt_batch import Batch
from proxy.requests.generation_request import GenerationRequest
from proxy.types import Plan, Reply

RoundNews = str | Mapping[str, Any]
"""Progress after a round: a line to send as reasoning, or an object to send as it is."""
EpisodeNews = AsyncGenerator[RoundNews | Reply | None]
"""Yields the progress of one episode, None when a ping is due, and finally the reply."""


class PromptNews(NamedTuple):
    """Progress or the reply of one prompt in a batch."""

    prompt: int  # its index in the request
    content: RoundNews | Reply


BatchNews = AsyncGenerator[PromptNews | Batch | None]
"""Yields progress and replies of several prompts, None when a ping is due, and finally the batch."""


class Format(NamedTuple):
    """Format of one endpoint."""

    model: type[GenerationRequest]  # of the request
    prefix: str  # of response ids
    to_json: Callable[[Any, Reply], Mapping[str, Any]]  # returns the response to a request as JSON
    stream: Callable[[Any, Plan, EpisodeNews], AsyncGenerator[bytes]]  # yields the response as server-sent events
