# make demo    convert a real pretrained model into a memory hybrid and show what that changed
# make test    everything that has to hold before a change goes in
# Both install what they need into .venv by themselves. Say `make help` for the rest.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Least covered share of kernels, layers and models, in percent.
COVERAGE ?= 90

STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --constraint constraints.txt
# One thread per test process, and no hub is ever asked for a file.
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup checkpoint demo test lint unit contract gpu-check bench docs clean

help:
	@echo "make setup       create $(VENV) with the versions of constraints.txt"
	@echo "make demo        convert SmolLM2-135M into a memory hybrid, tune it, compare it (10 minutes)"
	@echo "make test        format, lint, types, import contract, wheel contents, tests, coverage"
	@echo "make lint        the static half of make test"
	@echo "make unit        the tests alone, without coverage; narrow them with ARGS='tests/unit -k name'"
	@echo "make contract    the contract matrix with 200 splits per configuration instead of 25; writes a record"
	@echo "make bench       benchmarks, as JSON records in benchmarks/records/"
	@echo "make gpu-check   kernels and layers on a CUDA device; uses PYTHON as it is, installs nothing"
	@echo "make checkpoint  bring the SmolLM2-135M file into the cache (MEMZOO_CACHE, default ~/.cache/memzoo)"
	@echo "make docs        the documentation as HTML in docs/_build/"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("make setup needs Python 3.11 or later, found " + sys.version.split()[0] + ". Say make setup PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Installing into $(VENV) (1.7 GB with a CPU build of torch, several GB with a CUDA build; a few minutes) ..."
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) torch
	$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

checkpoint: setup
	@$(RUN) -c "from memzoo.models.checkpoints.fetch import fetch_smollm2; print(fetch_smollm2())"

demo: setup checkpoint
	$(RUN) -m memzoo.train.demo

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo

test: lint checkpoint
	$(TEST) --numprocesses $(WORKERS) --dist worksteal --durations 15 \
	  --cov --cov-report term --cov-fail-under $(COVERAGE)

unit: setup
	$(TEST) --numprocesses $(WORKERS) --dist worksteal $(ARGS)

contract: setup
	MEMZOO_SPLITS=200 MEMZOO_CONTRACT_RECORD=benchmarks/records/contract.json $(TEST) --numprocesses $(WORKERS) --dist worksteal tests/contract

bench: setup
	$(RUN) benchmarks/run.py

gpu-check:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py

docs: setup
	$(PIP) --no-build-isolation --editable ".[docs]"
	$(RUN) -m sphinx -b html docs docs/_build

clean:
	rm -rf $(VENV) build dist demo_output docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
