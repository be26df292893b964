"""Explorer that asks an LLM for controllers: one complete file per reply, with one chance of repair."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Final, NamedTuple

from controllers.advice import advise
from controllers.loading import LARGEST
from discovery.errors import BudgetExhausted, ExplorerError
from discovery.search.explorers import Candidate, ExplorerContext
from discovery.search.explorers.endpoint import CallCosts, Conversation, Endpoint, LLMSettings, Sleep
from discovery.search.explorers.transcript import Transcript
from discovery.search.prompt import clean, draw_parent, render

FILE: Final = re.compile(r"^```(?:python|py)[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
NOTE: Final = re.compile(r"^\W*NOTE\W*:(.*)$", re.MULTILINE)
REPAIR: Final = (
    "The file cannot be used:\n{wrong}\nReply in the same format: one NOTE: line, then the complete corrected file."
)


class Draft(NamedTuple):
    """A parsed reply."""

    source: str  # the file; the whole reply if it does not hold exactly one
    note: str
    wrong: list[str]  # problems for the author to fix, one per line


class LLM:
    """Proposes files that a model writes; implements `Explorer`. All requests and responses are in `transcript`.

    A step asks for `settings.proposals` files, one conversation each. If the reply holds no file, or one that fails the
    static check or was tried already, the model is asked once to repair it. A file that is still wrong, or whose repair
    fails or cannot be paid, is proposed anyway: the cascade reports the failure to the next author, and its cost is
    recorded. A candidate's cost is what the endpoint billed, repairs and failed calls included; calls of unknown cost
    are counted in its genome. `Cost.seconds` stays 0, so that a replayed run is identical.
    """

    name = "llm"

    def __init__(self, settings: LLMSettings, transcript: Transcript, sleep: Sleep = time.sleep) -> None:
        self._settings = settings
        self._endpoint = Endpoint(settings, transcript, sleep)

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """Return the step's candidates: at least one, and fewer than asked for if the endpoint or the budget fails.

        Raises ExplorerError if there is none.
        """
        conversation = self._endpoint.conversation(context.seed, context.step)
        made: list[Candidate] = []
        for number in range(self._settings.proposals):
            try:
                made.append(self._write(context, number, conversation, made))
            except ExplorerError:
                if not made:
                    raise
                lost = conversation.settle().cost  # of the unfinished candidate, which was billed as well
                made[-1] = replace(made[-1], cost=(CallCosts(made[-1].cost) + CallCosts(lost)).cost)
                break
        return made

    def _write(
        self, context: ExplorerContext, number: int, conversation: Conversation, siblings: list[Candidate]
    ) -> Candidate:
        """Write candidate `number` of the step, after its `siblings`."""
        shown = replace(context, step=context.step + number)  # gives each candidate its own random draws
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
                {"role": "assistant", "content": _without_reasoning(reply) or "(nothing)"},
                {"role": "user", "content": REPAIR.format(wrong=wrong)},
            ]
            calls = conversation.calls
            try:
                draft = _read(conversation.say(model, messages), tried)
            except ExplorerError as error:
                if conversation.calls == calls and not isinstance(error, BudgetExhausted):
                    raise  # the call could not be made, such as without a key; a resumed run makes it
                repaired = False
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


def _without_reasoning(text: str) -> str:
    """Return a reply without its reasoning, as valid UTF-8: JSON may hold unpaired surrogates."""
    return text.encode(errors="replace").decode().replace("\r\n", "\n").rpartition("</think>")[2]


def _read(text: str, tried: dict[str, str]) -> Draft:
    """Parse a reply into file, note and problems."""
    reply = _without_reasoning(text)
    files = FILE.findall(reply)
    note = NOTE.search(FILE.sub("", reply))
    note_text = clean(note.group(1)) if note else ""
    if len(files) != 1:
        return Draft(
            reply[:LARGEST], note_text, [f"the reply holds {len(files)} ```python blocks; it must hold exactly one"]
        )
    (source,) = files
    candidate = Candidate("", source, "")
    if candidate.digest in tried:
        return Draft(
            source, note_text, [f"the file is identical to {tried[candidate.digest]}, which was already tried"]
        )
    if len(source.encode()) > LARGEST:
        return Draft(source, note_text, [f"the file has more than {LARGEST} bytes"])
    return Draft(source, note_text, advise(source))
