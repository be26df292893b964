"""The proxy conforms to its OpenAPI document, and no generated request makes it fail with a 5xx error."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from proxy.api.routes import ROUTES
from proxy.app import create_app
from proxy.settings import load
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.conftest import INTERVAL, Proxy

pytestmark = pytest.mark.slow

EXAMPLES = 25
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest_asyncio.fixture
async def backend(backend: FakeVLLM) -> AsyncIterator[FakeVLLM]:
    """Serve the same chains, but refuse invalid requests as vLLM does."""
    polite = FakeVLLM(backend.chains, INTERVAL)
    polite.is_polite = True
    async with polite.serve():
        yield polite


def document() -> dict[str, Any]:
    return create_app(load(upstream="http://127.0.0.1:1")).openapi()


def test_the_openapi_document_has_every_route_but_the_docs_page() -> None:
    described = {(path, method.upper()) for path, methods in document()["paths"].items() for method in methods}
    assert described == {(route.path.replace(":path", ""), route.method) for route in ROUTES if route.operation}
    assert {route.path for route in ROUTES if not route.operation} == {"/docs", "/docs/{asset}"}


async def test_the_openapi_document_is_served(proxy: Proxy) -> None:
    async with proxy.http.get(f"{proxy.url}/openapi.json") as response:
        assert await response.json() == document()


async def test_the_docs_page_loads_nothing_from_other_hosts(proxy: Proxy) -> None:
    async with proxy.http.get(f"{proxy.url}/docs") as response:
        assert response.status == 200
        page = await response.text()
    links = re.findall(r"""(?:src|href|url)(?:=|: )["']([^"']+)""", page)
    assert {*links} == {"docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "docs/favicon.png", "openapi.json"}
    for link in links:
        async with proxy.http.get(f"{proxy.url}/{link}") as response:
            assert response.status == 200, link
    async with proxy.http.get(f"{proxy.url}/docs/redoc.standalone.js") as response:
        assert response.status == 404


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", [route.path.replace(":path", "") for route in ROUTES if route.operation])
async def test_responses_conform_to_the_openapi_document(proxy: Proxy, path: str, mode: GenerationMode) -> None:
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document()).get_all_operations()]  # type: ignore[union-attr]
    (operation,) = [candidate for candidate in operations if candidate.path == path]
    checks = [*CHECKS, negative_data_rejection] if "tts/feedback" in path else CHECKS

    @bounded
    @given(case=operation.as_strategy(generation_mode=mode))
    def conforms(case: Any) -> None:
        response = case.call(base_url=proxy.url, timeout=30)
        case.validate_response(response, checks=checks)

    try:
        await asyncio.to_thread(conforms)
    except Exception as error:
        if "nsatisfiable" not in type(error).__name__:  # no invalid request can be generated for it
            raise


# Generated requests

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
TTS = st.fixed_dictionaries(
    {},
    optional={
        "beta": st.sampled_from([0, 0.5, 1, -1, "0.5", None, True, 1e300]),
        "controller": st.sampled_from(["cmc", "asc@2", "sc@9999999", "everything", "x.py", "", "asc@x"]) | st.text(),
        "max_total_tokens": st.integers() | st.sampled_from([1, 300, 2**31]),
        "deadline_s": st.sampled_from([0.001, 0, 1e9, "1"]),
        "answer": st.sampled_from(["boxed", "regex:(", "regex:a", "json", "text", "code:lines"]) | st.text(),
        "required": st.booleans() | JSON,
        "target_tokens": st.integers(),
        "min_agreement": st.sampled_from([0, 0.5, 1, -1, "0.5", 1e300]) | JSON,
        "otherwise": st.sampled_from(["answer", "flag", "escalate", "retry"]) | JSON,
        "escalate_beta": st.sampled_from([0, 0.5, 1, 2]) | JSON,
        "progress": JSON,
    },
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool", "", 5]), "content": JSON | st.text()}),
    max_size=3,
)
CHAT = st.fixed_dictionaries(
    {"model": st.sampled_from([MODEL, f"{MODEL}@0.5", f"{MODEL}@nan", "nope", "", 5, None])},
    optional={
        "messages": MESSAGES | JSON,
        "tts": TTS | JSON,
        "stream": st.booleans() | JSON,
        "stream_options": st.just({"include_usage": True}) | JSON,
        "stop": st.lists(st.text(max_size=3), max_size=5) | JSON,
        "seed": st.integers() | JSON,
        "temperature": st.floats(allow_nan=False, allow_infinity=False) | JSON,
        "max_tokens": st.integers() | JSON,
        "n": st.integers() | JSON,
        "logit_bias": st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=2) | JSON,
        "response_format": JSON,
        "reasoning_effort": st.sampled_from(["low", "high", "weird"]) | JSON,
        "chat_template_kwargs": JSON,
    },
)
FEEDBACK = st.fixed_dictionaries(
    {},
    optional={"request_id": st.text() | JSON, "id": JSON, "correct": JSON, "score": JSON, "answer": JSON},
)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20)
HEADERS = st.fixed_dictionaries(
    {"content-type": st.sampled_from([*["application/json"] * 9, "text/plain", "a/b; charset=x", ""]) | VALUES},
    optional={
        "x-tts-beta": st.sampled_from(["0", "0.5", "1", "nan", "", "½"]) | VALUES,
        "authorization": VALUES.map("Bearer {}".format) | VALUES,
        "accept": VALUES,
        "x-request-id": VALUES,
        "traceparent": VALUES,
        "idempotency-key": VALUES,
    },
)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("path", "bodies"),
    [
        ("/v1/chat/completions", CHAT.map(encoded) | JSON.map(encoded) | st.binary(max_size=50)),
        ("/v1/tts/feedback", FEEDBACK.map(encoded) | JSON.map(encoded) | st.binary(max_size=50)),
    ],
)
async def test_no_generated_request_causes_a_5xx_error(
    proxy: Proxy, path: str, bodies: st.SearchStrategy[bytes]
) -> None:
    with requests.Session() as session:

        @settings(bounded, max_examples=200)
        @given(body=bodies, headers=HEADERS)
        def holds(body: bytes, headers: dict[str, str]) -> None:
            sent = {name: value.strip().encode("latin-1") for name, value in headers.items()}
            response = session.post(proxy.url + path, data=body, headers=sent, timeout=30)
            assert response.status_code < 500, response.text
            if "event-stream" not in response.headers["content-type"] and response.status_code >= 400:
                assert set(response.json()["error"]) >= {"message", "code"}

        run: Callable[[], None] = holds
        await asyncio.to_thread(run)
    assert proxy.backend.running == 0
