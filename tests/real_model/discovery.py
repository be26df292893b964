"""Collect, discover and gate on SmolLM2-135M-Instruct: chains of sums by `reasoning-gym`, after worked examples.

    python -m tests.real_model --discover 5 [--questions 100] [--branches 16] [--folder real]

Half of the questions are held out. The commands are those that a user would run, and their output is printed. Greedy
decoding answers the held-out questions as well, because a gain over sampling may be no gain over greedy decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp

from discovery.data.recordings import Split
from discovery.evaluation.paired_statistics import wilson_interval
from proxy.server import running
from proxy.settings import load
from tests.proxy.test_loop import autotts
from tests.real_model.asking import EXAMPLES, INTERVAL, Message, RealModel
from tests.real_model.model import server

ADMIN_KEY: Final = "only on this machine"
SEED: Final = 7
RIVALS: Final = "asc,adaptive_consistency,cmc,short_m_at_k,cisc"
BETAS: Final = "0,0.25,0.5,0.75,1"
DEPLOYED_BETA: Final = "0.5"
MAX_TOKENS: Final = 160
"""Maximum tokens of a chain; a correct one has about 60."""


class Problem(NamedTuple):
    """A chain of additions and subtractions."""

    question: str
    expression: str
    answer: str

    @property
    def worked(self) -> str:
        """The reply of a worked example: every step, then the boxed answer."""
        first, *rest = re.findall(r"([+-]?)\s*(\d+)", self.expression)
        total, steps = int(first[1]), []
        for sign, number in rest:
            result = total + int(f"{sign}{number}")
            steps.append(f"{total} {sign} {number} = {result}.")
            total = result
        return " ".join([*steps, f"The answer is \\boxed{{{total}}}."])


def draw_problems(count: int) -> list[Problem]:
    """Return different problems of three and four terms, the same ones every time."""
    import reasoning_gym

    made = reasoning_gym.create_dataset(
        "chain_sum", size=4 * count, seed=SEED, min_terms=3, max_terms=4, min_digits=1, max_digits=2
    )
    problems = (Problem(entry["question"], entry["metadata"]["expression"], entry["answer"]) for entry in made)
    return list({problem.question: problem for problem in problems}.values())[:count]


def conversations(problems: list[Problem]) -> Iterator[tuple[list[Message], Problem]]:
    """Yield each problem after the worked ones, which are the first `EXAMPLES`."""
    turns: list[Message] = [
        {"role": role, "content": content}
        for problem in problems[:EXAMPLES]
        for role, content in (("user", problem.question), ("assistant", problem.worked))
    ]
    for problem in problems[EXAMPLES:]:
        yield [*turns, {"role": "user", "content": problem.question}], problem


def write_questions(asked: Sequence[tuple[Sequence[Message], Problem]], folder: Path) -> Path:
    """Write the questions to record into a folder and return the file. Every second question is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    file, splits = folder / "questions.jsonl", (Split.SEARCH, Split.HELD_OUT)
    lines = [
        {"messages": messages, "reference": problem.answer, "split": splits[number % 2]}
        for number, (messages, problem) in enumerate(asked)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


async def discover(minutes: float, questions: int, branches: int, folder: Path, say: Callable[[str], None]) -> None:
    """Run the study and print the output of every command."""
    asked = list(conversations(draw_problems(EXAMPLES + questions)))
    file, recordings = write_questions(asked, folder), folder / "recordings.jsonl"
    held_out = asked[1::2]
    async with (
        server() as vllm,
        running(load(upstream=vllm.url, interval=INTERVAL, admin_key=ADMIN_KEY, max_branches=branches)) as url,
        aiohttp.ClientSession() as http,
    ):
        say(
            await autotts(
                *("collect", str(file), "--out", str(recordings), "--resume", "--signals", "--url", url),
                *("--branches", str(branches), "--at-once", "64", "--max-tokens", str(MAX_TOKENS)),
                *("--benchmark", "chain_sum"),
                AUTOTTS_ADMIN_KEY=ADMIN_KEY,
            )
        )
        model = RealModel(url, vllm.url, http)
        replies = await model.ask_all([turns for turns, _ in held_out], None, temperature=0, max_tokens=MAX_TOKENS)
    right = [reply.number == problem.answer for reply, (_, problem) in zip(replies, held_out, strict=True)]
    share = sum(right) / len(right)
    low, high = wilson_interval(share, len(right))
    tokens = sum(reply.total for reply in replies) / len(replies)
    say(
        f"greedy decoding, {len(right)} held-out questions: {100 * share:.1f} % right (95 %: {low:.1f} to {high:.1f}), "
        f"{tokens:.0f} tokens"
    )
    about = ("--recordings", str(recordings))
    say(await autotts("signals", *about))
    search = folder / "search"
    await autotts(
        *("discover", *about, "--minutes", f"{minutes:g}", "--out", str(search), "--shuffles", "4"),
        *("--champions", "adaptive_consistency", *(["--resume"] if (search / "history.jsonl").exists() else [])),
    )
    (found,) = search.glob("*.py")
    say(found.read_text())
    ledger, report = folder / "ledger.jsonl", folder / "gate.json"
    say(
        await autotts(
            *("gate", str(found), *about, "--champion", "adaptive_consistency", "--beta", DEPLOYED_BETA),
            *("--ledger", str(ledger), "--report", str(report), "--shuffles", "20"),
            code=None,  # it depends on the verdict
        )
    )
    compared = ("--controllers", f"sc@{branches},{RIVALS},{found}", "--betas", BETAS, "--split", Split.HELD_OUT)
    say(await autotts("evaluate", *about, *compared, "--shuffles", "20", "--max-branches", str(branches)))
