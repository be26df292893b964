"""Decode generated token ids whose prompt ends inside a character.

vLLM decodes a completion incrementally, from the end of its prompt. If the prompt's ids end inside a multi-byte
character, the first text that vLLM sends begins with the text of the whole prompt. Branches are continued by token ids,
so this happens whenever a character is split between two requests. This module decodes the text of such a completion
from its ids.

In all other cases the server's text is correct. `Detokeniser.seam` tells the two cases apart by the prompt's last ids.
The properties of an id are cached, so that known ids cost no request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import Final, NamedTuple, Protocol, TypeVar

from proxy.types import Call, Output

K = TypeVar("K")
V = TypeVar("V")

BROKEN: Final = "\ufffd"
"""Replacement character U+FFFD. Bytes of an incomplete character are decoded to it."""
MOST_KNOWN: Final = 2**17
"""Maximum number of ids in the cache."""
MOST_HELD: Final = 3
"""Maximum tokens of an incomplete character: UTF-8 has at most four bytes, and a token has at least one."""
MOST_TAIL: Final = 64
"""Maximum ids that are decoded before an id that ends inside a character.

Fewer are decoded if one of them is known to end with a complete character.
"""
LOOK_AHEAD: Final = 4
"""Minimum number of ids at a prompt's end that are looked up together."""
MOST_LEARNT: Final = 4
"""Maximum concurrent lookups of ids, so that many requests that begin together do not flood the upstream."""
MOST_SUFFIXES: Final = 1024
"""Maximum number of texts whose ids are cached. Each model has a few."""
_FOLLOWERS: Final = "aeimnrsty"
"""Letters that ordinary tokens often merge with. A special token never merges."""


class Ending(Enum):
    """How the text of a token id ends."""

    WHOLE = "whole"  # with a complete character, and the id is not a special token
    INSIDE = "inside"  # possibly inside a character
    UNKNOWN = "unknown"  # with a complete character, but the id may be a special token that the server skips


class TokenInfo(NamedTuple):
    """Cached properties of a token id."""

    text: str  # of the id alone, also if it is special
    ending: Ending


class BoundedCache(dict[K, V]):
    """Cache of at most `most` entries. A full one evicts its oldest entry."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self._most:
            del self[next(iter(self))]
        super().__setitem__(key, value)


class TokenEndings:
    """Bounded cache of the properties of token ids, by model."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._known = BoundedCache[tuple[str, int], TokenInfo](most)
        self.turns = asyncio.Semaphore(MOST_LEARNT)  # held during a lookup

    def __len__(self) -> int:
        return len(self._known)

    def get(self, model: str, token: int) -> TokenInfo | None:
        """Return the cached properties of an id, or None."""
        return self._known.get((model, token))

    def add(self, model: str, token: int, known: TokenInfo) -> None:
        """Cache the properties of an id."""
        self._known[model, token] = known


class Tokeniser(Protocol):
    """The upstream's tokeniser, with the cache of token properties of all its models."""

    @property
    def token_endings(self) -> TokenEndings:
        """Cached properties of token ids."""

    async def tokenise_plain(self, model: str, text: str, *, is_observed: bool = True) -> list[int]:
        """Return the token ids of a text without special tokens at its beginning."""

    async def detokenise(self, model: str, ids: Sequence[int], *, is_observed: bool = True) -> str:
        """Return the text of token ids, special tokens included."""


class Seam(NamedTuple):
    """The end of a prompt that ends inside a character. The server's text after it cannot be used."""

    tail: Sequence[int]  # the prompt's last ids; the first one ends with a complete character
    given: int  # how many ids of `tail` were not generated; the text of these is never repeated


class Detokeniser:
    """Decodes the ids that one model generates."""

    def __init__(self, tokeniser: Tokeniser, model: str) -> None:
        self._tokeniser = tokeniser
        self._model = model

    async def seam(self, prompt: Sequence[int], given: int, floor: int = 0) -> Seam | None:
        """Return the seam at the end of `prompt`, or None if the server decodes the completion correctly.

        The first `given` ids come from the client or the proxy, and the rest are generated. The first `floor` ids are
        known to end with a complete character.

        The server may skip special tokens. The ids are therefore examined backwards, up to one that is certainly not
        special and ends with a complete character. At an id that ends inside a character, the search goes back up to
        MOST_TAIL ids further, for the start of the tail.
        """
        start, inside, lowest = len(prompt), -1, floor
        while start > lowest:
            start -= 1
            known = self._tokeniser.token_endings.get(self._model, prompt[start])
            ending = (known or await self._look_up(prompt, start, lowest)).ending
            if ending is Ending.WHOLE:
                break
            if ending is Ending.INSIDE:
                inside, lowest = max(inside, start), max(0, start - MOST_TAIL)
        if inside < 0:
            return None
        tail = prompt[start:]
        if not (await self._decode(tail[: inside + 1 - start])).endswith(BROKEN):
            return None
        return Seam(tail, max(0, min(given - start, len(tail))))

    def is_known_whole(self, prompt: Sequence[int]) -> bool:
        """Return whether it is known, without a request, that `prompt` ends with a complete character."""
        known = self._tokeniser.token_endings.get(self._model, prompt[-1]) if prompt else None
        return known is not None and known.ending is Ending.WHOLE

    async def text(self, seam: Seam, ids: Sequence[int], shown: str, *, skips_special: bool) -> str:
        """Return the text that `ids` add after `seam`, without an incomplete character at the end.

        `shown` is the text that the server sent. It is used only to find out which special tokens the server skipped:
        it contains the text of every id of `ids` that was not skipped. If it begins with the prompt's text, that holds
        for the tail's ids too.
        """
        text = await self._added(seam, ids)
        if not skips_special or (shown.endswith(text) and bool(text) == bool(shown)):
            return text
        if hidden := await self._hidden(ids, shown):
            ids = _without(ids, hidden)
            text = await self._added(seam, ids)
        if shown in ("", text):
            return text
        hidden = await self._hidden(seam.tail[1:], shown)
        given, own = seam.tail[: seam.given], seam.tail[seam.given :]
        kept = [_without(given, hidden), _without(own, hidden)]
        return await self._added(Seam([*kept[0], *kept[1]], len(kept[0])), ids) if hidden else text

    async def completed(self, prompt: Sequence[int], ids: Sequence[int], shown: str) -> str:
        """Return the text of `ids` after `prompt`, of which the server has shown the beginning.

        While a completion with stop strings runs, the server holds its last characters back. If `shown` is no such
        beginning, because the server skips special tokens, it is returned as it is.
        """
        text = await self._added(Seam(prompt[-MOST_HELD - 1 :], 0), ids)
        return text if text.startswith(shown) else shown

    async def visible(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without an incomplete character at the end."""
        text = full_text = await self._decode(ids)
        for dropped in range(1, min(MOST_HELD, len(ids)) + 1):
            if not text.endswith(BROKEN):
                return text
            text = await self._decode(ids[:-dropped])
        return full_text.rstrip(BROKEN) if text.endswith(BROKEN) else text

    async def _added(self, seam: Seam, ids: Sequence[int]) -> str:
        """Return the text of the tail and `ids`, without the text that the tail alone has."""
        text = await self.visible([*seam.tail, *ids])
        prefixes = [await self.visible(seam.tail)]
        if seam.given:
            prefixes.append(await self._decode(seam.tail[: seam.given]))
        length = max((len(prefix) for prefix in prefixes if text.startswith(prefix)), default=None)
        return await self.visible(ids) if length is None else text[length:]

    async def _hidden(self, ids: Sequence[int], shown: str) -> set[int]:
        """Return the `ids` that the server skipped: they end with a complete character, which `shown` lacks."""
        texts = {token: (await self._learn(token)).text for token in ids}
        return {token for token, text in texts.items() if text and BROKEN not in text and text not in shown}

    async def _look_up(self, prompt: Sequence[int], at: int, lowest: int) -> TokenInfo:
        """Return the properties of the uncached id at `at`, and cache those of ids before it.

        The search goes on with those ids. The longer it has been, the more of them are looked up together.
        """
        ahead = max(LOOK_AHEAD, len(prompt) - at)
        await asyncio.gather(*(self._learn(token) for token in {*prompt[max(lowest, at + 1 - ahead) : at + 1]}))
        return await self._learn(prompt[at])

    async def _learn(self, token: int) -> TokenInfo:
        """Return the properties of an id, from the cache or the upstream."""
        endings = self._tokeniser.token_endings
        if (known := endings.get(self._model, token)) is None:
            async with endings.turns:
                if (known := endings.get(self._model, token)) is None:  # another task may have cached it meanwhile
                    text = await self._decode([token])
                    known = TokenInfo(text, await self._ending(token, text))
                    endings.add(self._model, token, known)
        return known

    async def _ending(self, token: int, text: str) -> Ending:
        """Return how `token` ends, whose text is `text`.

        Tokenisers split a text at special tokens first, so every copy of a special token in a text is tokenised to its
        id. An ordinary token is recognised by copies that merge with adjacent letters into other tokens.
        """
        if text.endswith(BROKEN):
            return Ending.INSIDE
        if not text:
            return Ending.UNKNOWN
        copies = [text + follower for follower in (*_FOLLOWERS, text)]
        ids = await self._tokeniser.tokenise_plain(self._model, "".join(copies), is_observed=False)
        return Ending.WHOLE if 0 < ids.count(token) < len(copies) + 1 else Ending.UNKNOWN

    async def _decode(self, ids: Sequence[int]) -> str:
        return await self._tokeniser.detokenise(self._model, ids, is_observed=False) if ids else ""


class CallDecoder:
    """Ensures that the outputs of an episode's calls have the text of their ids.

    While a call runs, it is determined whether the prompts end inside a character. Until then the server's text is
    stored in `Output.server_text` instead of `Output.text`.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = prompt  # of the episode; the prompts of its calls begin with it
        # The prompt's length if it ends with a complete character, else 0. None until that has been examined.
        self._floor: int | None = None

    @asynccontextmanager
    async def over(
        self, call: Call, detokeniser: Detokeniser
    ) -> AsyncIterator[Callable[[Output], Coroutine[None, None, None]]]:
        """Return a context in which to run `call`. Its outputs are decoded before its `on_finish` gets them.

        The context yields what decodes an output that was cut, so that it can be continued by its ids.

        A call with stop strings waits until its prompts' ends are examined. The server searches its own text for stop
        strings, so they are removed from a call whose server text cannot be used.
        """
        seams: dict[int, Seam] = {}  # by the index of the output

        async def find_seams() -> None:
            seams.update(await self._seams(call, detokeniser))
            for index, output in enumerate(call.outputs):
                if index not in seams and output.server_text is not None:
                    output.text, output.server_text = output.server_text, None

        async def decode(output: Output) -> None:
            await seam_search
            index = next(index for index, each in enumerate(call.outputs) if each is output)
            if index in seams and output.server_text is not None:
                skips = call.sampling.get("skip_special_tokens", True)
                output.text = await detokeniser.text(
                    seams[index], output.text_ids, output.server_text, skips_special=skips
                )
                output.server_text = None
            elif output.finish is None and "stop" in call.sampling:
                output.text = await detokeniser.completed(call.prompts[index // call.n], output.ids, output.text)

        async def decode_finished(output: Output) -> None:
            await decode(output)
            if on_finish is not None:
                await on_finish(output)

        for output in call.outputs:
            output.server_text = ""
        on_finish, call.on_finish = call.on_finish, decode_finished
        seam_search = asyncio.create_task(find_seams())
        try:
            if "stop" in call.sampling:
                await seam_search
                if seams:
                    call.sampling = {name: value for name, value in call.sampling.items() if name != "stop"}
            yield decode
            await seam_search
        finally:
            seam_search.cancel()
            await asyncio.gather(seam_search, return_exceptions=True)

    async def _seams(self, call: Call, detokeniser: Detokeniser) -> dict[int, Seam]:
        """Return the seams at the ends of the call's prompts, by the index of the outputs."""
        length = len(self._prompt)
        if self._floor is None:
            self._floor = length if await detokeniser.seam(self._prompt, length) is None else 0
        floor = self._floor
        if all(detokeniser.is_known_whole(prompt) for prompt in call.prompts):
            return {}
        given = [len(prompt) if call.suffix_tokens else length for prompt in call.prompts]
        ends = zip(call.prompts, given, strict=True)
        seams = await asyncio.gather(*(detokeniser.seam(prompt, own, floor) for prompt, own in ends))
        return {i: seam for i in range(len(call.outputs)) if (seam := seams[i // call.n]) is not None}


def _without(ids: Sequence[int], hidden: Collection[int]) -> Sequence[int]:
    return [token for token in ids if token not in hidden] if hidden else ids
