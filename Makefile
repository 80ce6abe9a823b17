# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PEERS := $(VENV)/installed-peers

.PHONY: demo test test-peers lint bench bench-peers wheel readme clean

demo: $(INSTALLED)
	$(BIN)/crqat-fx demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --durations=10

# what is tested in another tool, which `make test` does not install
test-peers: $(PEERS)
	$(BIN)/python -m pytest tests/test_openvino.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict crqat_fx passes

# every benchmark, one tiny round each with QUICK=--quick; the ablation takes hours, and is asked for by its own name or tried quickly
MEASURES = $(wildcard benchmarks/bench_*.py) $(if $(QUICK),benchmarks/ablation.py)
bench: $(INSTALLED)
	set -e; for each in $(MEASURES); do echo "== $$each"; $(BIN)/python $$each $(QUICK); done

# the same questions asked of other tools
bench-peers: $(PEERS)
	set -e; for each in benchmarks/peers_*.py; do echo "== $$each"; $(BIN)/python $$each $(QUICK); done

# builds the wheel, imports it from another directory, and runs an exported file where it is installed without torch
wheel: $(INSTALLED)
	$(BIN)/python .ci/wheel.py

# runs the code blocks of the README and of the pages in docs/
readme: $(INSTALLED)
	$(BIN)/python .ci/readme.py README.md docs/*.md

# torch first, by exact version and on its own: a range would pull in builds for accelerators that are not there
$(INSTALLED): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info
