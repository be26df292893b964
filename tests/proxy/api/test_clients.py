"""Unmodified client libraries work against the proxy over a real vLLM as they do against OpenAI."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError, OpenAI

from deploy.embedded.task import held_back
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.proxy.conftest import Proxy

pytestmark = pytest.mark.vllm

MODEL = "autotts-tiny"
ALIAS = f"{MODEL}@0.25"
QUESTION = held_back(1, lengths=(4, 4))[0].question
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
"""The question as rendered by the model's chat template."""
WEIGHTS = Path(__file__).parents[3] / "deploy" / "embedded" / "model"


@pytest_asyncio.fixture
async def url(vllm: str) -> AsyncIterator[str]:
    """Yield the base URL for clients."""
    async with running(load(upstream=vllm, **EMBEDDED)) as served:
        yield f"{served}/v1"


def check(headers: Any, reply: Any) -> None:
    """Assert that a reply was served with β and that its headers, usage and token bill agree."""
    body = reply.model_dump()
    assert (headers["x-tts-applied"], headers["x-tts-beta"]) == ("true", "0.25")
    assert headers["x-tts-tokens"] == str(body["tts"]["tokens"]["total"])
    check_bill(body["tts"], body["usage"])


def check_bill(tts: Any, usage: Any = None) -> None:
    """Assert that the token bill of a reply adds up and covers the generated tokens of its usage."""
    assert (tts["applied"], tts["beta"]) == (True, 0.25)
    tokens = dict(tts["tokens"])
    total = tokens.pop("total")
    assert total == sum(tokens.values()) > 0
    assert tts["branches"] > 1
    if usage is not None:
        generated = usage.get("completion_tokens", usage.get("output_tokens"))
        assert 0 < generated <= total


async def test_the_synchronous_openai_client_gets_tts_replies_from_every_endpoint(url: str) -> None:
    def ask() -> None:
        with OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            assert client.models.retrieve(ALIAS).id == ALIAS
            raw = client.chat.completions.with_raw_response.create(model=ALIAS, messages=MESSAGES)
            check(raw.headers, raw.parse())
            assert "\\boxed{" in (raw.parse().choices[0].message.content or "")
            with client.chat.completions.stream(model=ALIAS, messages=MESSAGES) as stream:
                *_, last = [event.chunk for event in stream if event.type == "chunk"]
                check_bill(last.model_dump()["tts"])
                assert "\\boxed{" in (stream.get_final_completion().choices[0].message.content or "")
            text = client.completions.with_raw_response.create(model=ALIAS, prompt=PROMPT, max_tokens=400)
            check(text.headers, text.parse())
            assert "\\boxed{" in text.parse().choices[0].text
            chunks = list(client.completions.create(model=ALIAS, prompt=PROMPT, max_tokens=400, stream=True))
            check_bill(chunks[-1].model_dump()["tts"])
            assert "\\boxed{" in "".join(chunk.choices[0].text for chunk in chunks)
            response = client.responses.with_raw_response.create(model=ALIAS, input=QUESTION)
            check(response.headers, response.parse())
            assert "\\boxed{" in response.parse().output_text

    await asyncio.to_thread(ask)


async def test_the_asynchronous_openai_client_gets_tts_replies_from_every_endpoint(url: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        assert ALIAS in [model.id async for model in client.models.list()]
        conversation: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
        async with client.responses.stream(model=ALIAS, input=conversation) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        assert "\\boxed{" in final.output_text
        body = final.model_dump()
        check_bill(body["tts"], body["usage"])
        async with client.responses.with_streaming_response.create(model=ALIAS, input=QUESTION) as response:
            parsed = await response.parse()
            check(response.headers, parsed)
            assert "\\boxed{" in parsed.output_text
        stream_of_chunks = await client.chat.completions.create(
            model=ALIAS, messages=MESSAGES, stream=True, extra_body={"tts": {"progress": True}}
        )
        chunks = [chunk async for chunk in stream_of_chunks]
        check_bill(chunks[-1].model_dump()["tts"])
        assert "\\boxed{" in "".join([chunk.choices[0].delta.content or "" for chunk in chunks])


async def test_a_prompt_as_text_as_ids_and_as_messages_gives_the_same_answer(url: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        tokens: Any = await client.with_options(base_url=url.removesuffix("/v1")).post(
            "/tokenize", body={"model": MODEL, "prompt": PROMPT}, cast_to=object
        )
        sampled: dict[str, Any] = {"seed": 3, "extra_body": {"tts": {"controller": "self_consistency"}}}
        text = await client.completions.create(model=ALIAS, prompt=PROMPT, **sampled)
        ids = await client.completions.create(model=ALIAS, prompt=tokens["tokens"], **sampled)
        chat = await client.chat.completions.create(model=ALIAS, messages=MESSAGES, **sampled)
    assert text.choices[0].text == ids.choices[0].text
    assert text.choices[0].text.endswith(chat.choices[0].message.content or "-")
    assert text.usage is not None
    assert ids.usage is not None
    assert chat.usage is not None
    assert text.usage.total_tokens == ids.usage.total_tokens == chat.usage.total_tokens


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_extra_fields_that_clients_send_by_default_keep_beta_applied(url: str) -> None:
    """Fields that inspect_ai, llm, LiteLLM and OpenRouter's clients add to every request."""
    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        response = await client.responses.with_raw_response.create(
            model=ALIAS,
            input=QUESTION,
            include=["reasoning.encrypted_content"],
            truncation="auto",
            text={"format": {"type": "text"}, "verbosity": "medium"},
            store=False,
        )
        check(response.headers, response.parse())
        again = [
            {"role": "user", "content": QUESTION},
            *response.parse().output,
            {"role": "user", "content": "Sure?"},
        ]
        items: Any = [item if isinstance(item, dict) else item.model_dump(exclude_none=True) for item in again]
        second = await client.responses.with_raw_response.create(model=ALIAS, input=items)
        check(second.headers, second.parse())
        raw = await client.chat.completions.with_raw_response.create(
            model=ALIAS,
            messages=MESSAGES,
            verbosity="medium",
            function_call="none",
            response_format={"type": "text"},
            extra_body={
                "include_reasoning": True,
                "skip_special_tokens": True,
                "min_tokens": 0,
                "usage": {"include": True},
                "provider": {"order": ["x"]},
                "cache_prompt": True,
            },
        )
        check(raw.headers, raw.parse())


async def test_a_batch_of_prompts_as_lm_eval_sends_it_is_answered_per_prompt(url: str) -> None:
    """Send what lm-eval's `local-completions` sends with `batch_size=2`."""
    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        raw = await client.completions.with_raw_response.create(
            model=ALIAS, prompt=[PROMPT, PROMPT], max_tokens=400, temperature=0, seed=1234
        )
        pair = raw.parse()
        check(raw.headers, pair)
        assert [choice.index for choice in pair.choices] == [0, 1]
        assert all("\\boxed{" in choice.text for choice in pair.choices)


async def test_without_beta_replies_equal_those_of_vllm(url: str, vllm: str) -> None:
    greedy: dict[str, Any] = {"model": MODEL, "temperature": 0}
    async with (
        AsyncOpenAI(base_url=url, api_key="unused") as ours,
        AsyncOpenAI(base_url=vllm + "/v1", api_key="x") as own,
    ):
        texts = [await client.completions.create(prompt=PROMPT, max_tokens=300, **greedy) for client in (ours, own)]
        replies = [await client.responses.create(input=QUESTION, **greedy) for client in (ours, own)]
        pair = await ours.completions.create(model=MODEL, prompt=[PROMPT, PROMPT], max_tokens=4)
        with pytest.raises(BadRequestError, match="vocab"):
            await ours.completions.create(model=ALIAS, prompt=[10**9])
    assert texts[0].choices[0].text == texts[1].choices[0].text
    assert replies[0].output_text == replies[1].output_text
    assert (len(pair.choices), pair.model) == (2, MODEL)


async def test_langchain_gets_tts_replies_from_chat_and_responses(url: str) -> None:
    from langchain_openai import ChatOpenAI

    seen: list[httpx.Response] = []

    async def see(response: httpx.Response) -> None:
        seen.append(response)

    hooks = {"response": [see]}
    # LangChain's own client is cached forever and never closed.
    async with httpx.AsyncClient(timeout=60, event_hooks=hooks) as http:
        common: dict[str, Any] = {"model": ALIAS, "base_url": url, "api_key": "unused", "max_retries": 0}
        for fields in ({}, {"use_responses_api": True}):
            chat = ChatOpenAI(**common, **fields, http_async_client=http)
            reply = await chat.ainvoke(QUESTION)
            assert "\\boxed{" in reply.text
            assert reply.usage_metadata is not None
            assert reply.usage_metadata["output_tokens"] > 0
            assert "\\boxed{" in "".join([chunk.text async for chunk in chat.astream(QUESTION)])
            for response in seen:
                assert (response.headers["x-tts-applied"], response.headers["x-tts-beta"]) == ("true", "0.25")
            assert int(seen[0].headers["x-tts-tokens"]) >= reply.usage_metadata["output_tokens"]
            assert len(seen) == 2
            seen.clear()


LITELLM = """
import asyncio, json, sys
import litellm

litellm.telemetry = False
url, model, question = sys.argv[1:]
asked = {"model": f"openai/{model}", "api_base": url, "api_key": "unused", "max_retries": 0}
messages = [{"role": "user", "content": question}]

def tts_headers(reply):
    headers = reply._hidden_params["additional_headers"]
    names = ("applied", "beta", "tokens")
    return {name: headers[f"llm_provider-x-tts-{name}"] for name in names} | {"usage": reply.usage.completion_tokens}

async def ask():
    return await litellm.acompletion(**asked, messages=messages)

replies = [litellm.completion(**asked, messages=messages), asyncio.run(ask())]
stream = litellm.completion(**asked, messages=messages, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
headers = stream._hidden_params["additional_headers"]
print(json.dumps({
    "answers": [reply.choices[0].message.content for reply in replies] + [text],
    "headers": [tts_headers(reply) for reply in replies],
    "stream": [headers["llm_provider-x-tts-applied"], headers["llm_provider-x-tts-beta"]],
}))
"""


async def test_litellm_gets_tts_headers_and_answers(url: str) -> None:
    """Run LiteLLM in its own process, because it changes the one that imports it. It must not fetch prices."""
    local = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "no_proxy": "127.0.0.1"}
    lines = await run([sys.executable, "-c", LITELLM, url, ALIAS, QUESTION], local)
    seen = json.loads(lines.splitlines()[-1])
    assert len(seen["answers"]) == 3
    assert all("\\boxed{" in answer for answer in seen["answers"])
    for sent in seen["headers"]:
        assert (sent["applied"], sent["beta"]) == ("true", "0.25")
        assert int(sent["tokens"]) >= sent["usage"] > 0
    assert seen["stream"] == ["true", "0.25"]


OVERFLOW = """
import json, sys
import litellm

litellm.telemetry = False
url, model, question = sys.argv[1:]
asked = {"api_base": url, "api_key": "unused", "max_retries": 0}
long = [{"role": "user", "content": question * 60}]
seen = []
for name, stream in (("openai", False), ("openai", True), ("text-completion-openai", False)):
    try:
        list(litellm.completion(model=f"{name}/{model}", messages=long, stream=stream, **asked))
    except litellm.ContextWindowExceededError as error:
        seen.append(str(error))
try:
    litellm.responses(model=f"openai/{model}", input=question * 60, **asked)
except litellm.ContextWindowExceededError as error:
    seen.append(str(error))
router = litellm.Router(
    model_list=[
        {"model_name": "small", "litellm_params": {"model": f"openai/{model}", **asked}},
        {"model_name": "large", "litellm_params": {"model": "openai/large", "api_key": "x", "mock_response": "large"}},
    ],
    context_window_fallbacks=[{"small": ["large"]}],
    num_retries=0,
)
fallback = router.completion(model="small", messages=long).choices[0].message.content
print(json.dumps([seen, fallback]))
"""


async def test_litellm_raises_context_window_exceeded_for_a_long_prompt(url: str) -> None:
    local = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "no_proxy": "127.0.0.1"}
    lines = await run([sys.executable, "-c", OVERFLOW, url, ALIAS, QUESTION], local)
    seen, fallback = json.loads(lines.splitlines()[-1])
    assert len(seen) == 4
    assert all("This model's maximum context length is 1024 tokens." in message for message in seen)
    assert fallback == "large"


VLLM = """
import sys
from deploy.embedded import mends

mends.apply()
from vllm.entrypoints.cli.main import main

sys.exit(main())
"""
"""The `vllm` command with the fixes that its CPU wheel needs to be imported."""


async def test_vllm_bench_serve_measures_requests_with_beta(
    url: str, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """The benchmark asks for `ignore_eos` and still measures what β costs."""
    command = [sys.executable, "-c", VLLM, "bench", "serve"]
    options = ["--backend", "openai-chat", "--base-url", url.removesuffix("/v1"), "--endpoint", "/v1/chat/completions"]
    options += ["--model", ALIAS, "--tokenizer", str(WEIGHTS), "--dataset-name", "random", "--num-prompts", "4"]
    options += ["--random-input-len", "30", "--random-output-len", "40", "--max-concurrency", "2", "--disable-tqdm"]
    options += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "figures.json"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    await run([*command, *options], offline)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["completed"], figures.get("failed", 0)) == (4, 0)
    proxy = Proxy(None, url.removesuffix("/v1"), http, None)  # type: ignore[arg-type]
    assert await proxy.metric("autotts_beta_not_applied_total") == 0
    assert await proxy.metric("autotts_requests_total", outcome="answered") == 4
    spent = await proxy.metric("autotts_tokens_total", model=MODEL)
    assert spent >= figures["total_output_tokens"] > 4 * 40 * 2  # it measures the tokens of all branches


async def run(command: list[str], environment: dict[str, str]) -> str:
    """Return what a command writes to stdout. Fail if it exits with an error."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environment)
    try:
        out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 0, errors.decode()[-3000:]
    return out.decode()
