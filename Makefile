# On a machine with only Python and make: `make demo`, `make test`, `make check`.
# Each sets up .venv first, once, and again only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-sglang check format matrix fuzz bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(SETUP) ## set up .venv with everything that the other targets need

# torch goes first and alone: pinned, it takes the build that this machine's pip offers, and nothing after replaces it.
$(SETUP): pyproject.toml constraints.txt
	@echo "setting up $(VENV); the first time this takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable '.[cli,video,digest,prometheus,bench,dev]'
	@touch $@

demo: $(SETUP) ## run the demonstration: make demo ARGS="picture.jpg --ranks 4"
	@$(BIN)/shmcast demo $(ARGS)

test: $(SETUP) ## run the tests: make test ARGS="-k arena -x"
	@$(BIN)/python -m pytest $(ARGS)

test-sglang: $(SETUP) ## run SGLang's own schedulers over shmcast: make test-sglang ARGS="--release 0.5.9 -- -x"
	@$(BIN)/python -m tests.sglang.run $(ARGS)

check: $(SETUP) ## format, lint, types, layers, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(SETUP) ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

matrix: $(SETUP) ## end every process at every point, 20 times over, and fail every call: make matrix ROUNDS=3
	@MATRIX_ROUNDS=$(or $(ROUNDS),20) $(BIN)/python -m pytest tests/test_matrix.py tests/test_failing_calls.py $(ARGS)

fuzz: $(SETUP) ## feed hostile bytes to the parsers: make fuzz ARGS="skeleton --seconds 60"
	@$(BIN)/python -m fuzz.run $(ARGS)

bench: $(SETUP) ## measure: make bench ARGS="--help"
	@$(BIN)/python benchmarks/bench_broadcast.py $(ARGS)

clean: ## delete caches and build outputs; .venv stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find shmcast tests benchmarks fuzz -name __pycache__ -type d -prune -exec rm -rf {} +
