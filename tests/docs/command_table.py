"""How the commands of the manual are tested: unchanged, changed, or not run for a stated reason.

A command in no table runs unchanged and must exit with status 0. Only programs in `PROGRAMS` may run.
"""

from __future__ import annotations

from typing import Final

PROGRAMS: Final = frozenset({"autotts", "chmod", "curl", "export", "mkdir", "touch"})
"""Programs whose commands run unchanged, unless a table below says otherwise."""

NOT_RUN: Final = {
    "make run": "starts the embedded model; tests/proxy/test_cli.py runs `autotts serve` with it",
    'make run ARGS="--port 9000 --beta 0.5"': "starts the embedded model; tests/docs/test_make.py has its dry run",
    "make run UPSTREAM=http://gpu-machine:8000": "tests/docs/test_make.py runs it",
    "make test": "runs these tests itself",
    "make compile": "takes a minute; tests/controllers/core compiles a copy of the checkout",
    "make bench ARGS=rivals": "takes a quarter of an hour; tests/test_bench.py runs every part at its smallest size",
    "make bench PEERS=1 ARGS=edge": "installs other proxies; tests/test_bench.py runs the part at its smallest size",
    'make bench ARGS="edge own"': "takes minutes; tests/test_bench.py runs every part at its smallest size",
    "python -m tests.bench.request_profile forwarded": "tests/test_bench.py runs it",
    "python -m tests.bench.request_profile controlled": "tests/test_bench.py runs it",
    "make loop": "takes half an hour; tests/proxy/commands/loop has a small one",
    'make loop ARGS="--folder loop1 --seed 1 --search 150 --held-out 300 --branches 32 --minutes 5 --requests 100"': (
        "takes an hour; see `make loop`"
    ),
    'make loop ARGS="--folder loop2 --seed 2 --search 120 --held-out 240 --branches 32 --minutes 4 --requests 100"': (
        "takes an hour; see `make loop`"
    ),
    'make loop ARGS="--search 400 --held-out 400 --minutes 20"': "takes two hours; see `make loop`",
    "autotts evaluate --recordings loop/recordings.jsonl --split held-out --controllers "
    "adaptive_consistency,deploy/embedded/champion/champion.py --betas 0.25,0.5,1 --shuffles 5 --max-branches 48 "
    "--signals none": "needs the recordings of a loop",
    "autotts discover --recordings loop2/recordings.jsonl --signals none --minutes 2 --seed 1 --latency 0.5 "
    "--champions adaptive_consistency,cmc --out none": "needs the recordings of a loop",
    "autotts evaluate --recordings loop2/recordings.jsonl --split held-out --signals none --max-branches 32 "
    "--controllers adaptive_consistency,none/grammar-2-11.py --betas 0,0.25,0.5,0.75,1 --shuffles 5": (
        "needs the recordings of a loop"
    ),
    "autotts signals --recordings loop/recordings.jsonl": "needs the recordings of a loop",
    "make demo": "takes minutes on the embedded model; tests/proxy/commands/test_demo.py has its table",
    'make real-model ARGS="--sums 60 --controllers cmc --dtype bfloat16"': "takes minutes; see tests/real_model",
    'make real-model ARGS="--discover 2 --questions 80 --branches 8"': "takes half an hour; see tests/real_model",
    'make real-model ARGS="--extraction 60 --betas 0,0.25,0.5"': "takes an hour; tests/real_model has its parts",
    "pip install '.[postgres]'": "installs packages; the environment of the tests has the extra's",
    "createdb --encoding UTF8 autotts": "needs a server; tests/postgres_server.py runs the program on one",
    "export AUTOTTS_STORE=postgresql://autotts@db.example.org/autotts": (
        "needs that server; tests/discovery/store/test_places.py gives commands such a URL"
    ),
    "autotts store copy autotts.db postgresql://autotts@db.example.org/autotts": (
        "needs that server; tests/discovery/store/test_copying.py copies stores to one"
    ),
    "autotts registry copy registry postgresql://autotts@db.example.org/autotts": (
        "needs that server; tests/discovery/promotion/test_registry_copying.py copies registries to one"
    ),
    "autotts registry copy-ledger gate.jsonl postgresql://autotts@db.example.org/autotts": (
        "needs that server; tests/discovery/promotion/test_registry_copying.py copies ledgers to one"
    ),
    "autotts gate mine.py --recordings $AUTOTTS_STORE --ledger $AUTOTTS_STORE --report report.json": (
        "needs that server; tests/discovery/promotion/test_gate.py judges with a ledger in one"
    ),
    "ray start --head --port 6379": "starts a cluster that would go on; tests/ray_cluster.py starts one for tests",
    "autotts evaluate --recordings autotts.db --engine ray --address 127.0.0.1:6379": (
        "needs that cluster; tests/discovery/evaluation/test_ray_engine.py evaluates on one"
    ),
    "autotts discover --recordings autotts.db --engine ray --address 127.0.0.1:6379 --rounds 50 --out run-ray": (
        "needs that cluster; tests/discovery/search/test_ray_search.py searches on one"
    ),
    "pip install .": "installs packages; the environment of the tests was made by `pip install --editable .`",
    'pip install "git+file://$PWD"': "installs packages; tests/packaging installs the project from git",
    'pip install "autotts-proxy[postgres,otel] @ git+file://$PWD"': "installs packages, from the registry too",
    'pip install "$(echo dist/autotts_proxy-*.whl)[postgres,otel]"': "installs packages, from the registry too",
    '(umask 077 && sqlite3 autotts.db ".backup autotts-before.db")': "needs SQLite's own program",
    '(umask 077 && sqlite3 autotts.db ".backup copy.db")': "needs SQLite's own program, which need not be installed",
    "autotts store verify --store copy.db": "needs that copy; see tests/discovery/commands/test_store_command.py",
    "cp --recursive registry registry-before": "copies a folder that the manual makes on another page",
    "make package": "installs packages from the registry; tests/packaging has its parts",
    "pip install build": "installs packages; the extra `dev` has it",
    "python -m build": "tests/packaging/test_packaging.py builds both files",
    "pip install dist/autotts_proxy-*.whl": "installs packages; tests/packaging installs that wheel",
    "vllm serve Qwen/Qwen3-8B --reasoning-parser qwen3 --enable-prompt-tokens-details": "needs a GPU and the model",
    'export PATH="$PWD/.venv/bin:$PATH"': "the tests set their own PATH",
    "python -m tests.faults.attack": "takes minutes; tests/faults/test_hostile.py makes the same attacks",
    "autotts import jsonl ../shared/replay/boinf/aime202*.jsonl.xz --store boinf.db": "needs the public recordings",
    "autotts evaluate --recordings boinf.db --controllers sc@64,asc,adaptive_consistency,short_m_at_k,cmc --betas 1 "
    "--shuffles 10": "needs the public recordings",
    "autotts evaluate --recordings ../shared/replay/autotts --models Qwen3-1.7B,Qwen3-8B --benchmarks aime25 "
    "--controllers single,adaptive_consistency --betas 0.25,0.5,0.75,1 --shuffles 10": (
        "needs the public recordings; tests/discovery/evaluation/test_published.py has its figures"
    ),
    "autotts evaluate --recordings ../shared/replay/autotts --controllers "
    "sc@64,adaptive_consistency,cmc,parallel_probe,short_m_at_k --betas 1 --shuffles 10 --benchmarks aime25": (
        "needs the public recordings"
    ),
    "autotts collect questions.jsonl --out held-out.jsonl --branches 64 --until-decided --finalist mine.py "
    "--champion cmc --ledger gate.jsonl --max-tokens-total 50000000": (
        "needs more questions than these tests have; tests/discovery/commands/test_collect_until.py runs it"
    ),
    "autotts gate short_m_at_k --champion cmc --recordings ../shared/replay/autotts "
    "--models Qwen3-1.7B,Qwen3-4B,Qwen3-8B --shuffles 10 --ledger gate.jsonl": "needs the public recordings",
    "autotts gate short_m_at_k --champion cmc --recordings ../shared/replay/autotts --models Qwen3-1.7B,Qwen3-8B "
    "--shuffles 4 --plan": "needs the public recordings",
    "autotts calibrate --recordings boinf.db --controllers adaptive_consistency,short_m_at_k,esc --answers canonical "
    "--shuffles 5 --compare --out boinf.json": "needs the public recordings",
    "autotts calibrate --recordings ../shared/replay/autotts --controllers adaptive_consistency,short_m_at_k,cmc "
    "--shuffles 5 --compare --out qwen3.json": "needs the public recordings",
    "autotts calibrate --recordings ../shared/replay/autotts --betas 0.5 --shuffles 5 --out agreement.json": (
        "needs the public recordings"
    ),
    "autotts discover --recordings ../shared/replay/autotts --explorer grammar --minutes 20 --probe-tokens 20 "
    "--benchmarks aime24 --workers 1 --seed 1 --out search2": "searches for twenty minutes on the public recordings",
    "autotts discover --recordings ../shared/replay/autotts --explorer grammar --minutes 20 --probe-tokens 20 "
    "--no-kernel --harm 0 --seed 1 --out search1": "needs the public recordings and 20 minutes",
    "autotts gate controllers/discovered/lockstep_lead.py --champion cmc --recordings ../shared/replay/autotts "
    "--shuffles 10 --ledger gate.jsonl": "needs the public recordings",
    "autotts evaluate --recordings ../shared/replay/autotts --controllers sc,asc,asc@40,esc,parallel_probe,cmc "
    "--betas 0.5,1": "needs the public recordings; tests/discovery/evaluation/test_published.py checks the figures",
    "autotts discover --recordings autotts.db --explorer llm --llm llm.json --rounds 20 --budget-usd 5 --out run-llm": (
        "needs a key; tests/discovery/search/test_explorers.py runs it against a fake endpoint"
    ),
}
"""Commands that are not run, and why."""

ELSEWHERE: Final = {
    "docker": "needs a container engine; tests/deploy checks the Dockerfile and the Compose file without one",
    "helm": "needs a cluster; tests/deploy/test_chart.py renders the chart",
    "kubectl": "needs a cluster",
    "openssl": "makes a password, and need not be installed",
}
"""Programs whose commands are not run, and why."""

CHANGED: Final = {
    "--minutes 20 --out run": "--rounds 2 --shuffles 1 --workers 1 --out run",
    "--minutes 1 --out run": "--rounds 2 --shuffles 1 --workers 1 --out run",
    "--branches 64 --answer boxed": "--branches 2 --answer boxed",
    "--branches 16": "--branches 2",
    "cmc,asc@64,mine.py": "cmc,asc@16,mine.py --shuffles 5",  # as many branches as are recorded
    "--engine process": "--engine process --workers 1 --shuffles 5",
    "--engine ray --workers 4": "--engine ray --workers 1",
    "--engine ray --workers 2": "--engine ray --workers 1 --shuffles 5",
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
