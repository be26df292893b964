"""Command line `autotts`. Commands import the server only if they need it, so that the others start fast."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from controllers.errors import ControllersError
from deploy.embedded import SERVED_MODEL_NAME
from discovery.commands.calibrate import calibrate_command
from discovery.commands.collect import collect_command
from discovery.commands.discover import discover
from discovery.commands.doctor import doctor
from discovery.commands.evaluate import evaluate
from discovery.commands.gate import gate
from discovery.commands.label import label
from discovery.commands.parity import parity_command
from discovery.commands.promote import controllers, promote, rollback
from discovery.commands.records.history import history
from discovery.commands.records.requests import requests
from discovery.commands.records.signals import signals
from discovery.commands.records.trace import trace
from discovery.commands.registry import registry
from discovery.commands.store import importing
from discovery.commands.store import store as keeping
from discovery.errors import DiscoveryError
from discovery.exit_signals import exit_signals, ignore_hangups, run_interruptibly
from proxy.commands.config import File, Flags, Sets, configuring, gather, with_flags
from proxy.commands.forget import forget
from proxy.commands.keys import keysmith
from proxy.commands.loop.command import (
    Branches,
    DeployedBeta,
    Folder,
    Force,
    HeldOut,
    Latency,
    Minutes,
    Orders,
    Questions,
    Requests,
    Seed,
    run_loop,
)
from proxy.commands.loop.progress import LoopPlan
from proxy.commands.usage_errors import SettingsCommand, describe_bad_parameter
from proxy.errors import ProxyError, SettingsError
from proxy.runtime import event_loop, freeze_objects

if TYPE_CHECKING:
    from proxy.settings import Settings
    from proxy.upstream.embedded import EmbeddedServer

BAD_INPUT = 2
"""Exit status for invalid input, and for tasks that the machine cannot do."""

READERS_OF_PLACES = frozenset(
    {"controllers", "import", "keys", "label", "parity", "promote", "requests", "rollback", "store", "trace"}
)
"""Commands that use the store, the registry or the key file named by the proxy's settings file."""

console = Console(stderr=True)


class CommandGroup(TyperGroup):
    """Command group that reports each error in one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Errors of the project end it with status `BAD_INPUT`."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            self._print_error(describe_bad_parameter(error))
        except SettingsError as error:
            for problem in error.problems:
                self._print_error(problem)
        except (ProxyError, DiscoveryError, ControllersError) as error:
            self._print_error(str(error))
        raise typer.Exit(BAD_INPUT)

    def _print_error(self, message: str) -> None:
        line = " ".join(message.split())
        console.print(f"autotts: {line}", style="red", markup=False, highlight=False, soft_wrap=True)


app = typer.Typer(
    name="autotts", cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.command()(evaluate)
app.command()(doctor)
app.command()(discover)
app.command()(gate)
app.command()(label)
app.command()(signals)
app.command("calibrate")(calibrate_command)
app.command("collect")(collect_command)
app.command("parity")(parity_command)
keeping.command()(forget)
for command in (promote, rollback, controllers):
    app.command()(command)
for group in (importing, keeping, registry, requests, trace, history, configuring, keysmith):
    app.add_typer(group)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        try:
            installed = version("autotts-proxy")
        except PackageNotFoundError:
            installed = "(checkout, not installed)"
        typer.echo(f"autotts {installed}")
        raise typer.Exit


@app.callback()
def autotts(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """An OpenAI-compatible proxy: a controller with one dial, β, decides how to spend test-time compute."""
    if context.invoked_subcommand in READERS_OF_PLACES:
        from proxy.settings import export_places

        export_places()


@app.command(cls=SettingsCommand)
@with_flags
def serve(given: Flags, config: File = None, sets: Sets = None) -> None:
    """Serve requests until interrupted."""
    configured = gather(config, sets, given)
    settings = configured.settings
    from proxy.settings import find_file, unknown_variables
    from proxy.settings.file_warnings import secret_warnings
    from proxy.telemetry.logs import configure_logging

    configure_logging(settings, console)
    for warning in (*unknown_variables(), *secret_warnings(configured, find_file(config))):
        logging.getLogger("proxy").warning("%s", warning)
    _run(_serve(settings))


@app.command("demo")
def demonstrate(
    problems: Annotated[int, typer.Option(min=1, max=1000, help="number of held-back problems")] = 60,
    plot: Annotated[Path, typer.Option(help="file for the plot of accuracy over tokens (.png or .svg)")] = Path(
        "frontier.png"
    ),
    controller: Annotated[str | None, typer.Option(help="controller to use")] = None,
) -> None:
    """Ask the embedded model the same problems at several β and print accuracy and tokens."""
    _run(_demo(problems, plot, controller))


@app.command("loop")
def loop(
    folder: Folder = Path("loop"),
    search: Questions = LoopPlan.search_questions,
    held_out: HeldOut = LoopPlan.held_out_questions,
    branches: Branches = LoopPlan.branches,
    minutes: Minutes = LoopPlan.minutes,
    latency: Latency = LoopPlan.latency,
    shuffles: Orders = LoopPlan.shuffles,
    live: Requests = LoopPlan.requests,
    beta: DeployedBeta = LoopPlan.beta,
    seed: Seed = LoopPlan.seed,
    force: Force = LoopPlan.force,
) -> None:
    """Run the whole loop on the embedded model: collect, discover, gate, promote, compare live, roll back."""
    plan = LoopPlan(search, held_out, branches, minutes, latency, shuffles, live, beta, seed, force)
    _run(run_loop(folder, plan, console))


def main() -> None:
    """Run the command line.

    SIGTERM and SIGHUP end a command in order: it stops its workers and removes its temporary files.
    """
    for each in exit_signals():
        signal.signal(each, _exit_on_signal)
    app()


def _exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    ignore_hangups()
    raise SystemExit(128 + number)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` on an event loop. SIGTERM and SIGHUP cancel it as an interrupt does."""
    try:
        with asyncio.Runner(loop_factory=event_loop()) as runner:
            runner.run(run_interruptibly(work))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(130) from None


async def _serve(settings: Settings) -> None:
    from proxy.admission.auth import check_host
    from proxy.server import Server, listen
    from proxy.settings import LogForm
    from proxy.workers.shares import note
    from proxy.workers.supervisor import Supervisor

    check_host(settings)
    with listen(settings.host, settings.port) as listening:
        log = logging.getLogger("proxy")
        ready, upstream = _upstream(settings, log.info, lambda: (supervisor or server).take_restart())
        text = ""

        def begin() -> None:
            freeze_objects()
            announce()

        def announce() -> None:
            if settings.workers > 1:
                log.warning(note(settings))
            if settings.log is LogForm.JSON:
                log.info("listening on %s", url)
            else:
                console.print(text, highlight=False, markup=False, soft_wrap=True)

        server = Server(ready, begin)  # raises SettingsError before anything costly starts
        supervisor = Supervisor(ready, announce) if settings.workers > 1 else None
        async with upstream:
            model = await _example_model(ready)
            url = base_url(settings.host, listening.getsockname()[1])
            has_ui = settings.ui and settings.workers == 1
            is_embedded = settings.upstream is None or model == SERVED_MODEL_NAME
            has_keys = settings.keys is not None or settings.client_keys is not None
            text = welcome(url, model, is_embedded=is_embedded, has_keys=has_keys, has_ui=has_ui)
            await (server.serve(sockets=[listening]) if supervisor is None else supervisor.run(listening))


async def _example_model(settings: Settings) -> str | None:
    """Return the model for the printed example; None, with a warning, if the upstream does not list its models."""
    from proxy.app import upstream_session
    from proxy.errors import UpstreamError
    from proxy.telemetry.metrics import Metrics
    from proxy.upstream.fleet.factory import create_upstream

    log = logging.getLogger("proxy")
    async with upstream_session(settings) as session:
        engine = create_upstream(settings, session, Metrics())
        log.info("starting the proxy for the upstream %s", engine.display_url)
        try:
            models = [model.id for model in await engine.for_background().models(is_check=True)]
        except UpstreamError as error:
            log.warning("%s; the proxy starts anyway; /ready shows when the upstream is up", error.logged)
            return settings.model
        finally:
            await engine.close()
    if not models:
        log.warning("%s serves no model", engine.display_url)
    elif settings.model is not None and {settings.model, settings.model.rpartition("@")[0]}.isdisjoint(models):
        log.warning("%s serves no model %r; it serves %s", engine.display_url, settings.model, ", ".join(models))
    return settings.model or next(iter(models), None)


async def _demo(problems: int, plot: Path, controller: str | None) -> None:
    from discovery.evaluation.plot import check_plot
    from proxy.commands import demo
    from proxy.server import running
    from proxy.settings import load

    settings = load(controller=controller)
    check_plot(plot)
    ready, upstream = _upstream(settings, console.print)
    async with upstream, running(ready) as url:
        await demo.run(f"{url}/v1", problems, plot)


_Upstream = AbstractAsyncContextManager["EmbeddedServer | None"]


def _upstream(
    settings: Settings, say: Callable[[str], None], on_restart: Callable[[], object] = lambda: None
) -> tuple[Settings, _Upstream]:
    """Return settings with an upstream, and a context in which it runs. By default that is the embedded model."""
    if settings.upstream is not None:
        if settings.embedded_args:
            say("AUTOTTS_EMBEDDED_ARGS is ignored: with an upstream no embedded model is started")
        return settings, nullcontext()
    from proxy.upstream.embedded import EmbeddedServer

    server = EmbeddedServer(args=settings.embedded_flags, on_restart=on_restart)
    return settings.model_copy(update={"upstream": server.url}), _starting(server, say)


@asynccontextmanager
async def _starting(server: EmbeddedServer, say: Callable[[str], None]) -> AsyncIterator[EmbeddedServer]:
    async with AsyncExitStack() as stack:
        say("starting the embedded model on vLLM for CPU; this takes 15 to 60 s")
        with console.status("starting the embedded model…"):
            await stack.enter_async_context(server)
        yield server


def base_url(host: str, port: int) -> str:
    """Return the URL of a server that listens on `host`."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def welcome(url: str, model: str | None, *, is_embedded: bool, has_keys: bool = False, has_ui: bool = True) -> str:
    """Return the text printed at start: a curl command and a Python snippet that work against this server."""
    from proxy.first_question import first_question

    model = model or "MODEL"
    question, answer = first_question(is_embedded=is_embedded)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": question}]}, ensure_ascii=False)
    key = "YOUR_KEY" if has_keys else "unused"
    headers = ["content-type: application/json", "x-tts-beta: 0.5", *(["authorization: Bearer YOUR_KEY"] * has_keys)]
    flags = " ".join(f"-H '{header}'" for header in headers)
    dashboard = f"\nDashboard and playground: {url}/ui\n" if has_ui else ""
    return f"""
AutoTTS Proxy listens on {url}
{dashboard}
curl {url}/v1/chat/completions {flags} -d {shlex.quote(body)}

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
reply = client.chat.completions.create(
    model={json.dumps(model, ensure_ascii=False)},
    messages=[{{"role": "user", "content": r"{question}"}}],
    extra_headers={{"x-tts-beta": "0.5"}},
)
print(reply.choices[0].message.content, reply.usage.total_tokens)

The right answer is {answer}.
"""


if __name__ == "__main__":
    main()
