"""The text of branches whose requests begin inside a character, with tokenizers of both kinds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest

pytest.importorskip("tokenizers", reason="the extra `embedded` is not installed; `make test` installs it")
from tokenizers import Tokenizer

from controllers import Probed, advance, branch, probe
from controllers.signals import ALL_SIGNALS, NO_SIGNALS, Signal, interval_signals
from discovery.answers import parse_kind
from proxy.environment.live_environment import LiveEnvironment
from proxy.errors import UpstreamRefused
from proxy.probe_templates import TEMPLATES, Family
from proxy.types import EnvironmentLimits, Prompt
from proxy.upstream.client import UpstreamClient
from proxy.upstream.detokeniser import (
    BROKEN,
    MOST_LEARNT,
    MOST_SUFFIXES,
    Detokeniser,
    Ending,
    TokenEndings,
    TokenInfo,
)
from tests.dictated import MARK, MODEL, DictatedVLLM, byte_level, id_of, ids_of, sentence_piece
from tests.fakes import log_probability

KINDS = pytest.mark.parametrize("make", [byte_level, sentence_piece])
LETTERS = "the sea on in an aé ß€漢字語😀🎉𝄞 \n.:7"
"""Characters of 1 to 4 bytes."""


@asynccontextmanager
async def environment(
    backend: DictatedVLLM,
    interval: int,
    *,
    stop: Sequence[str] = (),
    special: bool = False,
    signals: frozenset[Signal] = NO_SIGNALS,
) -> AsyncIterator[LiveEnvironment]:
    template = replace(TEMPLATES[Family.PLAIN], special=special)
    prompt = Prompt(MODEL, backend.prompt, "", {}, stop=stop, kind=parse_kind("boxed"), template=template)
    async with backend.serve(), aiohttp.ClientSession() as http:
        limits = EnvironmentLimits(interval, 2000, 8)
        engine = UpstreamClient(backend.url, http)
        yield LiveEnvironment(engine, prompt, limits, keeps_all_branches=True, signals=signals)


async def run_out(env: LiveEnvironment, count: int, probes: bool = False) -> None:
    """Open `count` branches and advance each, an interval a round, until all have ended."""
    await env.execute([branch() for _ in range(count)])
    while running := [i for i in range(count) if env.branches[i].finish is None]:
        await env.execute([move for i in running for move in ([probe(i)] if probes else []) + [advance(i)]])


@KINDS
@pytest.mark.parametrize("interval", [1, 4])
async def test_log_probabilities_stay_aligned_where_requests_meet_inside_characters(
    make: Callable[[], Tokenizer], interval: int
) -> None:
    tokenizer = make()
    rng = random.Random(interval)
    texts = random_texts(rng, tokenizer, marks=True)[:6]
    backend = DictatedVLLM(tokenizer, ids_of(tokenizer, "SECRET:"), texts)
    async with environment(backend, interval, stop=["HALT"], signals=ALL_SIGNALS) as env:
        await run_out(env, len(texts), probes=True)
        for live in env.branches:
            expected = [log_probability(token, at) for at, token in enumerate(live.ids)]
            assert list(live.log_probabilities) == expected
            parts = [interval_signals(expected[at : at + interval]) for at in range(0, len(expected), interval)]
            assert live.interval_signals == parts[: len(expected) // interval]


def plain(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decode ids as a server does in a single request."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def random_texts(rng: random.Random, tokenizer: Tokenizer, *, marks: bool) -> list[list[int]]:
    """Return ids of texts of up to 30 characters with distinct first ids. With `marks`, some have special tokens."""
    texts = []
    for first in "abcdefghijklmnopqrstuvwxyz":
        letters = [rng.choice(LETTERS) for _ in range(rng.randint(0, 30))]
        pieces = [MARK if marks and rng.random() < 0.2 else letter for letter in letters]
        texts.append([id_of(tokenizer, first), *ids_of(tokenizer, "".join(pieces))])
    return texts


@KINDS
@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("interval", [1, 2, 3, 5, 9])
async def test_text_generated_in_intervals_equals_the_text_decoded_at_once(
    make: Callable[[], Tokenizer], marks: bool, interval: int
) -> None:
    tokenizer = make()
    rng = random.Random(interval + 100 * marks)
    prompt = ids_of(tokenizer, "SECRET:")
    texts = random_texts(rng, tokenizer, marks=marks)
    backend = DictatedVLLM(tokenizer, prompt, texts)
    async with environment(backend, interval) as env:
        await run_out(env, len(texts))
        begun = plain(prompt, tokenizer)
        expected = sorted(plain([*prompt, *text], tokenizer).removeprefix(begun) for text in texts)
        assert sorted(part.text for part in env.branches) == expected
    assert any("SECRET" in text for text in backend.shown)  # the server sent the prompt


@KINDS
@pytest.mark.parametrize("letter", ["é", "€", "漢", "😀", " 😀", BROKEN])
async def test_a_prompt_that_ends_inside_a_character_does_not_garble_the_branch(
    make: Callable[[], Tokenizer], letter: str
) -> None:
    tokenizer = make()
    head = ids_of(tokenizer, "SECRET:x")
    halves = ids_of(tokenizer, "SECRET:x" + letter)[len(head) :]
    rest = ids_of(tokenizer, "xthe sea")[len(ids_of(tokenizer, "x")) :]
    for cut in range(1, len(halves) + 1):
        backend = DictatedVLLM(tokenizer, [*head, *halves[:cut]], [[*halves[cut:], *rest]])
        async with environment(backend, 1) as env:
            await run_out(env, 1)
        if letter == BROKEN and cut < len(halves):
            continue  # in a prompt, half a replacement character looks like a complete one
        is_begun = cut < len(halves)
        assert env.branches[0].text.strip() == f"{letter.strip() if is_begun else ''}the sea", cut


@KINDS
@pytest.mark.parametrize("skips", [True, False])
async def test_special_tokens_after_half_a_character_do_not_leak_the_prompt(
    make: Callable[[], Tokenizer], skips: bool
) -> None:
    tokenizer = make()
    mark = id_of(tokenizer, MARK)
    half, rest = ids_of(tokenizer, "a😀")[-4:-1], ids_of(tokenizer, "the sea")
    backend = DictatedVLLM(tokenizer, ids_of(tokenizer, "SECRET:"), [[*half, mark, mark, mark, *rest]])
    async with environment(backend, 2, special=not skips) as env:
        await run_out(env, 1)
        text = env.branches[0].text
    assert "SECRET" not in text
    assert text.count(MARK) == (0 if skips else 3)
    assert text.endswith("the sea")


@KINDS
async def test_a_branch_that_ends_inside_a_character_is_probed_and_closed_correctly(
    make: Callable[[], Tokenizer],
) -> None:
    tokenizer = make()
    prompt = ids_of(tokenizer, "SECRET:")
    half = ids_of(tokenizer, "so 4 😀")[:-1]
    backend = DictatedVLLM(tokenizer, prompt, [[*half, *ids_of(tokenizer, "4")]])
    async with environment(backend, len(half)) as env:
        _, probed = await env.execute([branch(), probe(0)])
        assert isinstance(probed, Probed)
        assert env.labels.written(probed.label or 0) == "4"
        assert env.branches[0].text.strip() == "so 4"
        closing = await env.suffix(0, lead=False)
        assert plain(closing, tokenizer).strip(" ") == "\n\n"
        output = await env.extend(0, closing, 5, {"temperature": 0.0})
        assert output.text.strip() == "4}"
        output = await env.extend(0, [], 5, {"temperature": 0.0})  # nothing between the halves
        assert "SECRET" not in output.text
        assert "SECRET" in backend.shown[-1]


@KINDS
async def test_a_stop_string_of_the_prompt_does_not_end_a_branch(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    text = ids_of(tokenizer, "an 😀 in the sea")
    for interval in range(2, len(text)):
        backend = DictatedVLLM(tokenizer, ids_of(tokenizer, "SECRET:"), [text])
        async with environment(backend, interval, stop=["SECRET", "the s"]) as env:
            await run_out(env, 1)
        assert env.branches[0].text.strip() == "an 😀 in", interval
        assert env.branches[0].finish == "stop"


async def test_text_of_a_failed_detokenisation_is_not_kept() -> None:
    tokenizer = byte_level()
    half = ids_of(tokenizer, "a😀")[:-1]
    backend = DictatedVLLM(tokenizer, ids_of(tokenizer, "SECRET:"), [[*half, *ids_of(tokenizer, "the sea")]])
    async with environment(backend, len(half)) as env:
        await env.execute([branch()])
        env.engine.detokenise = _refused  # type: ignore[method-assign]
        with pytest.raises(UpstreamRefused):
            await env.execute([advance(0)])
        env.salvage()
    assert env.branches[0].text == "a"
    assert env.branches[0].ids == half


async def _refused(*_: object, **__: object) -> str:
    raise UpstreamRefused(400, "not now")


async def test_seams_between_complete_characters_need_no_call_once_their_ids_are_known() -> None:
    tokenizer = byte_level()
    text = ids_of(tokenizer, "the sea, 4 on 4 " * 20)
    backend = DictatedVLLM(tokenizer, ids_of(tokenizer, "SECRET:"), [text])
    async with environment(backend, 3) as env:
        await run_out(env, 1)
        asked = backend.decoded
        again = LiveEnvironment(env.engine, env.prompt, env.limits, keeps_all_branches=True)
        await run_out(again, 1)
        assert again.branches[0].text == env.branches[0].text
        assert backend.decoded == asked <= len(set(text)) + len(set(backend.prompt))


async def test_token_endings_are_learnt_for_ordinary_and_special_tokens() -> None:
    tokenizer = byte_level()
    backend = DictatedVLLM(tokenizer, ids_of(tokenizer, "SECRET:"), [[1]])
    async with environment(backend, 3) as env:
        detokeniser = Detokeniser(env.engine, MODEL)
        assert await detokeniser.seam(ids_of(tokenizer, "the"), 0) is None
        ending = {piece: env.engine.token_endings.get(MODEL, id_of(tokenizer, piece)) for piece in ("the", MARK)}
        assert ending["the"] == TokenInfo("the", Ending.WHOLE)
        assert ending[MARK] is None
        half = [*ids_of(tokenizer, "the😀")[:-1], id_of(tokenizer, MARK)]
        assert await detokeniser.seam(half, 0) is not None
        assert env.engine.token_endings.get(MODEL, half[-1]) == TokenInfo(MARK, Ending.UNKNOWN)
        assert await detokeniser.seam(ids_of(tokenizer, "the😀"), 0) is None  # the emoji is complete


async def test_concurrent_seams_share_the_decoding_of_the_same_tokens() -> None:
    tokenizer = byte_level()
    prompt = ids_of(tokenizer, "4 on 4 : 7")
    backend = DictatedVLLM(tokenizer, prompt, [[1]])
    async with environment(backend, 3) as env:
        detokeniser = Detokeniser(env.engine, MODEL)
        await asyncio.gather(*(detokeniser.seam(prompt, 0) for _ in range(50)))
        assert backend.decoded <= MOST_LEARNT * len(env.engine.token_endings)


def test_the_cache_of_token_endings_is_bounded() -> None:
    endings = TokenEndings(most=3)
    for token in range(5):
        endings.add(MODEL, token, TokenInfo("x", Ending.WHOLE))
    assert len(endings) == 3
    assert [endings.get(MODEL, token) is None for token in range(5)] == [True, True, False, False, False]


async def test_the_cache_of_suffixes_is_bounded() -> None:
    async with aiohttp.ClientSession() as session:
        suffixes = UpstreamClient("http://127.0.0.1:9", session)._suffix_ids
    for number in range(MOST_SUFFIXES + 5):
        suffixes[f"model {number}", "x"] = [number]
    assert len(suffixes) == MOST_SUFFIXES
    assert ("model 4", "x") not in suffixes
    assert suffixes["model 5", "x"] == [5]
