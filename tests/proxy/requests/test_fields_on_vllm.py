"""Each row of the field table in `docs/fields.md`, checked against a real vLLM on each endpoint that has the field."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from deploy.embedded.task import held_back
from proxy.requests.field_table import ADMINS, CHAT, FORWARDED, RESPONSES, TEXT
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.proxy.requests.test_field_table import fields_of_vllm

loops = pytest.mark.asyncio(loop_scope="module")

DOCUMENT = Path(__file__).parents[3] / "docs" / "fields.md"
MODEL = "autotts-tiny"
QUESTION = held_back(1)[0].question
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
"""The question as the model's chat template renders it."""


class Endpoint(NamedTuple):
    """An endpoint: how to call it, and where its fields are defined."""

    path: str
    body: dict[str, Any]
    limit: str  # the field that limits a reply
    unservable: Any  # such as `field_table.CHAT`
    module: str  # vLLM's module that defines its request
    made: type  # openai-python's type of its request


ENDPOINTS: Final = {
    "chat": Endpoint(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 6},
        "max_tokens",
        CHAT,
        "chat_completion",
        chat_create_params.CompletionCreateParamsBase,
    ),
    "text": Endpoint(
        "/v1/completions",
        {"prompt": PROMPT, "max_tokens": 6},
        "max_tokens",
        TEXT,
        "completion",
        completion_create_params.CompletionCreateParamsBase,
    ),
    "responses": Endpoint(
        "/v1/responses",
        {"input": QUESTION, "max_output_tokens": 6},
        "max_output_tokens",
        RESPONSES,
        "responses",
        response_create_params.ResponseCreateParamsBase,
    ),
}


class Row(NamedTuple):
    """A row of the table, for one of its endpoints."""

    fields: tuple[str, ...]
    endpoint: str
    served: str
    untouched: str


def read_rows() -> list[Row]:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        Row(tuple(re.findall("`([^`]+)`", names)), endpoint, served, untouched)
        for names, endpoints, _, served, untouched in cells
        for endpoint in endpoints.split(", ")
    ]


ROWS: Final = read_rows()


def fields_of(name: str) -> list[str]:
    return [field for row in ROWS if row.endpoint == name for field in row.fields]


@pytest.mark.parametrize("name", ENDPOINTS)
def test_every_field_has_one_row(name: str) -> None:
    """Fields of vLLM, of the OpenAI client, and of the proxy's own tables."""
    endpoint = ENDPOINTS[name]
    known = fields_of_vllm(endpoint.module) | set(endpoint.made.__annotations__)
    listed = fields_of(name)
    assert len(listed) == len(set(listed))
    assert known <= set(listed)
    assert set(listed) <= FORWARDED | ADMINS.keys()


@pytest.mark.parametrize("name", ENDPOINTS)
def test_the_code_lists_the_same_unservable_fields(name: str) -> None:
    passing = {f for row in ROWS if row.endpoint == name and row.served.startswith("passes") for f in row.fields}
    unservable = ENDPOINTS[name].unservable.keys()
    assert passing <= unservable
    other = unservable - passing - ADMINS.keys()
    assert all(field.startswith("guided_") or field == "response_format" for field in other), other


ITEMS: Final[list[dict[str, Any]]] = [
    {"role": "developer", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "input_text", "text": "What is 2 + 3?"}, {"type": "input_text", "text": "?"}],
    },
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "2 + 3 = 5"}]},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "5", "annotations": []}],
    },
    {"role": "user", "content": QUESTION},
]
CALLED: Final = [
    {"role": "user", "content": QUESTION},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "2"},
]
UNFINISHED: Final = [*ITEMS, {**ITEMS[3], "id": "msg_2", "status": "incomplete"}]
TURNS: Final = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}, {"type": "text", "text": "Well?"}]},
    {"role": "assistant", "content": "5", "reasoning_content": "2 + 3 = 5"},
    {"role": "user", "name": "me", "content": QUESTION},
]
TOOL: Final[dict[str, Any]] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ANY: Final[tuple[Sequence[Any], Sequence[Any]]] = (["x", {"a": "b"}, 1, True], [])
"""Values of fields that have no meaning on any endpoint."""

# By field, or endpoint and field: values a controller serves, and values that pass.
VALUES: Final[dict[str, tuple[Sequence[Any], Sequence[Any]]]] = {
    "model": ([MODEL, f"{MODEL}@0.25", None], []),
    "messages": ([TURNS], []),
    "text prompt": ([[PROMPT], [1, 2, 3], [[1, 2, 3]], [PROMPT, PROMPT], [[1, 2, 3], [4, 5]]], [None, []]),
    "responses prompt": ([], [{"id": "p"}]),
    "input": ([ITEMS, CALLED], [UNFINISHED]),
    "instructions": (["Be brief.", "", None], []),
    "chat_template_kwargs": ([{"enable_thinking": False}, {"reasoning_effort": "low", "x": 1}], []),
    "reasoning_effort": (["none", "minimal", "low", "medium", "high", "xhigh", "max", None], ["weird"]),
    "reasoning": ([{"effort": "none"}, {"effort": "high", "summary": "auto"}, {}], [{"effort": "weird"}]),
    "add_generation_prompt": ([True], [False]),
    "continue_final_message": ([False], []),
    "documents": ([], [[{"title": "t", "text": "x"}]]),
    "chat add_special_tokens": ([False], [True]),
    "text add_special_tokens": ([True], [False]),
    "prompt_embeds": ([], ["eA=="]),
    "truncate_prompt_tokens": ([], [5]),
    "truncation_side": (["left", "right"], []),
    "truncation": (["auto", "disabled"], ["middle"]),
    "previous_response_id": ([], ["resp_1"]),
    "conversation": ([], ["conv_1"]),
    "context_management": ([], [[{"type": "compaction"}]]),
    "cache_salt": (["salt"], []),
    "temperature": ([0, 0.5, 2], []),
    "top_p": ([0.5, 1], []),
    "top_k": ([-1, 0, 5], []),
    "min_p": ([0, 0.5], []),
    "repetition_penalty": ([1, 2.5], []),
    "logit_bias": ([{"5": -100}, {}], []),
    "seed": ([-1, 0, -5, 2**62, "3"], []),
    "stop": (["zzz", ["zzz", "yyy"], []], []),
    "text max_tokens": ([3], [0]),
    "max_tokens": ([3], []),
    "max_completion_tokens": ([3], []),
    "max_output_tokens": ([3], []),
    "chat min_tokens": ([0, "0", 3], []),
    "min_tokens": ([0, "0"], [3]),
    "ignore_eos": ([False, True], []),
    "presence_penalty": ([0, 0.5], []),
    "text presence_penalty": ([0, 0.0], [0.5]),
    "frequency_penalty": ([0, -0.0, 0.5], []),
    "text frequency_penalty": ([0, -0.0], [0.5]),
    "chat thinking_token_budget": ([-1], []),
    "thinking_token_budget": ([-1], [2]),
    "stop_token_ids": ([[], [5]], []),
    "text stop_token_ids": ([[]], [[5]]),
    "chat bad_words": ([[], ["x"]], []),
    "bad_words": ([[]], [["x"]]),
    "chat allowed_token_ids": ([[]], []),
    "allowed_token_ids": ([], [[5, 6]]),
    "chat repetition_detection": ([], []),
    "repetition_detection": ([], [{"max_pattern_size": 3, "min_count": 2}]),
    "use_beam_search": ([False], [True]),
    "length_penalty": ([1, 2.0], []),
    "n": ([1, "1", 1.0], [2]),
    "best_of": ([1], [2]),
    "structured_outputs": ([{"regex": "a+"}], []),
    "text structured_outputs": ([], [{"regex": "a+"}]),
    "chat response_format": ([{"type": "text"}, {"type": "json_object"}], []),
    "response_format": (
        [{"type": "text"}, {"type": "text", "json_schema": None}],
        [{"type": "json_object"}, {"type": "weird"}],
    ),
    "text": (
        [
            {"format": {"type": "text"}},
            {"verbosity": "low"},
            {"format": None, "verbosity": "high"},
            {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
        ],
        [{"format": {"type": "weird"}}],
    ),
    "chat tools": ([[TOOL]], []),
    "responses tools": ([[{"type": "function", **TOOL["function"]}]], [[{"type": "web_search"}]]),
    "tool_choice": (["none", "auto"], ["required"]),
    "parallel_tool_calls": ([True, False], []),
    "max_tool_calls": ([3], []),
    "functions": ([[]], [[{"name": "f"}]]),
    "web_search_options": ([{}], [{"search_context_size": "low"}]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "stream": ([False, True], []),
    "stream_options": ([{"include_usage": True}, {"continuous_usage_stats": True}, {"include_obfuscation": False}], []),
    "stream_interval": ([1, 64], []),
    "include_reasoning": ([True, False], []),
    "include": (
        [["reasoning.encrypted_content"], ["file_search_call.results", "code_interpreter_call.outputs"], []],
        [["message.output_text.logprobs"], ["weird"]],
    ),
    "chat logprobs": ([False, True], []),
    "text logprobs": ([], [0, 3]),
    "chat top_logprobs": ([0], []),
    "top_logprobs": ([0], [2]),
    "prompt_logprobs": ([], [0, 1]),
    "logprob_token_ids": ([[]], [[5]]),
    "echo": ([False], [True]),
    "suffix": ([""], ["x"]),
    "skip_special_tokens": ([True, False], []),
    "text skip_special_tokens": ([True], [False]),
    "chat spaces_between_special_tokens": ([True, False], []),
    "spaces_between_special_tokens": ([True], [False]),
    "include_stop_str_in_output": ([False, True], []),
    "text include_stop_str_in_output": ([False], [True]),
    "return_token_ids": ([False], [True]),
    "return_prompt_text": ([False], [True]),
    "return_tokens_as_token_ids": ([False, True], []),
    "return_token_offsets": ([False, True], []),
    "modalities": ([["text"]], [["text", "audio"]]),
    "audio": ([], [{"voice": "x", "format": "wav"}]),
    "background": ([False], [True]),
    "verbosity": (["low", "medium", "high"], []),
    "user": (["me"], []),
    "metadata": ([{"a": "b"}], []),
    "store": ([True, False], []),
    "service_tier": (["auto", "flex"], []),
    "safety_identifier": (["me"], []),
    "prompt_cache_key": (["k"], []),
    "prompt_cache_retention": (["24h", "in_memory"], []),
    "prompt_cache_options": ANY,
    "moderation": ANY,
    "prediction": ([{"type": "content", "content": "x"}], []),
    "image": ANY,
    "access_programs": ANY,
    "background_options": ANY,
    "priority": ([0], [5]),
    "routed_experts_prompt_start": ([0], [1]),
    "watermarking": ([True], [False]),
    "mm_payload": (["tensors"], ["none"]),
    "request_id": ([], ["mine"]),
    "session_id": ([], ["mine"]),
    "kv_transfer_params": ([{}], [{"a": 1}]),
    "ec_transfer_params": ([{}], [{"a": 1}]),
    "vllm_xargs": ([{}], [{"a": 1}]),
    "return_mm_kwargs": ([], [False]),
    "media_io_kwargs": ([{}], [{"image": {}}]),
    "mm_processor_kwargs": ([{}], [{"a": 1}]),
    "chat_template": ([], ["{{ messages }}"]),
    "enable_response_messages": ([False], [True]),
    "previous_input_messages": ([[]], [[{"role": "user", "content": "x"}]]),
}
SINGLE: Final = {"beta": 0.5, "controller": "single"}


class Answer(NamedTuple):
    """The response to a request."""

    status: int
    headers: Any
    body: Any

    @property
    def prompt_tokens(self) -> int | None:
        usage = self.body.get("usage") or {}
        return usage.get("prompt_tokens", usage.get("input_tokens"))

    @property
    def tokens(self) -> int:
        usage = self.body["usage"]
        return int(usage.get("completion_tokens") or usage["output_tokens"])


class Both(NamedTuple):
    """A vLLM, and a proxy over it."""

    vllm: str
    proxy: str
    http: aiohttp.ClientSession

    async def ask(self, endpoint: str, **fields: Any) -> Answer:
        return await self._ask(self.proxy, endpoint, fields)

    async def own(self, endpoint: str, **fields: Any) -> Answer:
        """Return vLLM's own reply."""
        return await self._ask(self.vllm, endpoint, fields)

    async def _ask(self, url: str, endpoint: str, fields: dict[str, Any]) -> Answer:
        about = ENDPOINTS[endpoint]
        body = {"model": MODEL, **about.body, **fields}
        async with self.http.post(url + about.path, json=body) as response:
            is_json = response.content_type == "application/json"
            return Answer(response.status, response.headers, await response.json() if is_json else {})

    async def with_beta(self, endpoint: str, **fields: Any) -> Answer:
        return await self.ask(endpoint, tts=SINGLE, **fields)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(vllm: str) -> AsyncIterator[Both]:
    settings = load(upstream=vllm, admin_key="admin", **EMBEDDED)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        yield Both(vllm, url, http)


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("row", ROWS, ids=[f"{row.endpoint} {row.fields[0]}" for row in ROWS])
async def test_a_row_of_the_field_table_is_true(both: Both, row: Row) -> None:
    for field in row.fields:
        served, passing = VALUES.get(f"{row.endpoint} {field}") or VALUES[field]
        if row.served.startswith("served: changes nothing") or field in ("messages", "input"):
            assert served
        for value in [*served, *([] if field in ("messages", "prompt", "input") else [None])]:
            await check_served(both, row.endpoint, field, value)
        assert passing or "pass" not in row.served or field == "continue_final_message", row
        for value in passing:
            await check_passing(both, row, field, value)


async def check_served(both: Both, endpoint: str, field: str, value: Any) -> None:
    """With β a controller serves the request, and the prompt equals vLLM's."""
    more = {"stream": True} if field == "stream_options" and value else {}
    answer = await both.with_beta(endpoint, **{field: value}, **more)
    assert answer.status == 200, (field, value, answer.body)
    assert answer.headers["x-tts-applied"] == "true", (field, value, answer.headers["x-tts-reason"])
    own = await both.own(endpoint, **{field: value}, **more)
    if own.status == 200 and own.prompt_tokens is not None:
        assert answer.prompt_tokens == own.prompt_tokens, (field, value)


async def check_passing(both: Both, row: Row, field: str, value: Any) -> None:
    """With and without β the reply is vLLM's own; with `tts.required` the request is refused."""
    if row.untouched.startswith("admins"):
        answer = await both.with_beta(row.endpoint, **{field: value})
        assert (answer.status, answer.body["error"]["param"]) == (403, field), (field, value)
        return
    own = await both.own(row.endpoint, **{field: value})
    for tts in (SINGLE, None):
        answer = await both.ask(row.endpoint, tts=tts, **{field: value})
        assert (answer.status, answer.headers["x-tts-applied"]) == (own.status, "false"), (field, value)
        assert answer.prompt_tokens == own.prompt_tokens
        reason = answer.headers["x-tts-reason"]
        words = re.findall(r"`(structured_output|tools|multimodal|input)`\)?", row.served)
        assert reason == ("no_beta" if tts is None else reason if reason in words else field), (field, value)
    required = await both.ask(row.endpoint, tts={**SINGLE, "required": True}, **{field: value})
    assert (required.status, required.body["error"]["param"]) == (400, field)


# Meanings


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
async def test_effort_none_gives_one_answer_without_a_thought(both: Both, endpoint: str) -> None:
    """The template has no thought, and one branch runs without probes, as in vLLM alone."""
    effort: dict[str, Any] = {"reasoning_effort": "none"} if endpoint == "chat" else {"reasoning": {"effort": "none"}}
    free = {ENDPOINTS[endpoint].limit: None}
    own = await both.own(endpoint, **effort, **free)
    answer = await both.ask(endpoint, **effort, **free)
    assert answer.headers["x-tts-applied"] == "true"
    assert (answer.headers["x-tts-beta-source"], answer.headers["x-tts-beta"]) == ("reasoning_effort", "0")
    tts = answer.body["tts"]
    assert (tts["branches"], tts["controller"], tts["tokens"]["probe"]) == (1, "single", 0)
    assert answer.prompt_tokens == own.prompt_tokens
    assert tts["tokens"]["total"] == tts["tokens"]["winner"] == answer.tokens
    both_set = await both.ask(endpoint, tts={"beta": 0, "controller": "self_consistency"}, **effort, **free)
    assert both_set.prompt_tokens == own.prompt_tokens  # however β is set


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("effort", ["low", None])
async def test_an_effort_wins_over_chat_template_kwargs(both: Both, effort: str | None) -> None:
    """It does so in vLLM too. The client's own `enable_thinking` is kept."""
    for variables in ({"reasoning_effort": "none"}, {"enable_thinking": False}, {"enable_thinking": True}):
        asked: dict[str, Any] = {"chat_template_kwargs": variables, "reasoning_effort": effort}
        own = await both.own("chat", **asked)
        assert (await both.with_beta("chat", **asked)).prompt_tokens == own.prompt_tokens


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_a_seed_repeats_the_reply_and_minus_one_is_no_seed(both: Both, endpoint: str) -> None:
    long = {ENDPOINTS[endpoint].limit: 60, "temperature": 2}

    async def texts(**fields: Any) -> set[str]:
        answers = [await both.with_beta(endpoint, **long, **fields) for _ in range(4)]
        return {written(answer.body) for answer in answers}

    assert len(await texts(seed=7)) == 1
    assert len(await texts(seed=-1)) > 1
    assert len(await texts()) > 1


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_sampling_fields_reach_the_branches(both: Both, endpoint: str) -> None:
    greedy = written((await both.own(endpoint, temperature=0)).body)
    for fields in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1}, {"temperature": 1e-4}):
        assert written((await both.with_beta(endpoint, **fields)).body) == greedy, fields
    banned = {"logit_bias": {str(i): -100 for i in range(60)}, "top_k": 1}
    own = written((await both.own(endpoint, **banned)).body)
    assert written((await both.with_beta(endpoint, **banned)).body) == own != greedy
    penal = {"repetition_penalty": 2.0, "top_k": 1, ENDPOINTS[endpoint].limit: 60}
    own = written((await both.own(endpoint, **penal)).body)
    assert written((await both.with_beta(endpoint, **penal)).body) == own


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_token_limits_hold_for_each_branch(both: Both, endpoint: str) -> None:
    limit = ENDPOINTS[endpoint].limit
    assert (await both.with_beta(endpoint, **{limit: 3})).tokens == 3
    assert (await both.with_beta(endpoint, **{limit: 5000})).tokens < 1024
    if endpoint == "chat":
        assert (await both.with_beta(endpoint, max_tokens=20, max_completion_tokens=3)).tokens == 3
    if endpoint == "text":
        assert (await both.own(endpoint, max_tokens=None)).tokens == 16
        assert (await both.with_beta(endpoint, max_tokens=None)).tokens > 16


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("tokens", [24, 300])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_ignore_eos_runs_every_branch_to_its_limit(both: Both, endpoint: str, tokens: int) -> None:
    """Benchmarks that set `ignore_eos` measure β, and their branches do not vote."""
    limit = ENDPOINTS[endpoint].limit
    answer = await both.ask(
        endpoint, ignore_eos=True, tts={"beta": 0, "controller": "self_consistency@4"}, **{limit: tokens}
    )
    assert answer.headers["x-tts-applied"] == "true"
    tts = answer.body["tts"]
    assert (tts["branches"], tts["votes"], tts["agreed"]) == (4, {}, None)  # the text of such a branch is no vote
    assert answer.tokens == 4 * tokens
    assert tts["stop"] == "max_tokens"


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
async def test_include_reasoning_false_omits_the_thought(both: Both, endpoint: str) -> None:
    free = {ENDPOINTS[endpoint].limit: None}
    own = await both.own(endpoint, include_reasoning=False, **free)
    answer = await both.with_beta(endpoint, include_reasoning=False, **free)
    assert not thoughts(own.body)
    assert not thoughts(answer.body)
    assert thoughts((await both.with_beta(endpoint, **free)).body)


@pytest.mark.vllm
@loops
async def test_a_cache_salt_separates_the_prefix_cache(both: Both) -> None:
    async def cached(salt: str) -> int:
        answer = await both.with_beta("chat", messages=[{"role": "user", "content": QUESTION * 8}], cache_salt=salt)
        return int(answer.body["usage"]["prompt_tokens_details"]["cached_tokens"])

    await cached("first")
    assert await cached("first") > 0
    assert await cached("second") == 0


@pytest.mark.vllm
@loops
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_include_usage_ends_the_stream_with_usage(both: Both, endpoint: str) -> None:
    about = ENDPOINTS[endpoint]
    body = {"model": MODEL, **about.body, "stream": True, "stream_options": {"include_usage": True}, "tts": SINGLE}
    async with both.http.post(both.proxy + about.path, json=body) as response:
        assert response.headers["x-tts-applied"] == "true"
        assert '"total_tokens":' in (await response.text())[-3000:]


def written(body: Any) -> str:
    """Return all text of a reply, including the thought."""
    if "choices" in body:
        message = body["choices"][0].get("message") or {"content": body["choices"][0]["text"]}
        return ((message.get("reasoning") or "") + (message.get("content") or "")).strip()
    return "".join(part["text"] for item in body["output"] for part in item.get("content") or ()).strip()


def thoughts(body: Any) -> list[Any]:
    if "choices" in body:
        return [thought for thought in [body["choices"][0]["message"].get("reasoning")] if thought]
    return [item for item in body["output"] if item["type"] == "reasoning"]
