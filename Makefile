# The front door. Every target builds .venv first, from the versions in requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# The lock has no back end but the CPU; and libtpu, which compiles plans, would look for a TPU at every start.
export JAX_PLATFORMS ?= cpu

.PHONY: help env reproduce test lint lab lock publish chaos bench
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## build .venv from the locked versions

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "effnetlib needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

reproduce: $(STAMP)  ## run the laptop suite and render its reports (outputs/laptop/index.html)
	$(BIN)/effnetlib run notebooks/suites/laptop.yaml

test: $(STAMP)  ## run all tests, the slow ones too
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(STAMP)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(STAMP)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

lock:  ## renew requirements.lock from pyproject.toml (needs uv)
	uv pip compile --quiet --universal --upgrade --python-version 3.11 --extra test --extra plan --no-header \
		--no-emit-index-url --no-annotate --output-file requirements.lock pyproject.toml

SUITE ?= laptop

publish:  ## copy a suite's records, reports and figures (SUITE=laptop) to outputs/published, which git keeps
	rm -rf outputs/published/$(SUITE) && mkdir -p outputs/published/$(SUITE)
	tar -C outputs/$(SUITE) -cf - --exclude checkpoints --exclude executed --exclude logs . | tar -C outputs/published/$(SUITE) -xf -

chaos: $(STAMP)  ## strike real runs at random for at most 15 minutes; writes outputs/published/chaos.json
	$(BIN)/python tests/chaos.py --faults 60 --minutes 15 --record outputs/published/chaos.json

BENCH_STAMP := .venv-bench/.installed

bench: $(STAMP) $(BENCH_STAMP)  ## measure speed beside other libraries for 20 minutes; writes outputs/published/bench.json
	$(BIN)/python -m tests.bench --record outputs/published/bench.json

$(BENCH_STAMP): tests/bench/requirements.txt requirements.lock
	$(PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r $< -c requirements.lock
	@touch $@
