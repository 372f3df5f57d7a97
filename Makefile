# Everything is installed into .venv. The machine needs Python 3.10 to 3.13 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PEERS := .venv-peers
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help demo test test-ceph azurite swift check bench bench-peers lab reproduce format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP):
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"mmerge needs Python 3.10 to 3.13, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	@# torch first and pinned: a looser requirement may resolve to a CUDA build of several gigabytes.
	$(PIP) $(shell grep -h '^torch==' constraints.txt)
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## merge the lab's experts on a local Ray, verify, and print the retention table
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## run the tests (PYTEST="-m 'not ray'" for other options of pytest)
	$(BIN)/python -m pytest tests $(PYTEST)

test-ceph: $(STAMP)  ## run the store contract against a Ceph object gateway (installs Debian packages as root)
	command -v radosgw >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends ceph-mon ceph-osd radosgw ceph-common; }
	$(BIN)/python -m pytest tests/manifests/stores/test_stores.py -k ceph

azurite: $(STAMP)  ## install the Azure emulator for the tests (needs npm)
	npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3

swift: $(STAMP)  ## install OpenStack Swift with its S3 API for the tests, in a separate environment
	$(PYTHON) -m venv $(VENV)/swift
	$(VENV)/swift/bin/python -m pip install --quiet --disable-pip-version-check swift==2.38.3

check: $(STAMP)  ## ruff, formatting, and mypy on a plain install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/check_types.py

SHAPE ?= 1.1b

bench: $(STAMP) $(PEERS)/.installed  ## measure builds (beside mergekit), kernels, whole-matrix methods and start-up: build/bench.json
	$(BIN)/python benchmarks/bench_start.py
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_matrix.py
	$(BIN)/python benchmarks/bench_build.py --shape $(SHAPE) --peers $(PEERS)

bench-peers: $(STAMP) $(PEERS)/.installed  ## run the same YAML with mergekit and compare the weights: docs/peer-equality.md
	$(BIN)/python benchmarks/peer_equality.py --mergekit $(PEERS)/bin/mergekit-yaml --table docs/peer-equality.md

$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(shell grep -h '^torch==' constraints.txt)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mergekit==0.1.5
	@touch $@

lab: $(STAMP)  ## retrain the lab's base, experts and LoRA twins (LAB_SIZE=large: larger ones, for a GPU)
	$(BIN)/python examples/lab/train.py

reproduce: $(STAMP)  ## measure the papers' tables on the lab's experts: docs/reproduction.md and .json
	OMP_NUM_THREADS=1 PYTHONPATH=examples $(BIN)/python examples/reproduce.py $(REPRODUCE)

format: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything the targets create
	rm -rf build $(VENV) $(PEERS) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
