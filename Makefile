# On a machine that has only python3 (>= 3.11), git and make: `make quickstart`, `make test`.
# VENV and PYTHON choose another environment: make test VENV=.venv-3.11 PYTHON=python3.11

VENV ?= .venv
BIN = $(VENV)/bin
RUN ?= runs/quickstart
MINUTES ?= 30

# Fast tests that use every dependency of the package.
OLDEST_TESTS = tests/core tests/attacks/test_pgd.py tests/storage tests/data tests/reporting \
	tests/models/test_pretrained.py tests/training/test_optimizers.py tests/training/test_workdir.py \
	tests/training/test_fit.py tests/commands/test_progress.py

.PHONY: quickstart test test-slow test-oldest lint format bench soak docs wheel wheel-test clean

quickstart: $(VENV)/core  ## train a small robust DEQ on real digits, evaluate it, draw the plots
	$(BIN)/python -m deq_jax.train --config configs/digits_pgd_at.py --workdir $(RUN)
	$(BIN)/python -m deq_jax.evaluate --workdir $(RUN)

test: $(VENV)/test  ## the fast tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/test  ## the slow tests; ARGS chooses some: make test-slow ARGS=tests/core
	$(BIN)/python -m pytest -q -n 3 --dist worksteal -m slow $(ARGS)

test-oldest: .venv-oldest/test  ## some of the fast tests, with the oldest dependencies that setup.cfg allows, on Python 3.11
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" -W ignore::DeprecationWarning $(OLDEST_TESTS)

lint: $(VENV)/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test  ## speed, memory, peers (those installed) and agreement: writes their pages in docs/results
	$(BIN)/python -m benchmarks.speed --page docs/results/speed-and-memory.md
	$(BIN)/python -m benchmarks.history
	$(BIN)/python -m benchmarks.peers --page docs/results/peers.md
	$(BIN)/python -m benchmarks.growth --page docs/results/growth.md
	$(BIN)/python -m benchmarks.parity --page docs/results/agreement.md

soak: $(VENV)/test  ## kills, stops and damages tiny runs at random, for MINUTES; the table is in docs/results/failures.md
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

docs: $(VENV)/docs  ## the site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/release  ## the wheel and the sources, in build/dist
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist

wheel-test: wheel  ## the wheel works where it is installed, outside of the checkout
	scripts/try_wheel build/dist/*.whl

clean:
	rm -rf $(VENV) .venv-oldest build *.egg-info

# One stamp per extra, so that each command installs only what it needs, once.
$(VENV)/python: scripts/find_python
	$${PYTHON:-$$(scripts/find_python)} -m venv $(VENV)
	touch $@

$(VENV)/core: $(VENV)/python setup.cfg
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/test $(VENV)/dev $(VENV)/docs $(VENV)/release: $(VENV)/%: $(VENV)/core
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$*]'
	touch $@

# NumPy 2.0 and others as old have no wheels for Python 3.13.
.venv-oldest/test: setup.cfg scripts/oldest.py
	rm -rf .venv-oldest
	"$$(scripts/find_python 3.11)" -m venv .venv-oldest
	.venv-oldest/bin/python scripts/oldest.py >.venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -e '.[test]' -c .venv-oldest/constraints.txt
	touch $@

export PYTHON
