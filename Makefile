# On a machine that has only python3 (>= 3.11), git and make: `make quickstart`, `make test`.
# VENV and PYTHON choose another environment: make test VENV=.venv-3.11 PYTHON=python3.11

VENV ?= .venv
BIN = $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: quickstart test test-slow lint format bench docs clean

quickstart: $(VENV)/core  ## train a small robust DEQ on real digits, evaluate it, draw the plots
	$(BIN)/python -m deq_jax.train --config configs/digits_pgd_at.py --workdir $(RUN)
	$(BIN)/python -m deq_jax.evaluate --workdir $(RUN)

test: $(VENV)/test  ## the fast tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/test  ## the tests that take minutes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

lint: $(VENV)/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test  ## speed, memory and agreement with the papers' numbers; results in runs/bench; an hour or two
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/entropy.py
	$(BIN)/python benchmarks/parity.py

docs: $(VENV)/docs  ## the site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info

# One stamp per extra, so that each command installs only what it needs, once.
$(VENV)/python: scripts/find_python
	$${PYTHON:-$$(scripts/find_python)} -m venv $(VENV)
	touch $@

$(VENV)/core: $(VENV)/python setup.cfg
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/test $(VENV)/dev $(VENV)/docs: $(VENV)/%: $(VENV)/core
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$*]'
	touch $@

export PYTHON
