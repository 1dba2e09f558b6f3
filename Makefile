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
INSTALL := $(UV) pip install --quiet --python $(BIN)/python -c requirements.lock

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types format bench lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | column -t -s '|'

demo: $(VENV)/.demo ## ingest examples/demo.toml into data/demo, verify it, train a small SAE from its stream
	@$(BIN)/actlake demo

test: lint ## lint, types and all tests
	@$(BIN)/python -m pytest

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

bench: $(VENV)/.dev ## run every benchmark
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# Torch is locked without a local version (+cpu, +cu130), and without the GPU packages that its registry build names:
# the lock constrains what is chosen and requires nothing itself.
lock: $(UV) ## resolve requirements.lock anew
	env -u UV_FIND_LINKS $(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest \
	  --all-extras --no-annotate --no-header pyproject.toml -o $(VENV)/resolved.txt
	{ echo "# Made by 'make lock'; used as constraints (-c)."; \
	  grep -vE '^(nvidia-|cuda-|triton)' $(VENV)/resolved.txt; } > requirements.lock

clean: ## remove the environment, caches and builds; datasets under data/ stay
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find ingest storage shards jobs examples tests benchmarks src -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "actlake needs Python 3.11 or newer; try: make PYTHON=python3.11 <target>")'
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.demo: pyproject.toml requirements.lock | $(UV)
	@echo "installing actlake[demo] into $(VENV)"
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml requirements.lock | $(UV)
	@echo "installing actlake[dev] into $(VENV)"
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.demo $@
