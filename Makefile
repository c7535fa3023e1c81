# Each target makes the environment it needs: a virtual environment in .venv, from pinned versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Files of tests at a time.
JOBS ?= 2
# Where this is set, every process that a test starts would compile torch and transformers again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help setup demo test check format lint types bench clean
.DEFAULT_GOAL := help

help: ## say what there is to make
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(INSTALLED) ## make the environment in .venv

# torch goes first and by its version: where a build for CPUs alone is offered, that is the one taken, and nothing that
# follows asks for another with gigabytes of CUDA. Modules are compiled when first imported: most of them never are.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cutlm needs Python 3.11 or newer; give one by: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,quantization,serve,eval]'
	touch $@

demo: setup ## see a tiny model answer, be judged and learn from it (CPU, under two minutes)
	$(BIN)/cutlm demo

test: setup ## run the tests
	$(BIN)/pytest -n $(JOBS) --dist loadfile

check: format lint types test ## everything that must pass before a change lands

format: setup ## check the formatting
	$(BIN)/ruff format --check

lint: setup ## check the style
	$(BIN)/ruff check

types: setup ## check the types
	$(BIN)/mypy

# Judged records to measure on; made-up ones where there are none.
RECORDS ?=

bench: setup ## measure time and memory (about three quarters of an hour of an idle machine; RECORDS=FILE for records of your own)
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/train_step.py $(if $(RECORDS),--records $(RECORDS)) --json benchmarks/results/train_step.json
	$(BIN)/python benchmarks/shared_prefix.py --json benchmarks/results/shared_prefix.json
	$(BIN)/python benchmarks/head.py --json benchmarks/results/head.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(BIN)/python benchmarks/generation.py --json benchmarks/results/generation.json
	$(BIN)/python benchmarks/report.py

clean: ## remove what was made here
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
