# Every target first creates the environment it needs: a virtual environment in .venv with pinned versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Number of processes that run tests: one more than the two cores of CI, because some tests wait for servers.
JOBS ?= 3
# If this is set to a value, every process that a test starts compiles torch and transformers again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help setup demo test check format lint types docs bench real-model wheel-test lowest-test clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED) ## create the environment in .venv

# Install torch first, at the pinned version: if the index offers a CPU-only build, pip takes it, and the packages after it
# do not pull in a build with gigabytes of CUDA. --no-compile: most modules are never imported.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cutlm needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,docs,quantization,serve,eval]'
	touch $@

demo: setup ## train a tiny model on judgments of its answers (CPU, under two minutes)
	$(BIN)/cutlm demo

test: setup ## run the tests
	$(BIN)/pytest -n $(JOBS) --dist worksteal

check: format lint types docs test ## run everything that must pass before a change lands

format: setup ## check the formatting
	$(BIN)/ruff format --check

lint: setup ## check for lint
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: setup ## check the types
	$(BIN)/mypy

docs: setup ## build the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Judged records for the training benchmark; synthetic ones if empty.
RECORDS ?=

bench: setup ## measure time and memory (about 80 minutes on an idle machine; RECORDS=FILE uses your own records)
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/train_step.py $(if $(RECORDS),--records $(RECORDS)) --json benchmarks/results/train_step.json
	$(BIN)/python benchmarks/train_step.py --shape smollm2 --all_linear --batch_size 8 --num_records 16 --num_tokens 140 \
		--variants cutlm frozen floor --json benchmarks/results/train_step_smollm2.json
	$(BIN)/python benchmarks/shared_prefix.py --json benchmarks/results/shared_prefix.json
	$(BIN)/python benchmarks/head.py --json benchmarks/results/head.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/startup.py --json benchmarks/results/startup.json
	$(BIN)/python benchmarks/generation.py --json benchmarks/results/generation.json
	$(if $(RECORDS),$(BIN)/python benchmarks/generation.py --model "$$($(MAKE) -s real-model)" --records $(RECORDS) \
		--num_prompts 128 --max_new_tokens 256 --engines cutlm padded --json benchmarks/results/generation_smollm2.json)
	$(if $(RECORDS),$(BIN)/python benchmarks/preparation.py --records $(RECORDS) --tokenizer "$$($(MAKE) -s real-model)" \
		--json benchmarks/results/preparation.json)
	$(BIN)/python benchmarks/report.py

# Weights of the model: float32 or bfloat16.
DTYPE ?= float32

real-model: setup ## make a folder of a small real model (SmolLM2-135M-Instruct) in the test cache, and print its path
	@PYTHONPATH=tests $(BIN)/python -m real.smollm2 --dtype $(DTYPE)

# In fresh environments, both with whatever torch the index offers; a CPU build is found by PIP_FIND_LINKS or pip.conf.
wheel-test: setup ## build the wheel, check it, install it without extras in a new environment and run the demo
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	build/wheel/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd build && wheel/bin/cutlm --version --verbose && wheel/bin/cutlm demo --quick --out wheel/demo

# Several minutes and gigabytes: the lowest torch comes with CUDA.
lowest-test: setup ## run a part of the tests with the lowest versions of the dependencies
	$(BIN)/pip install --quiet 'uv>=0.8'
	$(BIN)/uv venv --quiet --clear build/lowest
	$(BIN)/uv pip install --quiet --resolution lowest-direct --python build/lowest/bin/python '.[studio,gguf]'
	$(BIN)/uv pip install --quiet --python build/lowest/bin/python 'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100' scipy
	build/lowest/bin/python -m pytest tests/losses tests/data tests/model tests/training/test_invariance.py \
		tests/training/test_config.py

clean: ## remove the environment and all build and test output
	rm -rf $(VENV) build dist demo site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
