"""Stages of a loop, in order. Each writes its result into the progress, and is skipped if it is there already."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from controllers.builtin import BASELINE
from deploy.embedded.task import Problem, problems
from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Split
from discovery.promotion.verdict import GateReport, GateVerdict, report_of
from discovery.search.output_files import winner_file
from proxy.commands.loop.live_requests import LiveAnswer, ask_all, mean_interval, right_of, tokens_of
from proxy.commands.loop.measurements import RIVALS, HeldOutScores
from proxy.commands.loop.progress import LoopProgress
from proxy.commands.loop.servers import CommandRunner

CHAMPIONS: Final = (BASELINE, "cmc")
"""Controllers that the finalist must beat, first the one that serves by default."""
BRANCHES_IN_FLIGHT: Final = 384
"""Branches that are collected at the same time: more than the embedded server runs together, so that it never waits."""
ROLLOUT_SHARE: Final = 0.5
"""Share of the requests that the canary serves."""
STAGE_REQUESTS: Final = 60
"""Most live requests in the shadow stage, and in the canary stage."""
SERVED_AFTER: Final = 4
"""Live requests that show what serves after the rollback."""


class LoopStages:
    """Runs the stages of one loop. A proxy is started when a stage first needs it. Leaving the context stops it."""

    def __init__(self, progress: LoopProgress, say: Callable[[str], None]) -> None:
        self.progress = progress
        self.plan = progress.plan
        self.folder = progress.folder
        self.runner = CommandRunner(self.folder / "loop.log", say)
        self._say = say
        self._stack = AsyncExitStack()
        self._url: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def questions_file(self) -> Path:
        """The questions to record."""
        return self.folder / "questions.jsonl"

    @property
    def recordings(self) -> Path:
        """The recorded branches."""
        return self.folder / "recordings.jsonl"

    @property
    def registry(self) -> Path:
        """The registry that the proxy follows."""
        return self.folder / "registry"

    @property
    def finalist(self) -> Path:
        """The file of the controller that the search found."""
        return self.folder / f"{self.progress.get('discover')['name']}.py"

    async def run(self) -> None:
        """Run all stages that are not done. Raises CommandFailed and the errors of the stages."""
        for name, stage in (
            ("questions", self._write_questions),
            ("collect", self._collect),
            ("discover", self._discover),
            ("gate", self._judge),
            ("measure", self._measure),
            ("before", self._ask_before),
            ("rollout", self._roll_out),
            ("rollback", self._roll_back),
        ):
            if self.progress.get(name) is not None:
                self._say(f"{name}: done before")
                continue
            self.progress.save(name, await stage())

    def verdicts(self) -> list[GateReport]:
        """Return the gate's reports, one for each of CHAMPIONS."""
        return [report_of(report) for report in self.progress.get("gate")]

    def is_promoted(self) -> bool:
        """Return whether the finalist beats every champion."""
        return all(report.verdict is GateVerdict.PROMOTE for report in self.verdicts())

    # Stages

    async def _write_questions(self) -> dict[str, int]:
        """Draw held-back problems for the search, for the gate, and for fresh live requests."""
        plan = self.plan
        recorded = plan.search_questions + plan.held_out_questions
        drawn = self._problems(recorded)
        with atomic_write(self.questions_file) as file:
            for number, problem in enumerate(drawn):
                split = Split.SEARCH if number < plan.search_questions else Split.HELD_OUT
                line = {"question": problem.question, "reference": problem.answer, "split": split}
                file.write((json.dumps(line) + "\n").encode())
        return {"search": plan.search_questions, "held_out": plan.held_out_questions}

    def _problems(self, count: int, skip: int = 0) -> list[Problem]:
        """Return different held-back problems, after the first `skip` of them."""
        unique = {
            problem.question: problem for problem in islice(problems("held_back", self.plan.seed), 4 * (count + skip))
        }
        return list(unique.values())[skip : skip + count]

    def fresh_problems(self, count: int) -> list[Problem]:
        """Return problems that are not recorded."""
        return self._problems(count, skip=self.plan.search_questions + self.plan.held_out_questions)

    async def _collect(self) -> dict[str, Any]:
        url = await self._proxy()
        await self.runner.run(
            *("collect", str(self.questions_file), "--out", str(self.recordings), "--resume", "--signals"),
            *("--branches", str(self.plan.branches), "--at-once", str(BRANCHES_IN_FLIGHT), "--url", url),
            *("--benchmark", "chains"),
        )
        return {"branches": self.plan.branches * (self.plan.search_questions + self.plan.held_out_questions)}

    async def _discover(self) -> dict[str, Any]:
        out = self.folder / "search"
        record = out / "history.jsonl"
        resume = ["--resume"] if record.exists() else []
        await self.runner.run(
            *("discover", "--recordings", str(self.recordings), "--out", str(out), *resume),
            *("--minutes", f"{self.plan.minutes:g}", "--seed", str(self.plan.seed)),
            *("--latency", f"{self.plan.latency:g}"),
            *("--champions", ",".join(CHAMPIONS)),
        )
        file = winner_file(record)
        card = json.loads(file.with_suffix(".json").read_bytes())
        name = f"found_{card['digest'][:8]}"
        for suffix in (".py", ".json"):
            with atomic_write(self.folder / f"{name}{suffix}") as copy:
                copy.write(file.with_suffix(suffix).read_bytes())
        return {"name": name, "afs": card["search"]["afs"], "candidates": card["cost"]["candidates"]}

    async def _judge(self) -> list[dict[str, Any]]:
        reports = []
        for champion in CHAMPIONS:
            report = self._report_file(champion)
            await self.runner.run(
                *("gate", str(self.finalist), "--recordings", str(self.recordings), "--champion", champion),
                *("--ledger", str(self.folder / "ledger.jsonl"), "--report", str(report)),
                *("--shuffles", str(self.plan.shuffles), "--beta", f"{self.plan.beta:g}"),
            )
            reports.append(json.loads(report.read_bytes()))
            self._say(f"gate against {champion}: {reports[-1]['verdict']}, {reports[-1]['headline']}")
        return reports

    def _report_file(self, champion: str) -> Path:
        return self.folder / f"gate-{champion}.json"

    async def _measure(self) -> dict[str, Any]:
        names = [*RIVALS, str(self.finalist)]
        held_out = await asyncio.to_thread(HeldOutScores, self.recordings, names, self.plan.shuffles)
        held_out.draw(self.folder / "frontier.svg")
        target = held_out.score("self_consistency", 1.0)
        finalist = self.finalist.stem
        tokens_at = {name: held_out.tokens_at(target.accuracy, name) for name in (*RIVALS, finalist)}
        predictions = held_out.predictions(BASELINE, finalist, self.plan.beta, self.plan.requests)
        return {
            "points": held_out.points(),
            "self_consistency": {"accuracy": target.accuracy, "tokens": target.mean("tokens")},
            "tokens_at_its_accuracy": tokens_at,
            "predictions": {name: list(interval) for name, interval in predictions.items()},
            "predicted_jointly": True,  # missing if each interval holds by itself, as those of earlier versions do
        }

    async def _ask_before(self) -> dict[str, Any]:
        return _live_figures(await self._ask(self.fresh_problems(self.plan.requests)))

    async def _roll_out(self) -> dict[str, Any]:
        """Take the finalist through shadow and canary to champion, and ask the fresh questions again."""
        if not (self.is_promoted() or self.plan.force):
            return {"promoted": False}
        staged = min(STAGE_REQUESTS, self.plan.requests)
        more = self.fresh_problems(self.plan.requests + 2 * staged)[self.plan.requests :]
        force = [] if self.is_promoted() else ["--force"]
        report = self._report_file(BASELINE)
        await self._promote("shadow", str(self.finalist), "--report", str(report), *force)
        await self._ask(more[:staged])
        digest = self.verdicts()[0].digest
        await self._promote("canary", digest, "--share", f"{ROLLOUT_SHARE:g}", *force)
        canary = await self._ask(more[staged:])
        await self._promote("champion", digest, *force)
        after = await self._ask(self.fresh_problems(self.plan.requests))
        return {
            "promoted": True,
            "digest": digest,
            "canary_requests": sum(answer.stage == "canary" for answer in canary),
            **_live_figures(after),
        }

    async def _roll_back(self) -> dict[str, Any]:
        """Return to the default controller and ask which controller serves now."""
        if not self.progress.get("rollout")["promoted"]:
            return {"rolled_back": False}
        await self.runner.run("rollback", "--registry", str(self.registry), "--why", "end of the loop", "--who", "loop")
        await self._follow_registry()
        served = {answer.controller for answer in await self._ask(self.fresh_problems(SERVED_AFTER))}
        return {"rolled_back": served == {BASELINE}, "serving": sorted(served)}

    # Helpers

    async def _promote(self, stage: str, what: str, *options: str) -> None:
        await self.runner.run(
            *("promote", what, "--as", stage, "--registry", str(self.registry), "--who", "loop", *options)
        )
        await self._follow_registry()

    async def _follow_registry(self) -> None:
        """Send a request, with which the proxy notices that the registry has changed."""
        await self._ask(self.fresh_problems(1))

    async def _ask(self, asked: Sequence[Problem]) -> list[LiveAnswer]:
        return await ask_all(await self._proxy(), asked, self.plan.beta)

    async def _proxy(self) -> str:
        if self._url is None:
            self._url = await self._stack.enter_async_context(
                self.runner.proxy(
                    {
                        "AUTOTTS_REGISTRY": str(self.registry),
                        "AUTOTTS_REGISTRY_POLL_S": "0",  # every request sees the latest change
                        "AUTOTTS_STORE": str(self.folder / "served.db"),
                        "AUTOTTS_CONTROLLER": BASELINE,
                        "AUTOTTS_MAX_BRANCHES": str(self.plan.branches),  # replay has no more, either
                    }
                )
            )
        return self._url


def _live_figures(answers: Sequence[LiveAnswer]) -> dict[str, Any]:
    """Return the figures of live requests: accuracy in percent and tokens with intervals, and each outcome."""
    right, tokens = 100 * right_of(answers), tokens_of(answers)
    return {
        "accuracy": list(mean_interval(right)),
        "tokens": list(mean_interval(tokens)),
        "right": right.tolist(),
        "spent": tokens.tolist(),
        "controllers": sorted({answer.controller for answer in answers}),
    }
