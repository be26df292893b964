"""Measure the embedded model on its held-back problems, through a running server. This is not an `autotts` command.

    python -m deploy.embedded.server --port 8001 &
    python -m proxy.commands.study --url http://127.0.0.1:8001

Prints the accuracy of a greedy answer, of one sample, of the majority of k samples (self-consistency, SC@k), of the
majority of the shortest samples, and of an answer without thinking. Also prints the accuracy of probes in a thought
that is cut early, how well a sample's log-probability and its length tell right from wrong, and the accuracy and the
length of each method.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from deploy.embedded import SERVED_MODEL_NAME, task
from discovery.answers import boxed
from proxy import probe_templates
from proxy.types import Call, Output
from proxy.upstream.client import UpstreamClient

TEMPLATE = probe_templates.TEMPLATES[probe_templates.Family.QWEN3]

VOTERS = (1, 2, 4, 8, 16, 32, 64)
SHORTEST = ((4, 16), (8, 32))  # (votes, samples to choose from)
WINDOW = 16  # tokens
DEPTHS = tuple(tenth / 10 for tenth in range(11))
BANDS = ((4, 7), (8, 11), (12, 16))
MAX_TOKENS = 800
SUBSETS = 200


@dataclass(frozen=True, slots=True)
class SampledReply:
    """Answer of one completion, the method that its thought names, and the log-probabilities of its tokens."""

    answer: str | None
    method: str
    tokens: int
    logprobs: tuple[float, ...] = ()  # empty if they were not asked for

    @property
    def confidence(self) -> float:
        """Mean log-probability of the tokens."""
        return statistics.fmean(self.logprobs)

    @property
    def lowest(self) -> float:
        """Mean log-probability of the least sure window of WINDOW tokens."""
        starts = range(max(1, len(self.logprobs) - WINDOW + 1))
        return min(statistics.fmean(self.logprobs[start : start + WINDOW]) for start in starts)


@dataclass(frozen=True, slots=True)
class StudiedProblem:
    """The replies of the model to one problem. `probes` has one row per probed reply, with one answer per depth."""

    problem: task.Problem
    greedy: SampledReply
    silent: SampledReply  # with `enable_thinking=false`
    samples: list[SampledReply]
    probes: list[list[str]]

    def greedy_score(self) -> float:
        return float(self.greedy.answer == self.problem.answer)

    def silent_score(self) -> float:
        return float(self.silent.answer == self.problem.answer)

    def vote_score(self, k: int, among: int | None = None) -> float:
        """Return the probability that a majority of k samples is right. Ties are broken evenly.

        The k samples are random, or the shortest `among` that many random ones.
        """
        rng = random.Random(self.problem.question)
        subsets = (rng.sample(self.samples, among or k) for _ in range(SUBSETS))
        voters = (sorted(subset, key=lambda branch: branch.tokens)[:k] for subset in subsets)
        return statistics.fmean(majority([branch.answer for branch in some], self.problem.answer) for some in voters)

    def agreement(self) -> float:
        """Return the share of samples that give the most common answer."""
        return Counter(branch.answer for branch in self.samples).most_common(1)[0][1] / len(self.samples)

    def scored(self, score: Callable[[SampledReply], float]) -> list[tuple[float, bool]]:
        """Return the score of each sample and whether it is right."""
        return [(score(branch), branch.answer == self.problem.answer) for branch in self.samples]

    def votes(self, branch: SampledReply) -> float:
        """Return how many samples give the answer of `branch`."""
        return float(sum(other.answer == branch.answer for other in self.samples))


def majority(answers: Sequence[str | None], truth: str) -> float:
    """Return 1 if the truth has the most votes, 0 if not, and 1/n if n answers with the truth among them tie."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    leaders = [answer for answer, count in votes.items() if count == most]
    return float(truth in leaders) / max(1, len(leaders))


def auroc(groups: Iterable[Sequence[tuple[float, bool]]]) -> float:
    """Return the probability that the right one of a right and a wrong sample of the same group has the higher score.

    Each group holds (score, is right). Equal scores count one half.
    """
    ahead = 0.0
    pairs = 0
    for group in groups:
        right = [score for score, is_right in group if is_right]
        wrong = [score for score, is_right in group if not is_right]
        ahead += sum((high > low) + (high == low) / 2 for high in right for low in wrong)
        pairs += len(right) * len(wrong)
    return ahead / pairs if pairs else math.nan


class Study:
    """Sends the problems to a server, a few at a time."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, model: str, *, samples: int, probed: int, at_once: int
    ) -> None:
        self._completions = f"{url.rstrip('/')}/v1/completions"
        self._session = session
        self._engine = UpstreamClient(url, session)
        self._model = model
        self._samples = samples
        self._probed = probed
        self._slots = asyncio.Semaphore(at_once)

    async def run(self, problems: Sequence[task.Problem]) -> list[StudiedProblem]:
        suffix = await self._engine.tokenise_suffix(self._model, TEMPLATE.longest_suffix)
        end = (await self._engine.tokenise_suffix(self._model, TEMPLATE.ending))[0]
        return list(await asyncio.gather(*(self._outcome(problem, suffix, end) for problem in problems)))

    async def _outcome(self, problem: task.Problem, suffix: list[int], end: int) -> StudiedProblem:
        async with self._slots:
            prompt = await self._prompt(problem, enable_thinking=True)
            [greedy] = await self._complete(prompt, MAX_TOKENS, temperature=0)
            [silent] = await self._complete(await self._prompt(problem, enable_thinking=False), 32, temperature=0)
            choices = await self._sample(prompt, random.Random(problem.question).getrandbits(31))
            thoughts = [_thought(choice["token_ids"], end) for choice in choices[: self._probed]]
            probes = [await self._probe(prompt, thought, suffix) for thought in thoughts]
            return StudiedProblem(problem, _branch(greedy), _branch(silent), [_sampled(c) for c in choices], probes)

    async def _prompt(self, problem: task.Problem, *, enable_thinking: bool) -> list[int]:
        messages = [{"role": "user", "content": problem.question}]
        options = {"chat_template_kwargs": {"enable_thinking": enable_thinking}}
        return await self._engine.tokenise_chat({"model": self._model, "messages": messages, **options})

    async def _sample(self, prompt: list[int], seed: int) -> list[dict[str, Any]]:
        """Return vLLM's choices for one request, with token ids and the log-probability of each token."""
        sampling = {"n": self._samples, "temperature": 1, "seed": seed, "max_tokens": MAX_TOKENS}
        body = {"model": self._model, "prompt": prompt, **sampling, "logprobs": 0, "return_token_ids": True}
        async with self._session.post(self._completions, json=body, raise_for_status=True) as response:
            return list((await response.json())["choices"])

    async def _probe(self, prompt: list[int], thought: list[int], suffix: list[int]) -> list[str]:
        """Return the answers of probes at each of DEPTHS. The last depth is the end of the thought."""
        cuts = [thought[: max(1, round(depth * len(thought)))] for depth in DEPTHS]
        probes = (self._complete(prompt + cut + suffix, 8, temperature=0, stop=["}"]) for cut in cuts)
        return [output.text for [output] in await asyncio.gather(*probes)]

    async def _complete(self, prompt: list[int], max_tokens: int, n: int = 1, **sampling: object) -> list[Output]:
        call = Call([prompt], max_tokens, sampling, n=n)
        await self._engine.generate(self._model, call)
        return call.outputs


def _thought(ids: list[int], end: int) -> list[int]:
    """Return the ids of the thought without its closing tag and the line break before it: the probe appends both."""
    return ids[: ids.index(end) - 1] if end in ids else ids


def _branch(output: Output) -> SampledReply:
    return SampledReply(boxed(output.text), _method(output.text), len(output.ids))


def _sampled(choice: dict[str, Any]) -> SampledReply:
    logprobs = tuple(choice["logprobs"]["token_logprobs"])
    return SampledReply(boxed(choice["text"]), _method(choice["text"]), len(choice["token_ids"]), logprobs)


def _method(text: str) -> str:
    """Return the method that a thought names first; "" if it names none."""
    names = "|".join(method.name for method in task.METHODS)
    named = re.match(rf"<think>\s*({names}):", text)
    return named[1] if named else ""


def report(outcomes: Sequence[StudiedProblem], console: Console) -> None:
    """Print the tables."""
    console.print(_accuracies(outcomes))
    console.print(_probe_accuracies(outcomes))
    console.print(_separations(outcomes))
    console.print(_methods(outcomes))
    console.print(_lengths(outcomes))


def _accuracies(outcomes: Sequence[StudiedProblem]) -> Table:
    bands = [[o for o in outcomes if low <= o.problem.length <= high] for low, high in BANDS]
    columns = ("", "all", *(f"{low}-{high} steps" for low, high in BANDS))
    table = Table(*columns, title="Accuracy, % (± one standard error)")
    table.add_row("problems", *(str(len(group)) for group in (outcomes, *bands)))
    scores: dict[str, Callable[[StudiedProblem], float]] = {"greedy": StudiedProblem.greedy_score}
    voters = [k for k in VOTERS if k <= len(outcomes[0].samples)]
    for k in voters:
        scores[f"SC@{k}"] = lambda outcome, k=k: outcome.vote_score(k)  # type: ignore[misc]
    scores[f"SC@{voters[-1]} - greedy"] = lambda outcome: outcome.vote_score(voters[-1]) - outcome.greedy_score()
    for k, among in SHORTEST:
        if among <= len(outcomes[0].samples):
            scores[f"the {k} shortest of {among}"] = lambda outcome, k=k, among=among: outcome.vote_score(k, among)  # type: ignore[misc]
    scores["without thinking"] = StudiedProblem.silent_score
    scores["agreement of samples"] = StudiedProblem.agreement
    for name, score in scores.items():
        table.add_row(name, *(_mean([score(outcome) for outcome in group]) for group in (outcomes, *bands)))
    return table


def _probe_accuracies(outcomes: Sequence[StudiedProblem]) -> Table:
    table = Table("share of the thought", *(f"{depth:.0%}" for depth in DEPTHS), title="Accuracy of a probe, %")
    for name, against in (("right", _is_true), ("equal to the branch's final answer", _is_kept)):
        branches = [(outcome, branch) for outcome in outcomes for branch in range(len(outcome.probes))]
        row = (statistics.fmean(against(*branch, depth) for branch in branches) for depth in range(len(DEPTHS)))
        table.add_row(name, *(f"{100 * value:.0f}" for value in row))
    return table


def _is_true(outcome: StudiedProblem, branch: int, depth: int) -> float:
    return float(outcome.probes[branch][depth] == outcome.problem.answer)


def _is_kept(outcome: StudiedProblem, branch: int, depth: int) -> float:
    return float(outcome.probes[branch][depth] == outcome.samples[branch].answer)


def _separations(outcomes: Sequence[StudiedProblem]) -> Table:
    table = Table("signal", "AUROC", title="Right against wrong samples of the same problem")
    signals: dict[str, Callable[[SampledReply], float]] = {
        "mean log-probability": lambda branch: branch.confidence,
        f"lowest mean of {WINDOW} tokens": lambda branch: branch.lowest,
        "length": lambda branch: branch.tokens,
    }
    for name, signal in signals.items():
        table.add_row(name, f"{auroc(outcome.scored(signal) for outcome in outcomes):.2f}")
    table.add_row("votes for its answer", f"{auroc(outcome.scored(outcome.votes) for outcome in outcomes):.2f}")
    return table


def _methods(outcomes: Sequence[StudiedProblem]) -> Table:
    samples = [(branch, branch.answer == o.problem.answer) for o in outcomes for branch in o.samples]
    table = Table("method", "share, %", "right, %", "tokens, mean", title="Samples by method")
    for name in (*(method.name for method in task.METHODS), ""):
        own = [(branch.tokens, is_right) for branch, is_right in samples if branch.method == name]
        if own:
            right = statistics.fmean(is_right for _, is_right in own)
            tokens = statistics.fmean(count for count, _ in own)
            share = len(own) / len(samples)
            table.add_row(name or "none", f"{100 * share:.1f}", f"{100 * right:.1f}", f"{tokens:.0f}")
    return table


def _lengths(outcomes: Sequence[StudiedProblem]) -> Table:
    tokens = [branch.tokens for outcome in outcomes for branch in outcome.samples]
    points = (0.05, 0.25, 0.5, 0.75, 0.95)
    columns = ("min", *(f"{point:.0%}" for point in points), "max", "mean", "no answer")
    table = Table(*columns, title="Tokens per branch")
    ordered = sorted(tokens)
    quantiles = (str(ordered[round(point * (len(ordered) - 1))]) for point in points)
    unanswered = statistics.fmean(branch.answer is None for outcome in outcomes for branch in outcome.samples)
    mean = f"{statistics.fmean(tokens):.0f}"
    table.add_row(str(ordered[0]), *quantiles, str(ordered[-1]), mean, f"{unanswered:.2%}")
    return table


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


async def _main(arguments: argparse.Namespace) -> None:
    problems = task.held_back(arguments.problems, arguments.seed)
    async with aiohttp.ClientSession() as session:
        counts = {"samples": arguments.samples, "probed": arguments.probed, "at_once": arguments.at_once}
        study = Study(arguments.url, session, arguments.model, **counts)
        report(await study.run(problems), Console(width=arguments.width))


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m proxy.commands.study", description=summary)
    parser.add_argument("--url", default="http://127.0.0.1:8001")
    parser.add_argument("--model", default=SERVED_MODEL_NAME)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed that selects the held-back problems")
    parser.add_argument("--samples", type=int, default=64, help="branches per problem; at least 64 for SC@64")
    parser.add_argument("--probed", type=int, default=4, help="branches per problem that are probed at every depth")
    parser.add_argument("--at-once", type=int, default=3, help="problems in flight")
    parser.add_argument("--width", type=int, default=120, help="width of the tables in characters")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
