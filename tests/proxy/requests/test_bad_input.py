"""Bad input gets the right status and an error in OpenAI's form that names the field; nothing is left running."""

from __future__ import annotations

import json
from typing import Any

import jiter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, NotFoundError
from pydantic import BaseModel, ValidationError

from proxy.errors import MOST_MESSAGE, MOST_PARAM, BadRequest, clipped
from proxy.requests import strict_json
from proxy.requests.beta import resolve, split_alias
from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import MAX_PROMPT_IDS, CompletionRequest
from proxy.requests.feedback_request import FeedbackRequest
from proxy.requests.field_types import MAX_BIASES, MAX_MESSAGES, MAX_OPTIONS
from proxy.requests.parsing import parse_request
from proxy.requests.responses_request import ResponsesRequest
from proxy.types import BetaSource
from tests.fakes import MODEL
from tests.proxy.conftest import Proxy

NOT_BETAS = ["nan", "1e400", "1_000", "１", "", " ", "-0.1", "1.1", "inf", "0x1", "1,0", "0.5,0.6", "5e-1", "+0.5", "."]


def check_error(reply: Any, status: int, got: int, *, param: str | None = None, code: str | None = None) -> None:
    assert got == status, reply
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in json.dumps(reply)
    if param:
        assert reply["error"]["param"] == param
    if code:
        assert reply["error"]["code"] == code


@pytest.mark.parametrize("beta", NOT_BETAS)
def test_an_invalid_beta_header_is_refused(beta: str) -> None:
    with pytest.raises(BadRequest, match=r"0 to 1") as caught:
        resolve([beta], body=None, effort=None, alias=None, model="m", default=None)
    assert caught.value.param == "x-tts-beta"


@pytest.mark.parametrize("name", ["x-tts-betta", "x-tts-controller", "X-TTS-Max-Total-Tokens"])
async def test_a_header_that_would_be_ignored_is_refused(proxy: Proxy, name: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers={name: "0.5"}) as response:
        reply = await response.json()
    check_error(reply, 400, response.status, param=name.lower())
    assert "send x-tts-beta" in reply["error"]["message"]
    assert proxy.backend.requests == []


@pytest.mark.parametrize(
    ("tts", "param", "message"),
    [
        (0.5, "tts", 'tts: must be an object such as {"beta": 0.5}'),
        ({"beta": "0.5"}, "tts.beta", 'tts.beta: Input should be a number from 0 to 1 such as 0.5, not "0.5"'),
        ({"beta": 50}, "tts.beta", "tts.beta: Input should be a number from 0 to 1 such as 0.5, not 50"),
        ({"progress": "yes"}, "tts.progress", 'tts.progress: Input should be true, false or "rounds", not "yes"'),
        (
            {"max_total_tokens": "2k"},
            "tts.max_total_tokens",
            'tts.max_total_tokens: Input should be a valid integer, not "2k"',
        ),
        ({"tools": []}, "tts.tools", None),
    ],
)
async def test_an_invalid_option_is_quoted(proxy: Proxy, tts: Any, param: str, message: str | None) -> None:
    status, _, reply = await proxy.ask(None, tts=tts)
    check_error(reply, 400, status, param=param)
    assert message in (None, reply["error"]["message"])


@pytest.mark.parametrize("field", ["beta", "max_total_tokens"])
async def test_an_option_beside_tts_is_refused(proxy: Proxy, field: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], field: 1}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        check_error(reply := await response.json(), 400, response.status, param=field)
    assert "in the object tts" in reply["error"]["message"]
    assert proxy.backend.requests == []


async def test_a_beta_after_the_models_name_is_named_as_such(proxy: Proxy) -> None:
    status, _, reply = await proxy.ask(None, model=f"{MODEL}@5")
    check_error(reply, 400, status, param="model", code="bad_beta")
    assert reply["error"]["message"].startswith("the β after @ in the model's name must be a decimal number")


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/batches", "/anything"])
async def test_an_unknown_path_gets_a_link_to_the_known_ones(proxy: Proxy, path: str) -> None:
    async with proxy.http.get(proxy.url + path) as response:
        check_error(reply := await response.json(), 404, response.status, code="not_found")
    assert reply["error"]["message"] == f"GET {path}: Not Found; /docs lists the paths that are served"


@pytest.mark.parametrize("beta", ["0", "1", "0.5", "1.0", ".25", "0.", "000.5"])
def test_a_valid_beta_header_is_parsed(beta: str) -> None:
    beta_setting = resolve([beta], body=None, effort=None, alias=None, model="m", default=None)
    assert beta_setting is not None
    assert beta_setting.value == float(beta)


@pytest.mark.parametrize("beta", ["nan", "1e400", "1_000", "１".encode().decode("latin-1"), "2"])
async def test_a_bad_beta_header_sends_nothing_upstream(proxy: Proxy, beta: str) -> None:
    status, _, reply = await proxy.ask(beta)
    check_error(reply, 400, status, param="x-tts-beta", code="bad_beta")
    assert proxy.backend.requests == []
    assert await proxy.metric("autotts_requests_total", outcome="refused") == 1


async def test_a_duplicate_beta_header_is_refused(proxy: Proxy) -> None:
    headers = [("x-tts-beta", "0.5"), ("x-tts-beta", "0.5")]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers) as response:
        check_error(await response.json(), 400, response.status, param="x-tts-beta", code="bad_beta")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tts": {"beta": 1.5}}, "tts.beta", "bad_beta"),
        ({"tts": {"beta": "0.5"}}, "tts.beta", "bad_beta"),
        ({"tts": {"beta": True}}, "tts.beta", "bad_beta"),
        ({"tts": {"betta": 1}}, "tts.betta", None),
        ({"tts": {"controller": "cmcc"}}, "tts.controller", "unknown_controller"),
        ({"tts": {"max_total_tokens": 0}}, "tts.max_total_tokens", None),
        ({"tts": {"deadline_s": -1}}, "tts.deadline_s", None),
        ({"tts": {"answer": "essay"}}, "tts.answer", None),
        ({"tts": 5}, "tts", None),
        ({"messages": "hi"}, "messages", None),
        ({"model": f"{MODEL}@nan"}, "model", "bad_beta"),
        ({"temperature": -1}, "temperature", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": 1.5}, "max_tokens", None),
        ({"stop": ["a"] * 65}, "stop", None),
        ({"stop": 5}, "stop", None),
        ({"repetition_penalty": 0}, "repetition_penalty", None),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "context_length_exceeded"),
    ],
)
async def test_the_error_names_the_bad_field(
    proxy: Proxy, fields: dict[str, Any], param: str, code: str | None
) -> None:
    status, headers, reply = await proxy.ask("0.5", **fields)
    check_error(reply, 400, status, param=param, code=code)
    assert "x-request-id" in headers
    assert proxy.backend.generated == 0


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/v1/chat/completions",
            {"messages": [], "tts": {"betta": 1}},
            "tts.betta: there is no such field; did you mean beta? known fields: beta, target_tokens, controller, ",
        ),
        (
            "/v1/chat/completions",
            {"messages": [], "tts": {"code": {"input": []}}},
            "tts.code.input: there is no such field; did you mean inputs? known fields: function, inputs",
        ),
        (
            "/v1/chat/completions",
            {"messages": [], "tts": {"tools": {"excluded": []}}},
            "tts.tools.excluded: there is no such field; did you mean exclude? known fields: exclude",
        ),
        (
            "/v1/completions",
            {"prompt": "x", "tts": {"zzz": 1}},
            "tts.zzz: there is no such field; known fields: ",
        ),
        (
            "/v1/tts/feedback",
            {"request_id": "x", "corect": True},
            "corect: there is no such field; did you mean correct? known fields: request_id, id, correct, ",
        ),
        (
            "/v1/tts/feedback",
            {"request_id": "x"},
            "send exactly one of correct, answer and score; got none of them",
        ),
        (
            "/v1/tts/feedback",
            {"request_id": "x", "correct": True, "score": 1.0},
            "send exactly one of correct, answer and score; got correct and score",
        ),
    ],
)
async def test_the_error_lists_the_valid_fields(proxy: Proxy, path: str, body: dict[str, Any], message: str) -> None:
    async with proxy.http.post(proxy.url + path, json=body) as response:
        reply = await response.json()
    assert response.status == 400
    assert reply["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"\xff", b'{"messages": [{"role": "user"}], "temperature": NaN}', b"[" * 100_000]
)
async def test_a_body_that_is_not_a_json_object_is_refused(proxy: Proxy, raw: bytes) -> None:
    status, _, reply = await proxy.ask("0.5", raw=raw)
    check_error(reply, 400, status, code="bad_json")


# Bounds on structure


def values_in(value: Any) -> int:
    """Return the number of objects, lists, members and strings in a JSON value. A member's name is a string too."""
    if isinstance(value, dict):
        return 1 + sum(2 + values_in(inner) for inner in value.values())
    if isinstance(value, list):
        return 1 + sum(map(values_in, value))
    return int(isinstance(value, str))


ODD_TEXT = st.text(st.sampled_from('{[:"\\\\a\u00e9\n'), max_size=6)
TREES = st.recursive(
    st.none() | st.integers() | ODD_TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(ODD_TEXT, inner, max_size=5),
    max_leaves=40,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(body=st.dictionaries(ODD_TEXT, TREES, max_size=5), most=st.integers(1, 40), is_ascii=st.booleans())
def test_structure_is_counted_outside_strings(body: dict[str, Any], most: int, is_ascii: bool) -> None:
    raw = json.dumps(body, ensure_ascii=is_ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "MAX_VALUES", most)
        if values_in(body) > most:
            with pytest.raises(BadRequest, match=f"at most {most}"):
                strict_json.read_object(raw)
        else:
            assert strict_json.read_object(raw) == body


async def test_too_much_structure_is_refused_before_it_is_built(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    from_json = jiter.from_json

    def building(raw: bytes, **how: Any) -> Any:
        built.append(len(raw))
        return from_json(raw, **how)

    monkeypatch.setattr(jiter, "from_json", building)
    count = strict_json.MAX_VALUES + 1
    for inner in (b"[" + b"{}," * count + b"{}]", b"[" + b'"",' * count + b'""]', b"[" + b"[]," * count + b"[]]"):
        status, _, reply = await proxy.ask("0.5", raw=b'{"messages":' + inner + b"}")
        check_error(reply, 400, status, code="body_too_complex")
        assert str(strict_json.MAX_VALUES) in reply["error"]["message"]
    assert built == []
    text = '{"[:' * count
    status, _, reply = await proxy.ask("0", messages=[{"role": "user", "content": text}])
    check_error(reply, 400, status, code="context_length_exceeded")
    assert len(built) == 1


async def test_a_body_with_too_many_fields_is_refused(proxy: Proxy) -> None:
    most = strict_json.MAX_MEMBERS
    fields = {f"x{i}": i for i in range(most)}
    for path in ("chat/completions", "completions", "responses", "embeddings", "tts/feedback"):
        async with proxy.http.post(f"{proxy.url}/v1/{path}", json={"model": MODEL, **fields}) as response:
            reply = await response.json()
        check_error(reply, 400, response.status, code="body_too_complex")
        assert f"{most + 1} fields; at most {most}" in reply["error"]["message"]


def many(count: int) -> dict[str, int]:
    return {str(number): 1 for number in range(count)}


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("made", "body", "param", "problem"),
    [
        (ChatRequest, {"messages": [0] * 1000}, "messages.0", "valid dictionary"),
        (ChatRequest, {"messages": [{}] * 700 + [0] * 300}, "messages.700", "valid dictionary"),
        (ChatRequest, {"messages": [0] * (MAX_MESSAGES + 1)}, "messages", f"at most {MAX_MESSAGES} messages"),
        (ChatRequest, {**CHAT, "stop": ["a", *[0] * 1000]}, "stop", None),
        (ChatRequest, {**CHAT, "tts": many(MAX_OPTIONS + 1)}, "tts", "not 65"),
        (ChatRequest, {**CHAT, "stream_options": many(65)}, "stream_options", "not 65"),
        (
            ChatRequest,
            {**CHAT, "chat_template_kwargs": many(65)},
            "chat_template_kwargs",
            "64",
        ),
        (
            ChatRequest,
            {**CHAT, "logit_bias": many(MAX_BIASES + 1)},
            "logit_bias",
            f"{MAX_BIASES} tokens",
        ),
        (ChatRequest, {**CHAT, "logit_bias": {"1" * 33: 1}}, "logit_bias." + "1" * 33, "at most 32 characters"),
        (ChatRequest, {**CHAT, "model": "m" * 513}, "model", "at most 512 characters are accepted, not 513"),
        (ChatRequest, {**CHAT, "reasoning_effort": "m" * 513}, "reasoning_effort", "at most 512 characters"),
        (CompletionRequest, {"prompt": [1] * (MAX_PROMPT_IDS + 1)}, "prompt", f"at most {MAX_PROMPT_IDS} token ids"),
        (CompletionRequest, {"prompt": [[1] * (MAX_PROMPT_IDS + 1)]}, "prompt", f"not {MAX_PROMPT_IDS + 1}"),
        (ResponsesRequest, {"input": [{}] * (MAX_MESSAGES + 1)}, "input", f"at most {MAX_MESSAGES} items"),
        (ResponsesRequest, {"input": "a", "text": many(65)}, "text", "not 65"),
        (ResponsesRequest, {"input": "a", "reasoning": many(65)}, "reasoning", "not 65"),
        (FeedbackRequest, {"request_id": "a" * 201, "correct": True}, "request_id", "at most 200 characters"),
    ],
)
def test_validation_stops_at_the_first_error(
    made: type[BaseModel], body: dict[str, Any], param: str, problem: str | None
) -> None:
    with pytest.raises(ValidationError) as failed:
        made.model_validate(body)
    assert failed.value.error_count() == 1
    with pytest.raises(BadRequest, match=problem) as refused:
        parse_request(made, json.dumps(body).encode())
    assert refused.value.param == param
    assert refused.value.message.startswith(f"{param}: ")


async def test_an_error_quotes_long_input_briefly(proxy: Proxy) -> None:
    long = "x" * 100_000
    for fields in (
        {"model": f"a@{long}"},
        {"model": long},
        {"logit_bias": {long: 1}},
        {"tts": {"controller": long}},
        {"tts": {"answer": f"{long}:"}},
        {"tts": {"answer": f"regex:{long}"}},
        {"tts": {long: 1}},
        {"max_tokens": long},
        {"max_tokens": int("9" * 4000)},
        {"seed": int("9" * 4000)},
        {"temperature": "9" * 5000},
    ):
        status, _, reply = await proxy.ask("0.5", **fields)
        check_error(reply, 400, status)
        assert len(json.dumps(reply)) < 2 * MOST_MESSAGE
    for raw in (f'{{"{long}":1,"{long}":1}}', f'{{"a":{"9" * 5000}}}', '{"a":' * 300 + "1" + "}" * 300):
        status, _, reply = await proxy.ask("0.5", raw=raw.encode())
        check_error(reply, 400, status, code="bad_json")
        assert len(json.dumps(reply)) < 2 * MOST_MESSAGE


def test_a_clipped_text_keeps_its_ends() -> None:
    assert clipped("abc", 3) == "abc"
    assert clipped("abcdefgh", 5) == "ab…gh"
    error = BadRequest("a" * 10**6, param="b" * 10**6)
    assert (len(error.message), len(error.param or ""), len(str(error))) == (MOST_MESSAGE, MOST_PARAM, MOST_MESSAGE)


def test_the_schema_describes_answer_kinds_as_strings() -> None:
    schemas = ChatRequest.model_json_schema()["$defs"]
    assert schemas["TtsOptions"]["properties"]["answer"] == {"type": "string", "default": "auto"}
    assert "AnswerKind" not in schemas


async def test_a_beta_out_of_float_range_is_refused(proxy: Proxy) -> None:
    raw = b'{"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 1e400}}'
    status, _, reply = await proxy.ask(None, raw=raw)
    check_error(reply, 400, status)


async def test_a_too_large_body_is_413(proxy: Proxy) -> None:
    status, _, reply = await proxy.ask("0.5", raw=b" " * (9 * 2**20))
    check_error(reply, 413, status, code="body_too_large")


async def test_an_unknown_model_gets_the_list_of_known_models(proxy: Proxy) -> None:
    for model in ("nope", "nope@0.5", "nope@nan", f"{MODEL}@latest", f"{MODEL}@high", f"{MODEL}@", f"@{MODEL}", "@"):
        status, _, reply = await proxy.ask(None, model=model)
        check_error(reply, 404, status, param="model", code="model_not_found")
        assert MODEL in reply["error"]["message"]


async def test_a_model_tag_that_is_not_a_number_is_explained(proxy: Proxy) -> None:
    _, _, reply = await proxy.ask(None, model=f"{MODEL}@latest")
    assert reply["error"]["message"].endswith(f"set β by a number, as in {MODEL}@0.5")
    with pytest.raises(NotFoundError):
        await proxy.openai.chat.completions.create(model=f"{MODEL}@latest", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/completions", "/v1/completions"),
        ("POST", "/responses", "/v1/responses"),
        ("POST", "/embeddings", "/v1/embeddings"),
        ("POST", "/openai/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/openai/deployments/some/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/engines/some/completions", "/v1/completions"),
        ("GET", "/api/v1/models", "/v1/models"),
        ("POST", "/api/chat", None),
        ("GET", "/models", "/v1/models"),
        ("GET", f"/models/{MODEL}", f"/v1/models/{MODEL}"),
        ("GET", "/v1/v1/models", "/v1/models"),
        ("POST", "/v1/chat/completion", "/v1/chat/completions"),
        ("POST", "/v1/embedding", "/v1/embeddings"),
        ("GET", "/v1/nothing", None),
        ("GET", "/nothing", None),
        ("GET", "/", None),
        ("GET", "/v1", None),
    ],
)
async def test_a_wrong_base_url_gets_a_suggestion(proxy: Proxy, method: str, path: str, meant: str | None) -> None:
    async with proxy.http.request(method, proxy.url + path) as response:
        reply = await response.json()
    check_error(reply, 404, response.status, code="not_found")
    message = reply["error"]["message"]
    assert ("did you mean" in message) == (meant is not None)
    assert meant is None or f"did you mean {meant}? A client's base URL ends in /v1" in message


async def test_a_wrong_method_gets_the_right_one(proxy: Proxy) -> None:
    async with proxy.http.get(f"{proxy.url}/v1/chat/completions") as response:
        reply = await response.json()
    check_error(reply, 405, response.status, code="method_not_allowed")
    assert reply["error"]["message"].endswith("; send POST")


@pytest.mark.parametrize(
    "name", ["tts-beta", "x-beta", "xtts-beta", "x-ttsbeta", "X_TTS_Beta", "x-autotts-beta", "x-tts-betta"]
)
async def test_a_header_that_means_beta_is_refused_under_another_name(proxy: Proxy, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers={name: "0.5"}) as response:
        reply = await response.json()
    check_error(reply, 400, response.status, param=name.lower(), code="unknown_header")
    assert "send x-tts-beta" in reply["error"]["message"]


async def test_headers_of_other_apis_that_name_a_beta_are_no_mistake(proxy: Proxy) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0, "answer": "boxed"}}
    headers = {"openai-beta": "assistants=v2", "anthropic-beta": "tools"}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("field", "option"),
    [("tts_beta", "beta"), ("tts.beta", "beta"), ("x-tts-beta", "beta"), ("tts_max_total_tokens", "max_total_tokens")],
)
async def test_an_option_beside_tts_is_refused_under_a_prefixed_name(proxy: Proxy, field: str, option: str) -> None:
    fields: dict[str, Any] = {field: 0.5}
    status, _, reply = await proxy.ask(None, **fields)
    check_error(reply, 400, status, param=field, code="unknown_field")
    assert f'as in "tts": {{"{option}":0.5}}' in reply["error"]["message"]


async def test_every_error_of_a_client_has_a_code(proxy: Proxy) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"tts": {"betta": 1}}, "unknown_field"),
        ({"deadline_s": 5}, "unknown_field"),
        ({"extra_body": {}}, "unknown_field"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"messages": 5}, "invalid_value"),
        ({"response_format": {"type": "json"}}, "invalid_value"),
    )
    for fields, code in cases:
        status, _, reply = await proxy.ask("0.5", **fields)
        check_error(reply, 400, status, code=code)
    assert reply["error"]["message"] == "response_format.type is 'json'; use json_schema, json_object or text"


async def test_the_openai_client_reports_a_wrong_base_url(proxy: Proxy) -> None:
    async with AsyncOpenAI(base_url=proxy.url, api_key="unused", max_retries=0) as client:
        with pytest.raises(NotFoundError, match="did you mean /v1/chat/completions"):
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])


async def test_unknown_paths_are_404_and_methods_405(proxy: Proxy) -> None:
    async with proxy.http.get(f"{proxy.url}/v1/nothing") as response:
        check_error(await response.json(), 404, response.status, code="not_found")
    async with proxy.http.get(f"{proxy.url}/v1/chat/completions") as response:
        check_error(await response.json(), 405, response.status)
        assert response.headers["allow"] == "POST"


def test_the_first_present_source_of_beta_wins() -> None:
    def source(**given: Any) -> tuple[float, BetaSource] | None:
        ways = {"body": None, "effort": None, "alias": None, "model": "m", "default": None} | given
        beta_setting = resolve(ways.pop("headers", []), **ways)
        return None if beta_setting is None else (beta_setting.value, beta_setting.source)

    everything: dict[str, Any] = {"headers": ["0.1"], "body": 0.2, "effort": "high", "alias": 0.4, "default": 0.5}
    for way, expected in [
        ("headers", (0.1, BetaSource.HEADER)),
        ("body", (0.2, BetaSource.BODY)),
        ("effort", (0.75, BetaSource.EFFORT)),
        ("alias", (0.4, BetaSource.ALIAS)),
        ("default", (0.5, BetaSource.DEFAULT)),
    ]:
        assert source(**everything) == expected
        del everything[way]
    assert source() is None
    assert source(effort="high", model="openai/gpt-oss-20b") is None
    assert source(effort="weird") is None


def test_an_alias_splits_into_model_and_beta() -> None:
    assert split_alias("a@b@0.5") == ("a@b", 0.5)
    assert split_alias("plain") == ("plain", None)
    assert split_alias("m@latest") == ("m@latest", None)
    for beta in ("2", "-1", "nan", "1e400", "1_0"):
        with pytest.raises(BadRequest):
            split_alias(f"m@{beta}")
