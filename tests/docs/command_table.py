"""How the commands of the manual are tested: unchanged, changed, or not run for a stated reason.

A command in no table runs unchanged and must exit with status 0. Only programs in `PROGRAMS` may run.
"""

from __future__ import annotations

from typing import Final

PROGRAMS: Final = frozenset({"autotts", "curl", "export"})
"""Programs whose commands run unchanged, unless a table below says otherwise."""

NOT_RUN: Final = {
    "make run": "starts the embedded model; tests/proxy/test_cli.py runs `autotts serve` with it",
    'make run ARGS="--port 9000 --beta 0.5"': "starts the embedded model; tests/docs/test_make.py has its dry run",
    "make run UPSTREAM=http://gpu-machine:8000": "tests/docs/test_make.py runs it",
    "make test": "runs these tests itself",
    "make demo": "takes minutes on the embedded model; tests/proxy/commands/test_demo.py has its table",
    'make real-model ARGS="--sums 60 --controllers cmc"': "takes minutes; tests/real_model has its parts",
    "pip install .": "installs packages; the environment of the tests was made by `pip install --editable .`",
    "pip install build": "installs packages; the extra `dev` has it",
    "python -m build --wheel": "tests/docs/test_make.py builds one",
    "pip install dist/autotts_proxy-*.whl": "installs packages; tests/docs/test_make.py looks into the wheel",
    "vllm serve Qwen/Qwen3-8B --reasoning-parser qwen3 --enable-prompt-tokens-details": "needs a GPU and the model",
    'export PATH="$PWD/.venv/bin:$PATH"': "the tests set their own PATH",
    "python -m tests.faults.attack": "takes minutes; tests/faults/test_hostile.py makes the same attacks",
    "autotts import jsonl ../shared/replay/boinf/aime202*.jsonl.xz --store boinf.db": "needs the public recordings",
    "autotts evaluate --recordings boinf.db --controllers sc@64,asc,adaptive_consistency,short_m_at_k,cmc --betas 1 "
    "--shuffles 10": "needs the public recordings",
    "autotts discover --recordings ../shared/replay/autotts --explorer grammar --minutes 20 --probe-tokens 20 "
    "--seed 1": "needs the public recordings and 20 minutes",
    "autotts discover --recordings autotts.db --explorer llm --llm llm.json --rounds 20 --budget-usd 5 --out run-llm": (
        "needs a key; tests/discovery/search/test_explorers.py runs it against a fake endpoint"
    ),
}
"""Commands that are not run, and why."""

CHANGED: Final = {
    "--minutes 20 --out run": "--rounds 2 --shuffles 1 --workers 1 --out run",
    "--minutes 1 --out run": "--rounds 2 --shuffles 1 --workers 1 --out run",
    "--branches 64 --answer boxed": "--branches 2 --answer boxed",
    "--branches 16": "--branches 2",
    "cmc,asc@64,mine.py": "cmc,asc@16,mine.py --shuffles 5",  # as many branches as are recorded
    "--engine process": "--engine process --workers 1 --shuffles 5",
    "--controllers cmc,asc,single": "--controllers cmc,asc,single --shuffles 5",
    "autotts gate mine.py": "autotts gate mine.py --shuffles 2 --workers 1",
    "--out calibration.json": "--shuffles 2 --workers 1 --out calibration.json",
    "autotts collect questions.jsonl": "autotts collect questions.jsonl --url http://127.0.0.1:8400",
    "--as shadow --report report.json": "--as shadow --force",
    "--as canary": "--as canary --force",
    "--as champion": "--as champion --force",
}
"""Parts of commands that the test replaces, to be quick or because no controller passes the gate on made-up
recordings."""

STATUSES: Final = {
    "autotts gate": (0, 1),  # any verdict on made-up recordings
    "autotts parity": (0, 1, 3),  # made-up episodes need not agree with replay, nor be comparable
    "autotts store forget --tenant": (0, 2),  # the store may hold nothing of that tenant
    "autotts store forget --anonymous": (0, 2),  # the store may hold nothing without a key
}
"""Allowed exit statuses of commands by their beginning. All other commands must exit with 0."""
