"""A real Prometheus scrapes the proxy, evaluates the rules and alerts when the upstream is down."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import yaml

from proxy.server import running
from proxy.settings import load
from proxy.upstream import health_monitor
from proxy.upstream.embedded import free_port
from tests.fakes import FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL

HERE = Path(__file__).parent
DEPLOY = HERE.parents[1] / "deploy/prometheus"
PATIENCE_S: Final = 60

PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
PROMETHEUS, PROMTOOL = (shutil.which(name, path=PLACES) for name in ("prometheus", "promtool"))

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not (PROMETHEUS and PROMTOOL), reason="prometheus is not here; `make test` fetches it where there is apt"
    ),
]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_rules_and_config() -> None:
    assert "SUCCESS" in promtool("check", "rules", DEPLOY / "rules.yml")
    assert "1 rule files found" in promtool("check", "config", DEPLOY / "prometheus.yml")


def test_every_alert_has_a_passing_test_that_fires_and_one_that_does_not() -> None:
    assert "SUCCESS" in promtool("test", "rules", HERE / "rules.test.yml")
    groups = yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    tested: dict[str, set[bool]] = {}
    for test in yaml.safe_load((HERE / "rules.test.yml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            tested.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert tested == {alert: {True, False} for alert in alerts}


class Prometheus:
    """Client of the HTTP API of a running Prometheus."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http

    async def ask(self, path: str, **query: str) -> Any:
        async with self.http.get(f"{self.url}/api/v1/{path}", params=query) as response:
            return (await response.json())["data"]

    async def value(self, query: str) -> float | None:
        result = (await self.ask("query", query=query))["result"]
        return float(result[0]["value"][1]) if result else None

    async def alerts(self) -> dict[str, str]:
        """Return the state of each pending or firing alert by its name."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in (await self.ask("alerts"))["alerts"]}

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait until `holds`, called repeatedly, returns a true value."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    if await holds():
                        return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[Prometheus]:
    """Run Prometheus with the deployed configuration and rules, but with short intervals."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms", "scrape_timeout": "400ms"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target.removeprefix("http://")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = yaml.safe_load((DEPLOY / "rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["for"] = "0s"
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    port = free_port()
    command = [str(PROMETHEUS), "--config.file", str(folder / "prometheus.yml")]
    command += ["--storage.tsdb.path", str(folder / "data"), "--web.listen-address", f"127.0.0.1:{port}"]
    with (folder / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        async with aiohttp.ClientSession() as http:
            yield Prometheus(f"http://127.0.0.1:{port}", http)
    finally:
        process.terminate()
        await process.wait()


async def test_prometheus_scrapes_the_proxy_and_alerts_while_the_upstream_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_monitor, "CHECK_INTERVAL_S", 0.1)
    async with FakeVLLM([chain("7", 120, ["7"])], INTERVAL).serve() as backend:
        settings = load(upstream=backend.url, store=tmp_path / "records.db", **SMALL)
        async with running(settings) as url, prometheus(tmp_path, url) as server:
            body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}]}
            headers = {"x-tts-beta": "0.5"}

            async def chat() -> int:
                async with server.http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                    return response.status

            async def is_up() -> bool:
                targets = (await server.ask("targets"))["activeTargets"]
                return [target["health"] for target in targets] == ["up"]

            async def is_counted() -> bool:
                assert await chat() == 200
                return bool(await server.value("sum(autotts:tokens:rate5m)"))

            await server.until(is_up)
            await server.until(is_counted)
            groups = (await server.ask("rules"))["groups"]
            assert [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")] == []
            assert (await server.value("min(autotts_upstream_up)"), await server.alerts()) == (1, {})

            backend.is_well = False

            async def is_firing() -> bool:
                return (await server.alerts()).get("AutoTTSUpstreamDown") == "firing"

            await server.until(is_firing)
            backend.is_well = True

            async def is_over() -> bool:
                return not await server.alerts()

            await server.until(is_over)
