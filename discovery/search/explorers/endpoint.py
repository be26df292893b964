"""Client of an OpenAI-compatible endpoint: calls, retries, costs and the transcript.

Errors of the client library are converted here, and the API key never leaves this module.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, Literal, NamedTuple

import openai
from pydantic import AnyHttpUrl, BaseModel, ConfigDict, Field, SecretStr, model_validator

from discovery.errors import BudgetExhausted, ExplorerError
from discovery.search.explorers import Cost
from discovery.search.explorers.transcript import Response, Transcript, exchange_key

KEY: Final = "AUTOTTS_EXPLORER_API_KEY"
HEADERS: Final = ("retry-after", "x-request-id")
"""Response headers that are recorded."""
LONGEST_WAIT_S: Final = 60.0
"""Maximum seconds to wait before a retry, whatever the endpoint asks for."""
MILLION: Final = 1_000_000
SECRET: Final = 12
"""Minimum characters of a key that is redacted; short ones like `EMPTY`, used for local servers, are not secret."""
OVERHEAD: Final = 64
"""Maximum tokens a chat template adds per message."""
LIMITS: Final = ("max_tokens", "max_completion_tokens")
"""Fields of a request that limit the tokens of a reply, from which its worst case is computed."""
REPEATS: Final = ("n", "best_of")
"""Fields of a request that multiply its cost."""

Messages = Sequence[Mapping[str, str]]
Sleep = Callable[[float], None]


def _key_from_environment() -> SecretStr | None:
    key = os.environ.get(KEY)
    return SecretStr(key) if key else None


class LLMSettings(BaseModel):
    """Settings of the LLM explorer: endpoint, models, prices, limits. The key comes from AUTOTTS_EXPLORER_API_KEY."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: AnyHttpUrl = Field(description="base URL of the endpoint, including /v1 if it has that")
    models: dict[str, float] = Field(min_length=1, description="models with the relative weight by which each is drawn")
    prices: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="USD per million prompt tokens and per million completion tokens, by model"
    )
    usd: float | None = Field(None, ge=0, description="budget in USD for all calls of a transcript; none: no limit")
    temperature: float | None = Field(1.0, ge=0, le=2, description="sampling temperature; none: the model's default")
    max_tokens: int = Field(16_000, ge=1, description="maximum tokens per reply, reasoning included")
    limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="name of the field for that limit in the request"
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="additional fields of the request")
    timeout_s: float = Field(600, gt=0, description="seconds without a response until a call times out")
    retries: int = Field(5, ge=0, description="retries of a call after a 429, a 5xx or a broken connection")
    proposals: int = Field(1, ge=1, le=64, description="candidates per step")
    api_key: SecretStr | None = Field(default_factory=_key_from_environment, exclude=True, repr=False)

    @model_validator(mode="after")
    def _is_whole(self) -> LLMSettings:
        if min(self.models.values()) < 0 or not sum(self.models.values()):
            raise ValueError("models: weights must be at least 0 and not all 0")
        if any(price < 0 for pair in self.prices.values() for price in pair):
            raise ValueError("prices: must be at least 0")
        for name in LIMITS:
            if name in self.extra:
                raise ValueError(
                    f"extra: {name} is not allowed there; set `max_tokens`, and `limit` for the field's name"
                )
        for name in REPEATS:
            if self.extra.get(name, 1) != 1:
                raise ValueError(f"extra: {name} must be 1, because one reply is read and budgeted; set `proposals`")
        missing = sorted(set(self.models) - set(self.prices))
        if self.usd is not None and missing:
            raise ValueError(
                f"usd: a budget needs a price for every model; prices are missing for {', '.join(missing)}"
            )
        return self

    def price(self, model: str, prompt: int, completion: int) -> float:
        """Return the price of the tokens in USD; 0 for a model without a price."""
        each_prompt, each_completion = self.prices.get(model, (0.0, 0.0))
        return (prompt * each_prompt + completion * each_completion) / MILLION

    def worst_case(self, request: Mapping[str, Any]) -> float:
        """Return the maximum cost of a request in USD, counting one token per byte of the prompt.

        The limit of the reply is that of the request, which may be an earlier one than this run's.
        """
        messages = request["messages"]
        prompt = sum(len(message["content"].encode()) + OVERHEAD for message in messages)
        completion = next((request[name] for name in LIMITS if name in request), self.max_tokens)
        return self.price(request["model"], prompt, completion)


class CallCosts(NamedTuple):
    """Cost of some calls as reported by the endpoint, and the number of calls without a reported cost."""

    cost: Cost = Cost()
    calls: int = 0
    unknown: int = 0  # calls of unknown cost

    def __add__(self, other: object) -> CallCosts:
        if not isinstance(other, CallCosts):
            return NotImplemented
        prompt, completion, usd, seconds = (ours + theirs for ours, theirs in zip(self.cost, other.cost, strict=True))
        cost = Cost(int(prompt), int(completion), usd, seconds)
        return CallCosts(cost, self.calls + other.calls, self.unknown + other.unknown)


class Endpoint:
    """Calls one endpoint. Responses in `transcript` are reused, which needs neither key nor network."""

    def __init__(self, settings: LLMSettings, transcript: Transcript, sleep: Sleep = time.sleep) -> None:
        self._settings = settings
        self._transcript = transcript
        self._sleep = sleep

    def conversation(self, seed: int, step: int) -> Conversation:
        """Begin the conversation of one step."""
        return Conversation(self, seed, step)

    def answer(self, key: str, request: Mapping[str, Any]) -> tuple[Response, bool]:
        """Return the response to a request, and whether it was replayed. Raises ExplorerError, BudgetExhausted."""
        known = self._transcript.replay(key)
        if known is not None:
            return known, True
        self._check_budget(request)
        response = self._ask(request)
        self._transcript.record(key, request, response)
        return response, False

    def request(self, model: str, messages: Messages) -> dict[str, Any]:
        """Build the body of a request."""
        given = self._settings
        temperature = {} if given.temperature is None else {"temperature": given.temperature}
        body = {"model": model, "messages": [dict(message) for message in messages], given.limit: given.max_tokens}
        return {**given.extra, **temperature, **body}

    def bill(self, request: Mapping[str, Any], response: Response) -> CallCosts:
        """Return the cost of one attempt."""
        usage = _usage(response)
        if usage is None:
            return CallCosts(calls=1, unknown=int(not _refused(response)))
        return CallCosts(Cost(*usage, self._settings.price(request["model"], *usage)), calls=1)

    def wait(self, response: Response, failures: int) -> bool:
        """Wait before a retry. Return False at once if a retry is not worthwhile after `failures` failures."""
        status = response.get("status")
        if failures > self._settings.retries or (_refused(response) and status != HTTPStatus.TOO_MANY_REQUESTS):
            return False
        self._sleep(_pause(response, failures))
        return True

    def _check_budget(self, request: Mapping[str, Any]) -> None:
        """Raise BudgetExhausted if the request could exceed the budget.

        Calls of unknown cost count with their maximum. Raises ExplorerError if calls were paid at an unknown price.
        """
        given = self._settings
        if given.usd is None:
            return
        spent = 0.0
        for past_request, response in self._transcript.exchanges():
            bill, model = self.bill(past_request, response), past_request["model"]
            if model not in given.prices and (bill.unknown or bill.cost != Cost()):
                raise ExplorerError(
                    f"prices: the price of {model} is missing, and the transcript holds calls of it, which count "
                    "against the budget; keep its price in `prices`"
                )
            spent += given.worst_case(past_request) if bill.unknown else bill.cost.usd
        most = given.worst_case(request)
        if spent + most > given.usd:
            raise BudgetExhausted(
                f"the budget is {given.usd:g} USD; up to {spent:.4f} are spent, and one more call can cost {most:.4f}"
            )

    def _ask(self, request: Mapping[str, Any]) -> Response:
        """Make one attempt and return its result as plain JSON, with the key redacted."""
        given = self._settings
        if given.api_key is None:
            raise ExplorerError(
                f"{KEY} is not set, and the transcript does not hold this call; set it to the endpoint's key, or to "
                "any text if it needs none, and continue the run with --resume"
            )
        key = given.api_key.get_secret_value()
        if not (key.isascii() and key.isprintable()):
            raise ExplorerError(f"{KEY} has characters that are not allowed in an HTTP header")
        try:
            with openai.OpenAI(
                base_url=str(given.base_url), api_key=key, max_retries=0, timeout=given.timeout_s
            ) as client:
                raw = client.chat.completions.with_raw_response.create(**_split(request))
                response = {"status": raw.status_code, "headers": _kept(raw.headers), "body": _json(raw.text)}
        except openai.APIStatusError as error:
            text = error.response.text
            response = {"status": error.status_code, "headers": _kept(error.response.headers), "body": _json(text)}
        except openai.APITimeoutError:
            response = {"error": f"no response within {given.timeout_s:g} s"}
        except openai.OpenAIError as error:
            response = {"error": f"{type(error).__name__}: {error}"}
        cleaned: Response = _redact(response, key)
        return cleaned


class Conversation:
    """The calls of one step, numbered so that each can be found again in the transcript."""

    def __init__(self, endpoint: Endpoint, seed: int, step: int) -> None:
        self._endpoint = endpoint
        self._seed = seed
        self._step = step
        self._calls = 0
        self._owed = CallCosts()

    @property
    def calls(self) -> int:
        """Number of calls so far, failed and replayed ones included."""
        return self._calls

    def settle(self) -> CallCosts:
        """Return the cost of all calls since the last `settle`, failed ones included."""
        owed, self._owed = self._owed, CallCosts()
        return owed

    def say(self, model: str, messages: Messages) -> str:
        """Return the model's reply, after retries if attempts fail. Raises ExplorerError.

        Failed attempts in the transcript are replayed too; if no retry follows there, it is made now.
        """
        request, failures = self._endpoint.request(model, messages), 0
        while True:
            key = exchange_key(self._seed, self._step, self._calls, request)
            response, is_old = self._endpoint.answer(key, request)
            self._calls += 1
            self._owed += self._endpoint.bill(request, response)
            text = _text(response)
            if text is not None:
                return text
            failures += not is_old
            if not is_old and not self._endpoint.wait(response, failures):
                raise ExplorerError(f"{model}: {_describe_failure(response)}, after {self._calls} calls in this step")


def _split(request: Mapping[str, Any]) -> dict[str, Any]:
    """Split a request into the client's named parameters and `extra_body` for all other fields."""
    named = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens"}
    further = {name: value for name, value in request.items() if name not in named}
    return {name: value for name, value in request.items() if name in named} | {"extra_body": further}


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in HEADERS if name in headers}


def _json(text: str) -> Any:
    """Parse a body as JSON; return its first 1000 characters if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text[:1000]


def _redact(value: Any, key: str) -> Any:
    """Redact the key in a JSON value, because an endpoint may echo it."""
    if len(key) < SECRET:
        return value
    if isinstance(value, str):
        return value.replace(key, "[key]")
    if isinstance(value, dict):
        return {_redact(name, key): _redact(member, key) for name, member in value.items()}
    return [_redact(member, key) for member in value] if isinstance(value, list) else value


def _text(response: Response) -> str | None:
    """Return the text of the reply; None if the response is not one."""
    body = response.get("body")
    if response.get("status") != HTTPStatus.OK or not isinstance(body, dict):
        return None
    try:
        content = body["choices"][0]["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return content.encode(errors="replace").decode() if isinstance(content, str) else ""


def _usage(response: Response) -> tuple[int, int] | None:
    """Return prompt and completion tokens; None if the endpoint did not report them."""
    body = response.get("body")
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    first, second = (count if type(count) is int and count >= 0 else None for count in counts)
    return None if first is None or second is None else (first, second)


def _refused(response: Response) -> bool:
    """Return whether the endpoint refused the request, which costs nothing."""
    status = response.get("status")
    return isinstance(status, int) and HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR


def _pause(response: Response, failures: int) -> float:
    """Return the seconds to wait before a retry: `retry-after`, else doubling from 1; at most LONGEST_WAIT_S."""
    requested = response.get("headers", {}).get("retry-after", "")
    seconds = float(requested) if requested.isascii() and requested.isdigit() else 2.0 ** (failures - 1)
    return min(LONGEST_WAIT_S, seconds)


def _describe_failure(response: Response) -> str:
    """Describe in a few words what went wrong."""
    body = response.get("body")
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    status = response.get("status")
    if status is None:
        return str(response.get("error"))[:200]
    if status == HTTPStatus.OK:
        return "the endpoint's response is not a chat completion"
    return f"the endpoint returned status {status}" + (f", {message[:200]}" if isinstance(message, str) else "")
