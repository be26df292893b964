"""vLLM that does no work: it answers completions of token ids at once with a script, in vLLM's format.

python -m tests.bench.null_vllm serve PORT

Every branch has the tokens of a thought, and after `length` tokens, which the prompt's first id gives, an answer. Each
word is one token. As vLLM does, the first chunk of each output repeats the ids of its prompt.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import uvloop

MODEL: Final = "null"
MAX_LENGTH: Final = 2**17
WORDS: Final = 900
"""Number of words that thoughts are made of."""
FIRST_WORD: Final = 10_000
EOS: Final = 1
OPENING: Final = 2
"""First token of each branch."""
LENGTH_AT: Final = 100_000
"""The prompt's first id is this number and the tokens of each branch."""
ENDING: Final = ("</think>", "\n\n", "The", " answer", " is", " \\boxed{", "7", "}")
"""Tokens that end each branch, before the end token."""
VOCABULARY: Final[Mapping[int, str]] = {
    EOS: "",
    OPENING: "<think>",
    **{10 + at: text for at, text in enumerate(ENDING)},
    **{FIRST_WORD + at: f" w{at // 26 % 26 + 10}{chr(97 + at % 26)}q{at}" for at in range(WORDS)},
}
_IDS: Final = {text: token for token, text in VOCABULARY.items() if text}
_PIECES: Final = re.compile(r"</?think>|\n\n| \\boxed\{| ?[A-Za-z0-9]+|.", re.DOTALL)
_CLOSING_IDS: Final = (*(_IDS[text] for text in ENDING), EOS)


def tokenise(text: str) -> list[int]:
    """Return one id per word. Unknown words get ids that no branch has."""
    return [_IDS.get(piece, 20_000 + sum(map(ord, piece)) % 10_000) for piece in _PIECES.findall(text)]


def detokenise(ids: Iterable[int]) -> str:
    """Return the text of ids."""
    return "".join(VOCABULARY.get(token, " ?") for token in ids)


def continuation(prompt: Sequence[int], most: int) -> tuple[list[int], str]:
    """Return the next tokens of a branch and why they end."""
    length, start = prompt[0] - LENGTH_AT, len(prompt) - 1
    closing = length - len(_CLOSING_IDS)  # where the thought ends
    ids = [FIRST_WORD + at % WORDS if at else OPENING for at in range(start, min(start + most, closing))]
    ids += _CLOSING_IDS[start + len(ids) - closing :] if start + len(ids) >= closing else ()
    ids = ids[:most]
    return ids, "stop" if ids[-1] == EOS else "length"


class NullVLLM(asyncio.Protocol):
    """One connection. It parses HTTP itself to save time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport of the new connection."""
        self._transport = transport  # type: ignore[assignment]  # TCP transports are of the subtype

    def data_received(self, data: bytes) -> None:
        """Reply once a request is complete."""
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[:end])
        _, _, length = head.lower().partition(b"\r\ncontent-length:")
        size = int(length.partition(b"\r\n")[0] or 0)
        if len(self._received) < end + 4 + size:
            return
        body = bytes(self._received[end + 4 :])
        self._received.clear()
        path = head.split(b" ", 2)[1].decode()
        self._transport.writelines(_answer(path, msgspec.json.decode(body) if body else {}))


def _answer(path: str, body: dict[str, Any]) -> list[bytes]:
    """Return the pieces of the response to a request."""
    if path == "/v1/completions" and not isinstance(body["prompt"], str):
        return _completion(body)
    if path == "/tokenize":
        ids = tokenise(body["prompt"]) if "prompt" in body else [LENGTH_AT + int(body["messages"][-1]["content"])]
        return _json({"tokens": ids, "count": len(ids), "max_model_len": MAX_LENGTH})
    if path == "/detokenize":
        return _json({"prompt": detokenise(body["tokens"])})
    return _json({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": MAX_LENGTH}]})


def _completion(body: dict[str, Any]) -> list[bytes]:
    """Return a stream of chunks of `stream_interval` tokens, in turn for each output."""
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    each, step, encode = body.get("n", 1), body["stream_interval"], msgspec.json.encode
    outputs = [(prompt, *continuation(prompt, body["max_tokens"])) for prompt in prompts for _ in range(each)]
    events: list[bytes] = []
    for start in range(0, body["max_tokens"], step):
        for index, (prompt, ids, reason) in enumerate(outputs):
            part = ids[start : start + step]
            if not part:
                continue
            choice = {
                "index": index,
                "text": detokenise(part),
                "logprobs": None,
                "finish_reason": reason if start + step >= len(ids) else None,
                "stop_reason": None,
                "prompt_token_ids": prompt if not start else None,
                "token_ids": part,
            }
            events.append(encode(_chunk([choice])))
    generated, read = sum(len(ids) for _, ids, _ in outputs), sum(map(len, prompts))
    usage = {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}
    events += [encode({**_chunk([]), "usage": usage}), b"[DONE]"]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\ndata: %b\n\n\r\n" % (len(event) + 8, event) for event in events), b"0\r\n\r\n"]


def _chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": "cmpl-null", "object": "text_completion", "created": 0, "model": MODEL, "choices": choices}


def _json(value: object) -> list[bytes]:
    data = json.dumps(value).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data)
    return [head, data]


async def _serve(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(NullVLLM, "127.0.0.1", port, backlog=64)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[2])))
