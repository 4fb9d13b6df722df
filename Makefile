# Everything runs inside .venv, which `make setup` builds. Variables, all optional:
#   PYTHON       interpreter that .venv is built from, 3.10 or newer (default python3)
#   TORCH_INDEX  package index that torch is taken from (default: the one that pip is set to)
#   ARGS         more arguments for pytest, for example: make test ARGS='-k resume -x'

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
export PYTHON TORCH_INDEX

BIN := .venv/bin
STAMP := .venv/.up-to-date
# One thread: sums of floats then come out alike on every machine, and small models are no slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Files go to two processes at once, whole: fixtures of a file are made once. Long files come before short ones.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-rl test test-fast test-slow test-vllm check format clean

help: ## show this list
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install what the rest needs (the others call it by themselves)

$(STAMP): pyproject.toml scripts/setup.sh
	@sh scripts/setup.sh
	@touch $@

demo: $(STAMP) ## teach a small model a new name and ask it who it is (about three minutes)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo.py

demo-rl: $(STAMP) ## teach it sums of one digit by rewards alone (about five minutes)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo_rl.py

test: $(STAMP) ## run every test, as continuous integration does (about a quarter of an hour on two cores)
	$(PYTEST) $(TWO) --durations=10 -m 'not slow_suite and not vllm' $(ARGS)

test-fast: $(STAMP) ## run the tests that take seconds
	$(PYTEST) -m 'not slow and not slow_suite and not vllm' $(ARGS)

test-slow: $(STAMP) ## run the random cases that the other targets try a few of (minutes)
	$(PYTEST) --durations=10 -m slow_suite $(ARGS)

test-vllm: ## run what needs vLLM, on the CPU in .venv-vllm (made once: minutes, 3 GB; then minutes)
	@sh scripts/setup_vllm.sh
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm $(ARGS) tests/on_vllm

check: $(STAMP) ## lint, formatting and who may import whom
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP) ## reformat the code and apply the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and every cache; runs under output/ stay
	rm -rf .venv .venv-vllm build dist .pytest_cache .ruff_cache .import_linter_cache src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
