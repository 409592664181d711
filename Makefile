# The front door. Every target builds .venv first, from the versions in requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# The lock has no back end but the CPU; and libtpu, which compiles plans, would look for a TPU at every start.
export JAX_PLATFORMS ?= cpu
# A program's temporaries are large blocks of memory, which glibc takes from the kernel anew at every step, empty pages and all. In huge
# pages, and with what can be kept, a step on CPU takes a fifth less (tuning.json).
KEEP := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736
export GLIBC_TUNABLES ?= $(KEEP)

.PHONY: help env reproduce test test-oldest lint lab lock address publish chaos bench bench-gpu bench-input rehearse images
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

PYTHON_OLDEST ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo $(PYTHON))
OLDEST := .venv-oldest

$(OLDEST)/.installed: requirements-oldest.lock pyproject.toml
	$(PYTHON_OLDEST) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-oldest.lock
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-oldest: $(OLDEST)/.installed  ## run all tests on the oldest versions that pyproject.toml allows (Python 3.12 if there is one)
	$(OLDEST)/bin/python -m pytest --numprocesses 2 --dist worksteal

lint: $(STAMP)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(STAMP)  ## open JupyterLab at the checkout, on the overview
	$(BIN)/jupyter lab notebooks/00_overview.ipynb --notebook-dir=. $(if $(filter 0,$(shell id -u)),--allow-root)

COMPILE := uv pip compile --quiet --upgrade --no-header --no-emit-index-url --no-annotate --extra test

lock:  ## renew requirements.lock and requirements-oldest.lock from pyproject.toml (needs uv)
	$(COMPILE) --universal --python-version 3.11 --extra plan --output-file requirements.lock pyproject.toml
	$(COMPILE) --universal --resolution lowest-direct --no-build --python-version 3.11 --output-file requirements-oldest.lock pyproject.toml

address: $(STAMP)  ## write the address of git's remote into badges and notebooks, for a fork
	$(BIN)/python notebooks/tools/address.py

publish: $(STAMP)  ## write the READMEs' tables and the companion page from outputs/published; SUITE=laptop puts that suite there first
	$(BIN)/python notebooks/tools/publish.py $(SUITE)

IMAGE ?= colab

rehearse: $(STAMP)  ## run every notebook alone as on Colab (IMAGE=kaggle: on Kaggle), in a fresh environment
	$(BIN)/python tests/rehearse.py $(IMAGE) $(if $(IMAGE_PYTHON),--python $(IMAGE_PYTHON))

IMAGES := colab kaggle

.venv-colab/.installed: PYTHON_IMAGE := python3.13
.venv-kaggle/.installed: PYTHON_IMAGE := python3.12
.venv-%/.installed: tests/images/%.txt pyproject.toml
	$(PYTHON_IMAGE) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(@D)/bin/python notebooks/hosted.py
	@touch $@

images: $(STAMP) $(IMAGES:%=.venv-%/.installed)  ## compile with the libtpu of Colab and Kaggle, for hours; writes outputs/published/images.json
	for image in $(IMAGES); do .venv-$$image/bin/python tests/images/compile.py $$image || exit 1; done
	$(BIN)/python tests/images/compile.py lock

chaos: $(STAMP)  ## strike real runs at random for at most 15 minutes; writes outputs/published/chaos.json
	$(BIN)/python tests/chaos.py --faults 60 --minutes 15 --record outputs/published/chaos.json

BENCH_STAMP := .venv-bench/.installed

bench: $(STAMP) $(BENCH_STAMP)  ## measure speed beside other libraries for half an hour or more; writes outputs/published/bench.json
	$(BIN)/python -m tests.bench --record outputs/published/bench.json

bench-gpu: $(STAMP) $(BENCH_STAMP)  ## the part beside timm alone, on a machine with a GPU; writes outputs/published/bench-gpu.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[cuda13]" -c requirements.lock
	$(BIN)/python -m tests.bench --only gpu --record outputs/published/bench-gpu.json

TENSORFLOW := .venv-tensorflow/bin/python

bench-input: $(STAMP)  ## measure how fast images come in, beside tf.data: SOURCE=FOLDER of photographs; writes outputs/published/input.json
	@$(TENSORFLOW) -c '' 2>/dev/null || { $(PYTHON) -m venv --clear .venv-tensorflow && \
		$(TENSORFLOW) -m pip install --quiet --disable-pip-version-check tensorflow-cpu==2.21.0; } || rm -rf .venv-tensorflow
	$(BIN)/python -m tests.bench.input "$(SOURCE)" --record outputs/published/input.json $$(ls $(TENSORFLOW) 2>/dev/null | sed 's/^/--tensorflow /')

$(BENCH_STAMP): tests/bench/requirements.txt requirements.lock
	$(PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r $< -c requirements.lock
	@touch $@
