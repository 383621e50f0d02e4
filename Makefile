# make setup   the virtual environment .venv (re-running costs nothing)
# make demo    a language model's MLP decomposed, end to end; prints a table and the path of the report
# make test    the tests, with coverage; make test-slow adds those that take longer
# make bench   speed, measured and verified on this machine; make bench-peers: against sparsify and SAELens
# make torture kills, broken file operations and flipped bytes by the hundred (docs/reliability.md)
# make check   what continuous integration runs: lint, types, tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
PEERS := .venv-peers

.PHONY: setup demo test test-slow torture soak lint format types docs bench bench-peers check clean

setup: $(STAMP)

# torch first and alone: on a machine that has a local CPU build, that one is taken; asked for together with
# the rest, pip may resolve to a build that drags gigabytes of GPU libraries along.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mxd needs Python 3.10 or newer; try: make PYTHON=python3.11 setup"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/mxd demo

# One thread: the tests' tensors are so small that a second thread only waits for the first, forever on a busy machine. Files side by side
# in TEST_WORKERS processes instead.
TEST_WORKERS ?= 2
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile -m "not slow and not network" --cov=mxd --cov-report=term --cov-fail-under=90

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not network"

# Every kill, every broken file operation, many flipped bytes: about half an hour. Its figures go to benchmarks/results/reliability.json.
torture: setup
	OMP_NUM_THREADS=1 MXD_RELIABILITY_FIGURES=benchmarks/results/reliability.json $(BIN)/python -m pytest -q -m slow tests/reliability tests/interop

# Two hours (MXD_SOAK_MINUTES for another length) of training, killing, going on, verifying and evaluating on the built-in model.
soak: setup
	OMP_NUM_THREADS=1 MXD_RELIABILITY_FIGURES=benchmarks/results/reliability.json $(BIN)/python -m pytest -q -s -m soak tests/reliability

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/pyright

docs: setup
	$(BIN)/python tools/gen_cli_docs.py
	$(BIN)/python tools/results_tables.py

bench: setup
	$(BIN)/mxd bench
	$(BIN)/python tools/results_tables.py

# Beside ours, not in it: what they depend on is none of ours. Torch first, for the reason above.
$(PEERS)/.setup-stamp: pyproject.toml constraints.txt benchmarks/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . -r benchmarks/peers.txt
	@touch $@

bench-peers: setup $(PEERS)/.setup-stamp
	$(PEERS)/bin/mxd bench peers
	$(BIN)/python tools/results_tables.py

check: lint types test

clean:
	rm -rf $(VENV) $(PEERS) .pytest_cache .ruff_cache .coverage
