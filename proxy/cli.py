"""`autotts`: the verbs of the project."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from proxy import demo
from proxy.dial import parse_beta
from proxy.embedded import EmbeddedServer
from proxy.errors import ApiError, ProxyError, SettingsError
from proxy.server import Server, listen, running
from proxy.settings import Settings, load

BAD_INPUT = 2
"""Exit status when what the user gave cannot be used, or the machine cannot do it."""

app = typer.Typer(name="autotts", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


@app.callback()
def autotts() -> None:
    """An OpenAI-compatible proxy that spends test-time compute by a controller with one dial, β."""


def _beta(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_beta(text, "--beta")
    except ApiError as error:
        raise SettingsError(error.message) from None


@app.command()
def serve(
    upstream: Annotated[
        str | None, typer.Option(help="vLLM's base URL; without it the embedded model is served")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model for requests that name none")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on")] = 8400,
    controller: Annotated[str | None, typer.Option(help="controller that serves requests which name none")] = None,
    beta: Annotated[str | None, typer.Option(help="β for requests that set none; without it they pass through")] = None,
    interval: Annotated[int | None, typer.Option(min=1, help="tokens of one interval")] = None,
) -> None:
    """Serve, until interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, markup=False)])
    _run(_serve(host, port, upstream=upstream, model=model, controller=controller, beta=beta, interval=interval))


@app.command("demo")
def demonstrate(
    problems: Annotated[int, typer.Option(min=1, max=1000, help="held-back problems to ask")] = 40,
    plot: Annotated[Path, typer.Option(help="where the accuracy-token picture goes (.png or .svg)")] = Path(
        "frontier.png"
    ),
    controller: Annotated[str | None, typer.Option(help="controller to show")] = None,
) -> None:
    """Ask the embedded model the same problems at several β and show what it bought."""
    _run(_demo(problems, plot, controller=controller))


def main() -> None:
    """The console script."""
    app()


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run a command; what the user can mend is told in one line. SIGTERM ends it as orderly as an interrupt does."""
    try:
        asyncio.run(_interruptible(work))
    except ProxyError as error:
        console.print(f"autotts: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(130) from None


async def _interruptible(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


async def _serve(host: str, port: int, *, beta: str | None, **given: Any) -> None:
    settings = load(beta=_beta(beta), **given)
    with listen(host, port) as listening:
        async with _upstream(settings) as ready:
            server = Server(ready)
            url = f"http://{host}:{listening.getsockname()[1]}"
            console.print(welcome(url, settings.upstream is None), highlight=False, markup=False, soft_wrap=True)
            await server.serve(sockets=[listening])


async def _demo(problems: int, plot: Path, **given: Any) -> None:
    settings = load(**given)
    demo.check_plot(plot)
    async with _upstream(settings) as ready, running(ready) as url:
        await demo.run(f"{url}/v1", problems, plot)


@asynccontextmanager
async def _upstream(settings: Settings) -> AsyncIterator[Settings]:
    """Settings with an upstream in them: the embedded model's, running as long as the context, if none was given."""
    if settings.upstream is not None:
        yield settings
        return
    async with AsyncExitStack() as stack:
        with console.status("starting the embedded model (about 20 s)…"):
            server = await stack.enter_async_context(EmbeddedServer())
        yield settings.model_copy(update={"upstream": server.url})


def welcome(url: str, is_embedded: bool) -> str:
    """What to type next: a curl and a Python snippet that work against this server."""
    model = "autotts-tiny" if is_embedded else "your model"
    question = demo.EXAMPLE if is_embedded else "What is 17 * 23? Put the answer in \\boxed{}."
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{question}"}}]}}'.replace("\\", "\\\\")
    return f"""
AutoTTS Proxy listens on {url}

curl {url}/v1/chat/completions -H 'content-type: application/json' -H 'x-tts-beta: 0.5' -d '{body}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="unused")
reply = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": r"{question}"}}],
    extra_headers={{"x-tts-beta": "0.5"}},
)
print(reply.choices[0].message.content, reply.usage.total_tokens)
"""


if __name__ == "__main__":
    main()
