"""Requests that begin inside a character, on a real vLLM: no text of a prompt comes back."""

from __future__ import annotations

import os
import random
from typing import Any

import aiohttp
import pytest

pytest.importorskip("tokenizers", reason="the extra `embedded` is not installed; `make test` installs it")
from tokenizers import Tokenizer

from controllers import Fact, Round, advance, branch, probe
from deploy.embedded import SERVED_MODEL_NAME, server
from deploy.embedded.task import held_back
from discovery.answers import parse_kind
from proxy.environment.live_environment import LiveEnvironment
from proxy.recording import recorded_branches
from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.types import Call, EnvironmentLimits, Prompt
from proxy.upstream.client import UpstreamClient
from proxy.upstream.detokeniser import BROKEN
from tests.dictated import id_of, ids_of

pytestmark = pytest.mark.vllm

MODEL = SERVED_MODEL_NAME
SEAMS = int(os.environ.get("SOAK_SEAMS", "60"))
"""Number of requests that continue a branch, in each random test."""
CODE = "47xz11"
"""Code with letters that no hexadecimal identifier contains, as the ids of replies do."""
SECRET = f"SECRET: \\boxed{{{CODE}}}"
LETTERS = "é£ßж€漢字語😀🎉𝄞🀄ghj"
"""Characters of 1 to 4 bytes that do not occur in the secret."""
ROUNDS = 20


class DictatingEngine(UpstreamClient):
    """Client that makes the model write given ids, one token per request."""

    def __init__(self, *args: Any, prompt: list[int], texts: list[list[int]]) -> None:
        super().__init__(*args)
        self._prompt = prompt
        self._texts = texts
        self._opened = 0

    async def generate(self, model: str, call: Call) -> None:
        if not call.suffix_tokens:
            written = call.prompts[0][len(self._prompt) :]
            text = next(
                text for text in self._texts[0 if written else self._opened :] if text[: len(written)] == written
            )
            self._opened += not written
            call.sampling = {**call.sampling, "allowed_token_ids": [text[len(written)]], "ignore_eos": True}
        await super().generate(model, call)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(server.MODEL / "tokenizer.json"))


def texts_in(env: LiveEnvironment, rounds: list[Round]) -> list[str]:
    """Return every text of an episode: branches, probes and answers."""
    recorded = recorded_branches.branches(env, rounds)
    answers = [answer for part in recorded for answer in (*part.probes, part.final) if answer is not None]
    return [*(part.text for part in env.branches), *answers]


async def test_text_generated_one_token_per_request_equals_the_text_decoded_at_once(
    vllm: str, tokenizer: Tokenizer
) -> None:
    rng = random.Random(1)
    prompt = ids_of(tokenizer, SECRET)
    seams = 0
    async with aiohttp.ClientSession() as http:
        while seams < SEAMS:
            letters = ["".join(rng.choices(LETTERS, k=ROUNDS)) for _ in range(10)]
            texts = [ids_of(tokenizer, str(i) + text)[:ROUNDS] for i, text in enumerate(letters)]
            engine = DictatingEngine(vllm, http, prompt=prompt, texts=texts)
            asked = Prompt(MODEL, prompt, "", {}, seed=1, kind=parse_kind("boxed"))
            env = LiveEnvironment(engine, asked, EnvironmentLimits(1, ROUNDS, 4), keeps_all_branches=True)
            rounds = [await played(env, [branch() for _ in texts])]
            for _ in range(ROUNDS - 1):
                rounds.append(await played(env, [move for i in range(len(texts)) for move in (advance(i), probe(i))]))
                seams += 2 * len(texts)
            for part, ids, text in zip(env.branches, texts, letters, strict=True):
                assert part.ids == ids
                assert part.text == tokenizer.decode(ids).rstrip(BROKEN)
                assert text.startswith(part.text[1:])
            assert not any("SECRET" in text or CODE in text for text in texts_in(env, rounds))


async def played(env: LiveEnvironment, actions: list[Any]) -> Round:
    facts: list[Fact] = list(await env.execute(actions))
    return Round(actions, facts)


async def test_random_bytes_after_a_cut_character_leak_no_text_of_the_prompt(vllm: str, tokenizer: Tokenizer) -> None:
    count, interval = 40, 3
    cut = ids_of(tokenizer, "\N{GRINNING FACE}")[:2]
    prompt = [*ids_of(tokenizer, SECRET), *cut]
    liked = {"<|im_start|>": -7, "<think>": -12, "j": -5, "h": -5, "g": -5}  # more than any byte, unless biased
    bias = {id_of(tokenizer, piece): by for piece, by in liked.items()}
    allowed = sorted({i for letter in LETTERS for i in ids_of(tokenizer, letter)} | bias.keys())
    sampling = {"temperature": 2.0, "allowed_token_ids": allowed, "logit_bias": {str(i): bias[i] for i in bias}}
    seams = 0
    async with aiohttp.ClientSession() as http:
        while seams < SEAMS:
            asked = Prompt(MODEL, prompt, "", sampling, kind=parse_kind("boxed"))
            limits = EnvironmentLimits(interval, 500, 4)
            env = LiveEnvironment(UpstreamClient(vllm, http), asked, limits, keeps_all_branches=True)
            rounds = [await played(env, [branch() for _ in range(count)])]
            for _ in range(ROUNDS):
                rounds.append(await played(env, [advance(i) for i in range(count)]))
                seams += count
            decoded = [tokenizer.decode([*cut, *part.ids], skip_special_tokens=True) for part in env.branches]
            for part, text in zip(env.branches, decoded, strict=True):
                assert part.text.replace(BROKEN, "") == text.replace(BROKEN, "")
            assert not any(letter in text for text in texts_in(env, rounds) for letter in SECRET)


@pytest.mark.parametrize("stop", [None, ["zzz", CODE]])
@pytest.mark.parametrize("controller", ["cmc", "parallel_probe", "answer_consistency", "self_consistency"])
async def test_replies_contain_no_text_of_their_prompt(vllm: str, controller: str, stop: list[str] | None) -> None:
    question = held_back(1)[0].question
    secret_prompt = f"SECRET: the vault code is \\boxed{{{CODE}}}. {question}"
    messages = [{"role": "system", "content": secret_prompt[:40]}, {"role": "user", "content": question}]
    shared = {
        "seed": 11,
        "temperature": 1,
        "logit_bias": {"127": 60, "102": 60},
        "stop": stop,
        "tts": {"controller": controller, "answer": "boxed", "beta": 0.5, "max_total_tokens": 1500},
    }
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", {"messages": messages, "max_tokens": 64}),
        ("chat/completions", {"messages": messages, "max_tokens": 64, "stream": True}),
        ("completions", {"prompt": secret_prompt, "max_tokens": 200}),
        ("completions", {"prompt": secret_prompt, "stream": True}),
    ]
    async with running(load(upstream=vllm, **EMBEDDED)) as url, aiohttp.ClientSession() as http:
        for path, body in bodies:
            async with http.post(f"{url}/v1/{path}", json=shared | body) as response:
                text = await response.text()
                assert response.status == 200, text
                assert "SECRET" not in text
                assert "vault" not in text
                assert CODE not in text
