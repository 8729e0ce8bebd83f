# Everything a person types. `make` alone lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
DAGSTER_PORT ?= 3000
TEST_PROCESSES ?= 2

# what the project's tools find first, and their telemetry switched off
export PATH := $(BIN):$(PATH)
export DAGSTER_HOME := $(abspath .dagster)
export DAGSTER_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo dagster-home dev test test-fast check format deps clean clean-artifacts

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | \
		while IFS='|' read -r name text; do printf '  make %-16s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## make .venv with the pinned dependencies (needs Python 3.11 or newer; PYTHON=... picks one)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make setup: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed, try make setup PYTHON=python3.11" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup dagster-home ## train, evaluate and report on real digits and charts, a few minutes on two cores
	dvc repro train
	python -m pipelines.predict # every cell in one process: starting torch again for each costs more than its answers
	dvc repro
	python -m molmo_assets.sync
	@echo
	@echo "The report:  artifacts/report/index.html   (open it in a browser; it needs no network)"
	@echo "The lineage: make dev, then http://127.0.0.1:$(DAGSTER_PORT)"

dagster-home: $(DAGSTER_HOME)/dagster.yaml ## make .dagster, the folder of Dagster's runs and events, with its settings

$(DAGSTER_HOME)/dagster.yaml: dagster.yaml
	@mkdir -p $(@D) && cp $< $@

dev: setup dagster-home ## open the lineage graph in the Dagster UI (DAGSTER_PORT=3000)
	dagster dev -h 127.0.0.1 -p $(DAGSTER_PORT) -w workspace.yaml

test: setup ## all tests, the slow ones too, in TEST_PROCESSES processes
	python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-fast: setup ## the tests that take no more than a few seconds each
	python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow"

check: setup ## formatting, lint, types and directions of dependence
	ruff format --check .
	ruff check .
	mypy
	lint-imports

format: setup ## reformat the sources and apply the safe fixes of the linter
	ruff check --fix .
	ruff format .

deps: setup ## write each stage's source files into dvc.yaml again, after an import changed
	python -m pipelines.source_deps

clean: ## delete caches of tools; keeps artefacts, state and the environment
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-artifacts: ## delete artefacts, unfinished state and logs of runs (DVC's cache stays)
	rm -rf artifacts .state logs
