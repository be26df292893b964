"""Requests to the proxy for recorded branches of one question, and how its failures are classified."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import openai
from openai.types.chat import ChatCompletion

from discovery.data.collection_file import CollectionFile, branch_cost
from discovery.data.collection_plan import CollectionPlan
from discovery.data.importers import RecordingLine, parse_recording_line
from discovery.data.questions import Question
from discovery.data.recordings import Origin
from discovery.errors import BadRecording, CollectError

CONTROLLER: Final = "everything"
CONNECT_S: Final = 10.0
BRANCH_TIMEOUT_S: Final = 6 * 3600.0
"""Seconds without any response after which a branch is given up."""
ADMIN_KEY_VARIABLE: Final = "AUTOTTS_ADMIN_KEY"
"""Environment variable that holds the proxy's admin key."""
RETRYABLE: Final = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})
"""Client errors that may not recur, as all statuses from 500 on."""
QUESTION_ERRORS: Final = frozenset(
    {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
)
"""Client errors that are about the question."""
UNSENT: Final = frozenset({"ConnectError", "ConnectTimeout"})
"""Names of the httpx errors of a request that was not sent. By name, because newer `openai` versions use httpx2."""
UPSTREAM_ERROR: Final = "upstream_error"
_DECIMAL: Final = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6})?", re.ASCII)


class FailedRequest(NamedTuple):
    """A request that failed. Trying again may help."""

    message: str
    wait_s: float | None = None  # as the proxy asks
    tokens: int = 0  # cost of the failure; the request's cap if it is unknown
    is_away: bool = False  # the proxy or its upstream may be unavailable for a while
    is_about_question: bool = False  # the question causes it: it will fail again


class ProxyReply(NamedTuple):
    """Reply of the proxy to a request."""

    model: str
    details: dict[str, Any]  # its member `tts`


Send = Callable[[dict[str, Any], int | None], Awaitable[ProxyReply | FailedRequest]]
"""Sends the body of a chat completion that may cost so many tokens, as `send_request` does, from here or elsewhere."""


class CollectedBatch(NamedTuple):
    """The branches that one request has recorded, and why there are not as many as it asked for."""

    lines: Sequence[RecordingLine]
    failure: FailedRequest | None = None


class CollectionClient:
    """Requests branches of questions from the proxy that `client` is connected to."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        plan: CollectionPlan,
        file: CollectionFile,
        on_lost: Callable[[int], None],
        send: Send | None = None,
    ) -> None:
        self._client = client
        self._send = send or partial(send_request, client)
        self._plan = plan
        self._file = file
        self._on_lost = on_lost  # called with tokens that were spent on an unusable reply

    async def request_branches(self, question: Question, parts: Sequence[int], cap: int | None) -> CollectedBatch:
        """Request a branch for each of `parts`. All together may cost at most `cap` tokens; None sets no limit.

        Branches are numbered by `parts` in the order in which the reply has them. A failed request may have completed
        some of its branches.

        Raises CollectError if every request would fail in the same way; its tokens are reported as lost first.
        """
        tts: dict[str, Any] = {
            "controller": f"{CONTROLLER}@{len(parts)}",
            "beta": 1,
            "answer": self._plan.answer,
            "required": True,
        }
        if cap is not None:
            tts["max_total_tokens"] = cap
        if self._plan.signals:
            tts["signals"] = True
        body = {
            "model": self._plan.model,
            "messages": list(question.messages),
            **self._plan.sampling,
            "extra_body": {"tts": tts, **question.reply_fields},
        }
        reply = await self._send(body, cap)
        if isinstance(reply, FailedRequest):
            return CollectedBatch((), reply)
        details = reply.details
        try:
            recording = details["recording"]
            branches = recording["branches"]
            if not 1 <= len(branches) <= len(parts):
                raise BadRecording(f"{len(branches)} branches, but {len(parts)} were asked for")
            lines = [
                self._line(question, part, reply.model, recording | {"branches": [branch]})
                for part, branch in zip(parts, branches, strict=False)
            ]
            self._file.check_version(lines[0].recorded().version, f"what {self._client.base_url} records")
            complete = [line for line in lines if line.branches[0].complete]
            if len(complete) == len(lines):
                return CollectedBatch(lines)
            spent = sum(branch_cost(line.recorded().branches[0]) for line in complete)
            return CollectedBatch(complete, _classify_cut(details, max(0, _total_tokens(details) - spent), cap))
        except (BadRecording, TypeError, KeyError) as error:
            self._on_lost(_total_tokens(details))
            raise CollectError(f"{self._client.base_url} replies with an invalid recording: {error}") from None
        except CollectError:
            self._on_lost(_total_tokens(details))
            raise

    async def is_ready(self) -> bool:
        """Return whether the proxy and its upstream can serve now."""
        ready = str(self._client.base_url).removesuffix("v1/") + "ready"
        try:
            await self._client.get(ready, cast_to=str, options={"timeout": CONNECT_S})
        except openai.APIStatusError as error:
            return error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR  # a server without a readiness page
        except openai.APIConnectionError:
            return False
        return True

    def _line(self, question: Question, part: int, model: str, recording: Any) -> RecordingLine:
        """Return a reply's recording, completed by the fields that the proxy does not know.

        Raises CollectError if the reply is from another model, and BadRecording, TypeError or KeyError if the recording
        is invalid.
        """
        if model != self._plan.model:
            raise CollectError(f"the proxy answers as model {model!r}; set --model {model}")
        line = {
            "question": question.text if self._plan.keep_text else None,
            "id": question.question,
            "model": model,
            "benchmark": self._plan.benchmark,
            "interval": recording["interval"],
            "branches": recording["branches"],
            "reference": question.recorded_reference,
            "split": question.split,
            "sampling": recording["sampling"] | self._plan.settings,
            "probe_template": recording["probe_template"],
            "chat_template": recording["chat_template"],
            "origin": Origin.COLLECTED,
            "part": part,
        }
        return parse_recording_line(json.dumps(line).encode())


async def send_request(client: openai.AsyncOpenAI, body: dict[str, Any], cap: int | None) -> ProxyReply | FailedRequest:
    """Send the body of a chat completion that may cost `cap` tokens; None sets no limit.

    Raises CollectError if every request would fail in the same way.
    """
    try:
        reply = await client.chat.completions.create(**body)
    except openai.APIStatusError as error:
        return _classify_status(error)
    except openai.APIConnectionError as error:
        is_unsent = type(error.__cause__).__name__ in UNSENT
        message = f"{client.base_url}: {error.__cause__ or error}"
        return FailedRequest(message, tokens=0 if is_unsent else cap or 0, is_away=True)
    except (openai.OpenAIError, ValueError) as error:
        raise CollectError(f"{client.base_url} returns no chat completion: {error}") from None
    details = (reply.model_extra or {}).get("tts") if isinstance(reply, ChatCompletion) else None
    if not isinstance(details, dict) or "recording" not in details:
        raise CollectError(
            f"{client.base_url} replies without a recording; --url must be the address of an AutoTTS proxy"
        )
    return ProxyReply(reply.model, details)


def open_client(url: str, key: str) -> openai.AsyncOpenAI:
    """Return a client of the proxy at `url`, whose admin key is `key`."""
    base_url = url.rstrip("/").removesuffix("/v1") + "/v1"
    timeout = openai.Timeout(BRANCH_TIMEOUT_S, connect=CONNECT_S)
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout)


async def find_model(client: openai.AsyncOpenAI, name: str) -> tuple[str, int]:
    """Return the model called `name`, or the only one served if empty, and its context length (0 if unknown).

    Raises CollectError.
    """
    try:
        listed = {
            model.id: _count((model.model_extra or {}).get("max_model_len"))
            async for model in client.models.list(timeout=CONNECT_S)
        }
        served = [model for model in listed if model.rpartition("@")[0] not in listed]  # NAME@BETA is an alias of NAME
    except openai.APIStatusError as error:
        raise CollectError(f"{client.base_url}models returns {error.status_code}: {error.message}") from None
    except (openai.OpenAIError, ValueError) as error:
        raise CollectError(
            f"no proxy answers at {client.base_url} ({error.__cause__ or error}); start one, or set --url"
        ) from None
    if not name and len(served) == 1:
        name = served[0]
    if name not in served:
        problem = f"there is no model {name!r}" if name else "--model is needed"
        raise CollectError(f"{problem}; the proxy serves {', '.join(served) or 'none'}")
    return name, listed[name]


def _classify_cut(details: dict[str, Any], lost: int, cap: int | None) -> FailedRequest:
    """Return the failure of a request whose branches did not all run to their ends, which has lost `lost` tokens.

    Raises CollectError if a limit of the proxy cut it: it would cut all long branches.
    """
    stop = str(details.get("stop"))
    if stop != UPSTREAM_ERROR:
        hint = "" if cap is None else f"; --max-tokens-total left it {cap:,} tokens, which may be too few"
        raise CollectError(
            f"the proxy cuts branches short ({stop}); only long branches are cut, so the others would be a biased "
            "sample; start the proxy without AUTOTTS_DEADLINE_S and AUTOTTS_MAX_TOTAL_TOKENS, and limit branches "
            f"with --max-tokens{hint}"
        )
    return FailedRequest("the upstream failed during the request", tokens=lost, is_away=True)


def _classify_status(error: openai.APIStatusError) -> FailedRequest:
    """Return the failure that an HTTP status means. Raises CollectError if every request would get that status."""
    status, headers = error.status_code, error.response.headers
    text = error.body.get("message") if isinstance(error.body, dict) else None
    message = f"{status}: {text or error.message}"
    is_away, is_about_question = status >= HTTPStatus.INTERNAL_SERVER_ERROR, status in QUESTION_ERRORS
    if not is_away and status not in RETRYABLE | QUESTION_ERRORS:
        is_key = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        hint = f"; {ADMIN_KEY_VARIABLE} must be the proxy's admin key" if is_key else ""
        raise CollectError(f"the proxy returns {message}{hint}")
    wait, tokens = headers.get("retry-after", ""), _count(headers.get("x-tts-tokens"))
    return FailedRequest(message, float(wait) if _DECIMAL.fullmatch(wait) else None, tokens, is_away, is_about_question)


def _total_tokens(details: dict[str, Any]) -> int:
    """Return the tokens that a reply has cost, by its `tts` member."""
    tokens = details.get("tokens")
    return _count(tokens.get("total")) if isinstance(tokens, dict) else 0


def _count(value: object) -> int:
    """Return a count from a reply, or 0 if the value is not one."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() else 0
