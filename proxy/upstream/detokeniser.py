"""The text of generated token ids that follow other ids.

vLLM decodes a completion incrementally, starting from the end of its prompt. If the prompt's ids end inside a
character, the first text it sends begins with the text of the whole prompt. Branches are continued by ids, so this
happens whenever a character is split between two requests. The text of such a request is decoded here from its ids.

Everywhere else the server's text is right. `seam` tells the two cases apart by the ids a prompt ends in. What it learns
of an id is cached, so that a seam costs no request once the ids it ends in are known.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import Final, NamedTuple, Protocol

from proxy.types import Call, Output

BROKEN: Final = "\ufffd"
"""Replacement character; bytes that are no whole character are decoded to it."""
MOST_KNOWN: Final = 2**17
"""Ids whose ending is cached."""
MOST_HELD: Final = 3
"""Tokens an unfinished character can have: UTF-8 has at most four bytes, and a token at least one."""
MOST_TAIL: Final = 64
"""Ids before one that ends inside a character that are decoded with it, unless one of them is known to be whole."""
LOOK_AHEAD: Final = 4
"""Ids at a prompt's end that are looked up together, at least."""
MOST_LEARNT: Final = 4
"""Ids that are learnt at a time: many requests that begin at once would otherwise each ask for all of theirs."""
_FOLLOWERS: Final = "aeimnrsty"
"""Letters that ordinary tokens often merge with."""


class Ending(Enum):
    """How the text of one id ends."""

    WHOLE = "whole"  # with a whole character, and the id is no special token
    INSIDE = "inside"  # possibly inside a character
    UNKNOWN = "unknown"  # with a whole character, but the server may leave the id out as a special token


class TokenInfo(NamedTuple):
    """The cached properties of one id."""

    text: str  # its own, special or not
    ending: Ending


class TokenEndings:
    """Bounded cache of what is known of ids, by model."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._known: dict[tuple[str, int], TokenInfo] = {}
        self.turns = asyncio.Semaphore(MOST_LEARNT)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, model: str, token: int) -> TokenInfo | None:
        """Return the cached properties of an id, None if there are none."""
        return self._known.get((model, token))

    def add(self, model: str, token: int, known: TokenInfo) -> None:
        """Keep what is known of an id; the oldest entry makes room for it."""
        if len(self._known) >= self._most:
            del self._known[next(iter(self._known))]
        self._known[model, token] = known


class Tokeniser(Protocol):
    """The upstream's tokeniser, with the cache that its models' token ids share."""

    @property
    def token_endings(self) -> TokenEndings:
        """Cached properties of token ids."""

    async def tokenise_plain(self, model: str, text: str, *, is_observed: bool = True) -> list[int]:
        """Return the token ids of a text without special tokens at its beginning."""

    async def detokenise(self, model: str, ids: Sequence[int], *, is_observed: bool = True) -> str:
        """Return the text of token ids, special tokens included."""


class Seam(NamedTuple):
    """The end of a prompt after which the server's text cannot be used."""

    tail: Sequence[int]  # the prompt's last ids, from one that ends with a whole character
    given: int  # how many of them are not the completion's own: the text of these is never repeated


class Detokeniser:
    """Decodes what one model generates."""

    def __init__(self, tokeniser: Tokeniser, model: str) -> None:
        self._tokeniser = tokeniser
        self._model = model

    async def seam(self, prompt: Sequence[int], given: int, floor: int = 0) -> Seam | None:
        """The seam at the end of `prompt`; None where the server decodes what follows correctly.

        The first `given` ids are the client's or of our own making, the rest are generated. The first `floor` ids are
        known to end with a whole character.

        Special tokens may be left out by the server, so ids are looked at backwards until one decides: one that is
        known to be shown and ends with a whole character, or one that ends inside a character.
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

    async def text(self, seam: Seam, ids: Sequence[int], shown: str, *, skips_special: bool) -> str:
        """The text that `ids` add after `seam`, without a character that is unfinished at their end.

        `shown` is what the server sent instead. It is only searched for special tokens that it left out: it has the
        text of every id of `ids` that it did not leave out, and of the tail's too if it begins with the prompt's text.
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

    async def visible(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without a character that is unfinished at their end."""
        text = first = await self._decode(ids)
        for held in range(1, min(MOST_HELD, len(ids)) + 1):
            if not text.endswith(BROKEN):
                return text
            text = await self._decode(ids[:-held])
        return first.rstrip(BROKEN) if text.endswith(BROKEN) else text

    async def _added(self, seam: Seam, ids: Sequence[int]) -> str:
        """The text of the tail and `ids`, less what the tail's text had been before."""
        text = await self.visible([*seam.tail, *ids])
        before = [await self.visible(seam.tail)]
        if seam.given:
            before.append(await self._decode(seam.tail[: seam.given]))
        known = max((len(known) for known in before if text.startswith(known)), default=None)
        return await self.visible(ids) if known is None else text[known:]

    async def _hidden(self, ids: Sequence[int], shown: str) -> set[int]:
        """Return the members of `ids` that end with a whole character and have left no text in `shown`."""
        texts = {token: (await self._learn(token)).text for token in ids}
        return {token for token, text in texts.items() if text and BROKEN not in text and text not in shown}

    async def _look_up(self, prompt: Sequence[int], at: int, lowest: int) -> TokenInfo:
        """Learn the new id at `at`, and ids before it, often next: the more, the further the walk has come."""
        ahead = max(LOOK_AHEAD, len(prompt) - at)
        await asyncio.gather(*(self._learn(token) for token in {*prompt[max(lowest, at + 1 - ahead) : at + 1]}))
        return await self._learn(prompt[at])

    async def _learn(self, token: int) -> TokenInfo:
        """Return what is known of an id, asking the upstream if that is nothing."""
        endings = self._tokeniser.token_endings
        if (known := endings.get(self._model, token)) is None:
            async with endings.turns:
                if (known := endings.get(self._model, token)) is None:  # nor has anybody else learnt it meanwhile
                    text = await self._decode([token])
                    known = TokenInfo(text, await self._ending(token, text))
                    endings.add(self._model, token, known)
        return known

    async def _ending(self, token: int, text: str) -> Ending:
        """How `token` ends, whose own text is `text`.

        Special tokens are cut out of a text before anything else, so that each copy comes back as its id. An ordinary
        token is recognised by copies that merge with the letters beside them.
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
    """Sees to it that the outputs of an episode's calls have the text of their ids.

    Whether a prompt's end makes that necessary is found out while the call runs. Until then the server's text is kept
    apart, as `Output.server_text`, and it stays there if it cannot be used.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = prompt  # of the episode; those of its calls begin with it
        self._floor: int | None = None  # ids of it, if they are known to end with a whole character; else none

    @asynccontextmanager
    async def over(self, call: Call, detokeniser: Detokeniser) -> AsyncIterator[None]:
        """Run a call within this. Its outputs are decoded before they are passed to its `on_finish`.

        With stop strings, the prompts' ends are looked at first: the server looks for them in its own text, so a call
        whose text cannot be used must do without.
        """
        seams: dict[int, Seam] = {}  # by the index of the output

        async def find() -> None:
            seams.update(await self._seams(call, detokeniser))
            for index, output in enumerate(call.outputs):
                if index not in seams and output.server_text is not None:
                    output.text, output.server_text = output.server_text, None

        async def decode(output: Output) -> None:
            await finding
            seam = next((seam for index, seam in seams.items() if call.outputs[index] is output), None)
            if seam is not None and output.server_text is not None:
                skips = call.sampling.get("skip_special_tokens", True)
                output.text = await detokeniser.text(seam, output.text_ids, output.server_text, skips_special=skips)
                output.server_text = None
            if notice is not None:
                await notice(output)

        for output in call.outputs:
            output.server_text = ""
        notice, call.on_finish = call.on_finish, decode
        finding = asyncio.create_task(find())
        try:
            if "stop" in call.sampling:
                await finding
                if seams:
                    call.sampling = {name: value for name, value in call.sampling.items() if name != "stop"}
            yield
            await finding
        finally:
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)

    async def _seams(self, call: Call, detokeniser: Detokeniser) -> dict[int, Seam]:
        """The seams at the ends of the call's prompts, by the index of their outputs."""
        length = len(self._prompt)
        if self._floor is None:
            self._floor = length if await detokeniser.seam(self._prompt, length) is None else 0
        floor = self._floor
        given = [len(prompt) if call.suffix_tokens else length for prompt in call.prompts]
        ends = zip(call.prompts, given, strict=True)
        seams = await asyncio.gather(*(detokeniser.seam(prompt, own, floor) for prompt, own in ends))
        return {i: seam for i in range(len(call.outputs)) if (seam := seams[i // call.n]) is not None}


def _without(ids: Sequence[int], hidden: Collection[int]) -> Sequence[int]:
    return [token for token in ids if token not in hidden] if hidden else ids
