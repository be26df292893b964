"""Records of branches that run without pauses equal those of branches that stop after each interval, on vLLM."""

from __future__ import annotations

import aiohttp
import pytest

from controllers import TO_END, Limits, Probed, branch, probe
from controllers.signals import ALL_SIGNALS
from deploy.embedded.task import held_back
from discovery.answers import parse_kind
from proxy.environment.live_environment import LiveEnvironment
from proxy.recording.interval_probes import IntervalProbes
from proxy.types import EnvironmentLimits, LiveBranch, Prompt
from proxy.upstream.client import UpstreamClient

pytestmark = pytest.mark.vllm

MODEL = "autotts-tiny"
INTERVAL = 32
LIMIT = 700
BRANCHES = 6
NOISE = 30
"""Largest difference of two confidences in per mille: kernels round differently in differently shaped batches."""


@pytest.mark.timeout(300)
async def test_late_probes_equal_those_of_branches_that_stop_after_each_interval(vllm: str) -> None:
    """Each branch is replayed from its own tokens, and probed wherever it would have stopped."""
    async with aiohttp.ClientSession() as http:
        engine = UpstreamClient(vllm, http)
        messages = [{"role": "user", "content": held_back(1)[0].question}]
        ids = await engine.tokenise_chat({"model": MODEL, "messages": messages})
        prompt = Prompt(MODEL, ids, await engine.detokenise(MODEL, ids[-8:]), {}, kind=parse_kind("boxed"))
        limits = EnvironmentLimits(INTERVAL, LIMIT, 8)
        environment = LiveEnvironment(engine, prompt, limits, keeps_all_branches=True, signals=ALL_SIGNALS)
        await environment.execute([branch(TO_END)] * BRANCHES)
        late = IntervalProbes(environment, Limits(INTERVAL, branch_tokens=LIMIT, probe_tokens=64))
        assert await late.run()
        recorded = await late.branches()
        assert all(one.complete for one in recorded)
        assert sum(len(one.probes) for one in recorded) > BRANCHES
        for live, one in zip(environment.branches, recorded, strict=True):
            stopping = LiveEnvironment(engine, prompt, limits, keeps_all_branches=True, signals=ALL_SIGNALS)
            probes = []
            for end in range(INTERVAL, len(live.ids), INTERVAL):
                known = live.ids[:end]
                stopping.branches[:] = [LiveBranch(known, await engine.detokenise(MODEL, known))]
                (fact,) = await stopping.execute([probe(0)])
                assert isinstance(fact, Probed)
                written = None if fact.label is None else stopping.labels.written(fact.label)
                probes.append((written, fact.tokens, fact.confidence))
            assert [(answer, tokens) for answer, tokens, _ in probes] == list(
                zip(one.probes, one.probe_tokens, strict=True)
            )
            sure = [confidence for *_, confidence in probes]
            known_sure = list(one.probe_confidences) or [None] * len(sure)
            assert all(
                a is b is None or (a is not None and b is not None and abs(a - b) <= NOISE)
                for a, b in zip(sure, known_sure, strict=True)
            )
