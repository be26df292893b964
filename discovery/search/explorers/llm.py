"""An LLM that writes controllers: a whole file a reply, read over once before it is proposed."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Final, NamedTuple

from controllers.advice import advise
from controllers.loading import LARGEST
from discovery.errors import ExplorerError
from discovery.search.explorers import Candidate, ExplorerContext
from discovery.search.explorers.endpoint import CallCosts, Conversation, Endpoint, LLMSettings, Sleep
from discovery.search.explorers.transcript import Transcript
from discovery.search.prompt import clean, draw_parent, render

FILE: Final = re.compile(r"^```(?:python|py)[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
NOTE: Final = re.compile(r"^\W*NOTE\W*:(.*)$", re.MULTILINE)
REPAIR: Final = (
    "The file cannot be used as it is:\n{wrong}\nReply as before: one NOTE: line, and the whole file, mended."
)


class Draft(NamedTuple):
    """A reply as read."""

    source: str  # the file; the whole reply if it does not hold just one
    note: str
    wrong: list[str]  # what the author should mend, a line each


class LLM:
    """Proposes what a model writes; implements `Explorer`. All it asks and is told is in `transcript`.

    A step asks for `settings.proposals` files, one conversation each: the prompt, and if the file is wrong by the
    static check, no file, or one that was tried already, one repair. What is wrong still is proposed all the same: the
    cascade says so to the next author, and no cost is lost. A candidate's cost is what the endpoint billed for it,
    repairs and failed calls included; calls of unknown cost are counted in its genome. `Cost.seconds` stays 0, for a
    run is played again exactly.
    """

    name = "llm"

    def __init__(self, settings: LLMSettings, transcript: Transcript, sleep: Sleep = time.sleep) -> None:
        self._settings = settings
        self._endpoint = Endpoint(settings, transcript, sleep)

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """The step's candidates; fewer if the endpoint or the money gives out, at least one. Raises ExplorerError."""
        conversation = self._endpoint.conversation(context.seed, context.step)
        made: list[Candidate] = []
        for number in range(self._settings.proposals):
            try:
                made.append(self._write(context, number, conversation, made))
            except ExplorerError:
                if not made:
                    raise
                lost = conversation.settle().cost  # of the one that was not finished: it is paid all the same
                made[-1] = replace(made[-1], cost=(CallCosts(made[-1].cost) + CallCosts(lost)).cost)
                break
        return made

    def _write(
        self, context: ExplorerContext, number: int, conversation: Conversation, siblings: list[Candidate]
    ) -> Candidate:
        """The step's candidate of that number, after its `siblings`."""
        shown = replace(context, step=context.step + number)  # chance of its own
        models = self._settings.models
        model = shown.rng.choices(list(models), list(models.values()))[0]
        tried = {one.digest: one.name for one in (*(standing.candidate for standing in context.standings), *siblings)}
        messages = render(shown)
        reply = conversation.say(model, messages)
        draft = _read(reply, tried)
        repaired = bool(draft.wrong)
        if repaired:
            wrong = "\n".join(f"- {clean(line, 300)}" for line in draft.wrong[:10])
            messages += [
                {"role": "assistant", "content": _said(reply) or "(nothing)"},
                {"role": "user", "content": REPAIR.format(wrong=wrong)},
            ]
            reply = conversation.say(model, messages)
            draft = _read(reply, tried)
        parent, bill = draw_parent(shown), conversation.settle()
        return Candidate(
            name=f"llm-{context.step:04d}" + (f"-{number}" if number else ""),
            source=draft.source,
            explorer=self.name,
            parent=None if parent is None else parent.candidate.digest,
            note=draft.note + _unknown(bill),
            cost=bill.cost,
            genome={"model": model, "calls": bill.calls, "unknown": bill.unknown, "repaired": repaired},
        )


def _unknown(bill: CallCosts) -> str:
    return f" ({bill.unknown} of {bill.calls} calls of unknown cost)" if bill.unknown else ""


def _said(text: str) -> str:
    """A reply without the thought before it, as text that can be written: JSON may hold halves of characters."""
    return text.encode(errors="replace").decode().replace("\r\n", "\n").rpartition("</think>")[2]


def _read(text: str, tried: dict[str, str]) -> Draft:
    """A reply's file and note, and what is wrong with them."""
    said = _said(text)
    files = FILE.findall(said)
    note = NOTE.search(FILE.sub("", said))
    words = clean(note.group(1)) if note else ""
    if len(files) != 1:
        return Draft(
            said[:LARGEST], words, [f"the reply holds {len(files)} ```python blocks, and must hold exactly one"]
        )
    (source,) = files
    candidate = Candidate("", source, "")
    if candidate.digest in tried:
        return Draft(source, words, [f"it is the same file as {tried[candidate.digest]}, which was tried"])
    if len(source.encode()) > LARGEST:
        return Draft(source, words, [f"it has more than {LARGEST} bytes"])
    return Draft(source, words, advise(source))
