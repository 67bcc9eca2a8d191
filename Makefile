# Everything runs in .venv, which the first target that needs it sets up; .venv/.installed remembers that it is complete.
# PYTHON=python3.12 chooses the interpreter of a new .venv; ARGS="..." is passed on to the command of the target.

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Two processes, and the tests of a file in one of them: they share its searches and servers; in the order of tests/conftest.py.
TEST_PROCESSES := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup search test test-all check bench gpu reproduce-fashion-mnist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-23s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## set everything up in .venv, test extras included

search: $(INSTALLED)  ## search the default space (digits, local Ray, MLflow on SQLite); ARGS="fashion_mnist --set search.num_trials=4"
	$(RUN) -m orchestrator.search $(ARGS)

test: $(INSTALLED)  ## run the tests, without the slow ones
	$(RUN) -m pytest -m "not slow" $(TEST_PROCESSES) $(ARGS)

test-all: $(INSTALLED)  ## run all tests
	$(RUN) -m pytest $(ARGS)

check: $(INSTALLED)  ## lint, format, types, links of the documents, who imports what, plain words
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_docs.py tests/test_house.py tests/test_words.py

bench: $(INSTALLED)  ## run the benchmarks and write benchmarks/results; hours on 2 cores, and in pieces where benchmarks/README.md says so
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	$(RUN) -m benchmarks.bench_main_job
	$(RUN) -m orchestrator.search && $(RUN) -m benchmarks.bench_tracking runs/digits
	$(RUN) -m tests.gator.sweep --all && $(RUN) -m tests.gator.sweep --render
	$(RUN) -m benchmarks.bench_trace --all && $(RUN) -m benchmarks.bench_trace --render
	$(RUN) -m benchmarks.bench_accuracy --all && $(RUN) -m benchmarks.bench_accuracy --render

# A machine with a GPU may have no network: where a Python has torch, nothing is installed.
gpu:  ## run what needs a GPU, tests then benchmarks, 20 minutes at most; writes benchmarks/results/gpu.json; run it again for the rest
	@for python in $(RUN) $(PYTHON); do \
	  if $$python -c 'import torch' 2>/dev/null; then exec $$python -m benchmarks.on_gpu $(ARGS); fi; \
	done; $(MAKE) setup && exec $(RUN) -m benchmarks.on_gpu $(ARGS)

reproduce-fashion-mnist: $(INSTALLED)  ## the paper's chain on Fashion-MNIST, in cells that are skipped when present; ARGS="--seconds 600"
	$(RUN) -m benchmarks.reproduce_fashion_mnist --all --render $(ARGS)

clean:  ## remove caches and build leftovers; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +

# An install that was cut short leaves no stamp and is completed by the next make; venv on an existing folder keeps what is there.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'make: PYTHON=$(PYTHON) is no Python 3.11 or newer; name one that is: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --editable '.[test]'
	@touch $@
