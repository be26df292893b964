"""A fake vLLM server that decodes with a real tokenizer as vLLM does and generates given token ids.

Where a prompt ends inside a character, the completion's text begins with that character, as in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.decoders import DecodeStream

from tests.fakes import completion_logprobs, listening

MODEL = "dictated"
MARK, END = "<|mark|>", "<|end|>"
"""Special tokens, which are not part of the text. END ends a reply."""
MERGES = [("s", "e"), ("r", "e"), ("t", "h"), ("th", "e"), ("the", "n"), ("o", "n"), ("i", "n"), ("a", "n")]


def byte_level() -> Tokenizer:
    """Return a byte-level BPE tokenizer with a few merges; one token is a space and half an emoji."""
    space, first, second = (_letter(byte) for byte in b" \xf0\x9f")
    merges = [*MERGES, (first, second), (space, first + second)]
    pieces = [*map(_letter, range(256)), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in (MARK, END)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Return a BPE tokenizer as SentencePiece builds it: spaces are letters, unknown characters fall back to bytes."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,:{}\\\n0123456789SECRT"]
    merges = [*MERGES, ("▁", "the"), ("▁", "a")]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", *bytes_, *letters, *("".join(merge) for merge in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in (MARK, END)])
    return tokenizer


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    """Return the id of a piece of the vocabulary."""
    token = tokenizer.token_to_id(piece)
    assert token is not None
    return token


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text, without the special tokens that begin a prompt."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def _letter(byte: int) -> str:
    """Return the letter that byte-level tokenizers use for a byte."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in printed else chr(0x100 + [b for b in range(256) if b not in printed].index(byte))


class _Generated(NamedTuple):
    ids: list[int]
    text: str
    finish: str
    stop: str | None


class DictatedVLLM:
    """The generating part of vLLM's HTTP interface. It generates `texts`, given as ids without the end token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        self.tokenizer = tokenizer
        self.prompt = list(prompt)
        self.end = id_of(tokenizer, END)
        self.texts = [[*text, self.end] for text in texts]
        self.after_lead = tokenizer.encode("4}", add_special_tokens=False).ids  # how it answers a probe
        self.opened = 0
        self.completions: list[dict[str, Any]] = []
        self.decoded = 0  # requests to /detokenize
        self.shown: list[str] = []  # every text it sent
        self.url = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[DictatedVLLM]:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenise)
        app.router.add_post("/detokenize", self._detokenise)
        app.router.add_post("/v1/completions", self._completions)
        async with listening(app) as self.url:
            yield self

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "max_model_len": 4000}]})

    async def _tokenise(self, request: web.Request) -> web.Response:
        text = (await request.json())["prompt"]
        return web.json_response({"tokens": self.tokenizer.encode(text, add_special_tokens=False).ids})

    async def _detokenise(self, request: web.Request) -> web.Response:
        self.decoded += 1
        ids = (await request.json())["tokens"]
        return web.json_response({"prompt": self.tokenizer.decode(ids, skip_special_tokens=False)})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.completions.append(body)
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        written = [self._generate(prompt, body) for prompt in prompts for _ in range(body["n"])]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for index, (ids, text, finish, stop) in enumerate(written):
            self.shown.append(text)
            for at in (0, 1):  # in two chunks, the text all in the second
                new = ids[1:] if at else ids[:1]
                part = {"index": index, "token_ids": new, "text": text if at else ""}
                ended = {"finish_reason": finish, "stop_reason": stop} if at else {"finish_reason": None}
                part["logprobs"] = self._logprobs(new, len(prompts[index // body["n"]]) + at, body)
                await response.write(b"data: " + json.dumps({"choices": [part | ended]}).encode() + b"\n\n")
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": sum(len(one.ids) for one in written)}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    def _logprobs(self, ids: Sequence[int], context: int, body: dict[str, Any]) -> dict[str, Any] | None:
        """Return the log-probabilities of `ids`, which follow a context of that length, if they are asked for."""
        if body.get("logprobs") is None:
            return None
        texts = [self.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
        return completion_logprobs(ids, texts, context - len(self.prompt), body)

    def _generate(self, prompt: list[int], body: dict[str, Any]) -> _Generated:
        """Return the continuation of `prompt`, decoded and stopped as vLLM does it."""
        stream = DecodeStream(ids=prompt, skip_special_tokens=body.get("skip_special_tokens", True))
        ids: list[int] = []
        text = ""
        for token in self._next(prompt)[: body["max_tokens"]]:
            ids.append(token)
            if token == self.end:
                return _Generated(ids, text, "stop", None)
            try:
                text += stream.step(self.tokenizer, token) or ""
            except Exception:  # tokenizers raises nothing narrower; vLLM starts a new stream
                stream = DecodeStream(skip_special_tokens=body.get("skip_special_tokens", True))
                text += stream.step(self.tokenizer, token) or ""
            for stop in body.get("stop", ()):
                if stop in text:
                    kept = text.index(stop) + len(stop) * bool(body.get("include_stop_str_in_output"))
                    return _Generated(ids, text[:kept], "stop", stop)
        return _Generated(ids, text, "length", None)

    def _next(self, prompt: list[int]) -> list[int]:
        if prompt == self.prompt:
            self.opened += 1
            return self.texts[(self.opened - 1) % len(self.texts)]
        written = prompt[len(self.prompt) :]
        known = (text for text in self.texts if text[: len(written)] == written)
        text = next(known, None)
        return [*self.after_lead, self.end] if text is None else text[len(written) :]
