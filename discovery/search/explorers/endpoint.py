"""An OpenAI-compatible endpoint that is asked, paid and taken down: foreign errors end here, and the key stays here."""

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
"""Headers of a response that are kept."""
LONGEST_WAIT_S: Final = 60.0
"""Seconds one retry waits at most, whatever the endpoint asks for."""
MILLION: Final = 1_000_000
SECRET: Final = 12
"""Characters from which on a key is one: `EMPTY`, which local servers are given, may stand in a controller too."""
OVERHEAD: Final = 64
"""Tokens a chat template may add to a message."""

Messages = Sequence[Mapping[str, str]]
Sleep = Callable[[float], None]


def _key_from_environment() -> SecretStr | None:
    key = os.environ.get(KEY)
    return SecretStr(key) if key else None


class LLMSettings(BaseModel):
    """Which models are asked, how, and for how much. Read once; the key comes from AUTOTTS_EXPLORER_API_KEY."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: AnyHttpUrl = Field(description="the endpoint, with /v1 if it has one")
    models: dict[str, float] = Field(min_length=1, description="models and how often each is drawn, in any unit")
    prices: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="USD a million prompt tokens and a million completion tokens, by model"
    )
    usd: float | None = Field(None, ge=0, description="USD all calls of a transcript may cost together; none: no bound")
    temperature: float | None = Field(1.0, ge=0, le=2, description="sampling temperature; none leaves it to the model")
    max_tokens: int = Field(16_000, ge=1, description="tokens one reply may have, thought included")
    limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="the name by which the endpoint knows that bound"
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="further fields of the request")
    timeout_s: float = Field(600, gt=0, description="seconds the endpoint may be silent")
    retries: int = Field(5, ge=0, description="times a call is tried again after a 429, a 5xx or a cut connection")
    proposals: int = Field(1, ge=1, le=64, description="candidates a step")
    api_key: SecretStr | None = Field(default_factory=_key_from_environment, exclude=True, repr=False)

    @model_validator(mode="after")
    def _is_whole(self) -> LLMSettings:
        if min(self.models.values()) < 0 or not sum(self.models.values()):
            raise ValueError("models: weights are from 0, and not all of them 0")
        if any(price < 0 for pair in self.prices.values() for price in pair):
            raise ValueError("prices are from 0")
        missing = sorted(set(self.models) - set(self.prices))
        if self.usd is not None and missing:
            raise ValueError(f"a budget needs a price for every model; there is none for {', '.join(missing)}")
        return self

    def price(self, model: str, prompt: int, completion: int) -> float:
        """USD of so many tokens; 0 for a model without a price."""
        each_prompt, each_completion = self.prices.get(model, (0.0, 0.0))
        return (prompt * each_prompt + completion * each_completion) / MILLION

    def worst_case(self, request: Mapping[str, Any]) -> float:
        """The most a request can cost, in USD: no token is shorter than a byte."""
        messages = request["messages"]
        prompt = sum(len(message["content"].encode()) + OVERHEAD for message in messages)
        return self.price(request["model"], prompt, self.max_tokens)


class CallCosts(NamedTuple):
    """What some calls cost, as the endpoint said; and how often it did not."""

    cost: Cost = Cost()
    calls: int = 0
    unknown: int = 0  # calls that may have cost something of which the endpoint said nothing

    def __add__(self, other: object) -> CallCosts:
        if not isinstance(other, CallCosts):
            return NotImplemented
        prompt, completion, usd, seconds = (one + more for one, more in zip(self.cost, other.cost, strict=True))
        cost = Cost(int(prompt), int(completion), usd, seconds)
        return CallCosts(cost, self.calls + other.calls, self.unknown + other.unknown)


class Endpoint:
    """Asks one endpoint. What `transcript` holds is not asked again, and needs neither key nor network."""

    def __init__(self, settings: LLMSettings, transcript: Transcript, sleep: Sleep = time.sleep) -> None:
        self._settings = settings
        self._transcript = transcript
        self._sleep = sleep

    def conversation(self, seed: int, step: int) -> Conversation:
        """The calls of one step."""
        return Conversation(self, seed, step)

    def answer(self, key: str, request: Mapping[str, Any]) -> tuple[Response, bool]:
        """The response to a request, and whether it is one of old. Raises ExplorerError before a cent is overspent."""
        known = self._transcript.replay(key)
        if known is not None:
            return known, True
        self._check_budget(request)
        response = self._ask(request)
        self._transcript.record(key, request, response)
        return response, False

    def request(self, model: str, messages: Messages) -> dict[str, Any]:
        """What is sent."""
        given = self._settings
        temperature = {} if given.temperature is None else {"temperature": given.temperature}
        body = {"model": model, "messages": [dict(message) for message in messages], given.limit: given.max_tokens}
        return {**given.extra, **temperature, **body}

    def bill(self, request: Mapping[str, Any], response: Response) -> CallCosts:
        """What one try cost."""
        usage = _usage(response)
        if usage is None:
            return CallCosts(calls=1, unknown=int(not _refused(response)))
        return CallCosts(Cost(*usage, self._settings.price(request["model"], *usage)), calls=1)

    def wait(self, response: Response, failures: int) -> bool:
        """Wait before another try; False at once if the failure, the `failures`th of its call, is not worth one."""
        status = response.get("status")
        if failures > self._settings.retries or (_refused(response) and status != HTTPStatus.TOO_MANY_REQUESTS):
            return False
        self._sleep(_pause(response, failures))
        return True

    def _check_budget(self, request: Mapping[str, Any]) -> None:
        """What was never billed counts as the most it can have cost."""
        given = self._settings
        if given.usd is None:
            return
        spent = 0.0
        for asked, response in self._transcript.exchanges():
            bill = self.bill(asked, response)
            spent += given.worst_case(asked) if bill.unknown else bill.cost.usd
        most = given.worst_case(request)
        if spent + most > given.usd:
            raise BudgetExhausted(
                f"the budget is {given.usd:g} USD, {spent:.4f} of it may be gone, and one more call can cost {most:.4f}"
            )

    def _ask(self, request: Mapping[str, Any]) -> Response:
        """One try: what came of it, in plain JSON, the key taken out wherever it stands."""
        given = self._settings
        if given.api_key is None:
            raise ExplorerError(f"{KEY} is not set, and this call is not in the transcript")
        key = given.api_key.get_secret_value()
        if not (key.isascii() and key.isprintable()):
            raise ExplorerError(f"{KEY} is no key: it has characters that no header can carry")
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
            response = {"error": f"no answer in {given.timeout_s:g} s"}
        except openai.OpenAIError as error:
            response = {"error": f"{type(error).__name__}: {error}"}
        cleaned: Response = _without(response, key)
        return cleaned


class Conversation:
    """The calls of one step, numbered through, so that each is found again in the transcript."""

    def __init__(self, endpoint: Endpoint, seed: int, step: int) -> None:
        self._endpoint = endpoint
        self._seed = seed
        self._step = step
        self._calls = 0
        self._owed = CallCosts()

    def settle(self) -> CallCosts:
        """What its calls have cost since this was last asked, those too that came to nothing."""
        owed, self._owed = self._owed, CallCosts()
        return owed

    def say(self, model: str, messages: Messages) -> str:
        """The model's reply. Tries of old that failed were tried again then, or are now. Raises ExplorerError."""
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
                raise ExplorerError(f"{model}: {_trouble(response)}, after {self._calls} calls in this step")


def _split(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as the client takes it: what it knows by name, and all else beside it."""
    named = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens"}
    further = {name: value for name, value in request.items() if name not in named}
    return {name: value for name, value in request.items() if name in named} | {"extra_body": further}


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in HEADERS if name in headers}


def _json(text: str) -> Any:
    """A body as JSON; as its first characters if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text[:1000]


def _without(value: Any, key: str) -> Any:
    """The same without the key, which an endpoint may say back."""
    if len(key) < SECRET:
        return value
    if isinstance(value, str):
        return value.replace(key, "[key]")
    if isinstance(value, dict):
        return {_without(name, key): _without(one, key) for name, one in value.items()}
    return [_without(one, key) for one in value] if isinstance(value, list) else value


def _text(response: Response) -> str | None:
    """What the model said; None unless it is a reply."""
    body = response.get("body")
    if response.get("status") != HTTPStatus.OK or not isinstance(body, dict):
        return None
    try:
        content = body["choices"][0]["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return content.encode(errors="replace").decode() if isinstance(content, str) else ""


def _usage(response: Response) -> tuple[int, int] | None:
    """Prompt and completion tokens; None if the endpoint did not say."""
    body = response.get("body")
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    first, second = (count if type(count) is int and count >= 0 else None for count in counts)
    return None if first is None or second is None else (first, second)


def _refused(response: Response) -> bool:
    """Whether the endpoint did nothing, for which nobody bills."""
    status = response.get("status")
    return isinstance(status, int) and HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR


def _pause(response: Response, failures: int) -> float:
    """Seconds to wait before the next try: what the endpoint asks for, else doubling from 1; both bounded."""
    asked = response.get("headers", {}).get("retry-after", "")
    seconds = float(asked) if asked.isascii() and asked.isdigit() else 2.0 ** (failures - 1)
    return min(LONGEST_WAIT_S, seconds)


def _trouble(response: Response) -> str:
    """What went wrong, in a few words."""
    body = response.get("body")
    error = body.get("error") if isinstance(body, dict) else None
    said = error.get("message") if isinstance(error, dict) else None
    status = response.get("status")
    if status is None:
        return str(response.get("error"))[:200]
    if status == HTTPStatus.OK:
        return "the endpoint sent what is no chat completion"
    return f"the endpoint says {status}" + (f", {said[:200]}" if isinstance(said, str) else "")
