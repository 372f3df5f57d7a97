# Everything happens in .venv; nothing depends on what the machine has but Python 3.10 to 3.13 and make.
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
	@# torch first and by its exact version: a looser requirement could fetch gigabytes of another build.
	$(PIP) $(shell grep -h '^torch==' constraints.txt)
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## merge the lab's experts on a local Ray, verify, ask, and print the retention table
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest tests

test-ceph: $(STAMP)  ## the store contract against a real Ceph object gateway (needs root to install it: Debian packages)
	command -v radosgw >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends ceph-mon ceph-osd radosgw ceph-common; }
	$(BIN)/python -m pytest tests/manifests/stores/test_stores.py -k ceph

azurite: $(STAMP)  ## put the Azure emulator where the tests find it (needs npm)
	npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3

swift: $(STAMP)  ## put OpenStack Swift, with its S3 face, where the tests find it (an environment of its own)
	$(PYTHON) -m venv $(VENV)/swift
	$(VENV)/swift/bin/python -m pip install --quiet --disable-pip-version-check swift==2.38.3

check: $(STAMP)  ## ruff, formatting, and mypy on a plain install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/check_types.py

SHAPE ?= 1.1b

bench: $(STAMP) $(PEERS)/.installed  ## measure builds beside mergekit, kernels, whole-matrix methods, and start-up: docs/benchmarks.md, build/bench.json
	$(BIN)/python benchmarks/bench_start.py
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_matrix.py
	$(BIN)/python benchmarks/bench_build.py --shape $(SHAPE) --peers $(PEERS)

bench-peers: $(STAMP) $(PEERS)/.installed  ## run the same YAML with mergekit, in an environment of its own, and compare: docs/peer-equality.md
	$(BIN)/python benchmarks/peer_equality.py --mergekit $(PEERS)/bin/mergekit-yaml --table docs/peer-equality.md

$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(shell grep -h '^torch==' constraints.txt)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mergekit==0.1.5
	@touch $@

lab: $(STAMP)  ## train the lab's base, experts and LoRA twins again from nothing (CPU, or a GPU if there is one; LAB_SIZE=large: larger ones, for a GPU)
	$(BIN)/python examples/lab/train.py

reproduce: $(STAMP)  ## measure the papers' tables on the lab's experts: docs/reproduction.md, docs/reproduction.json
	OMP_NUM_THREADS=1 PYTHONPATH=examples $(BIN)/python examples/reproduce.py $(REPRODUCE)

format: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets made
	rm -rf build $(VENV) $(PEERS) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
