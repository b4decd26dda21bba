# Every target makes .venv and installs what it needs, when needed; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --constraint constraints.txt
N ?= 5

.DEFAULT_GOAL := help
.PHONY: help setup check machines lint demo dashboard history browser test clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: .venv/.installed  ## .venv, with everything of pyproject.toml at the versions of constraints.txt

# The CPU build of torch is not on PyPI: it comes from where pip is told to look, or else from PyTorch's index.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --no-deps torch || $(INSTALL) --no-deps --index-url https://download.pytorch.org/whl/cpu torch
	$(INSTALL) --editable '.[torch,jax,triton,conformance,benchmarks,demo,dev]'
	touch $@

# One OpenMP thread per process: there are as many workers as cores.
check: setup  ## the gate over all built-in implementations: verdicts here and in report/ (five to six minutes)
	OMP_NUM_THREADS=1 $(BIN)/gaugeblock check --report report

machines: setup  ## the gate on pretended CPUs (older instructions, more threads): the same verdicts on all? (a quarter of an hour)
	$(BIN)/gaugeblock machines --variants --report machines

lint: setup  ## ruff, mypy, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: setup  ## train tiny models on digits and text, in PyTorch and in JAX, and sample in every way (an hour): demo/*.png
	OMP_NUM_THREADS=2 $(BIN)/python demo/train_digits.py
	OMP_NUM_THREADS=2 $(BIN)/python demo/sample_digits.py --train
	OMP_NUM_THREADS=2 $(BIN)/python demo/train_stable.py
	OMP_NUM_THREADS=2 $(BIN)/python demo/train_text.py
	OMP_NUM_THREADS=2 $(BIN)/python demo/sample_text.py
	OMP_NUM_THREADS=2 $(BIN)/python demo/train_moe_lm.py
	OMP_NUM_THREADS=2 $(BIN)/python demo/train_cycle.py

dashboard: setup  ## measure this commit, and a page of all commits' results that needs no internet: .asv/html (six minutes)
	$(BIN)/gaugeblock bench --asv benchmarks/results; \
	status=$$?; $(BIN)/python benchmarks/dashboard/publish.py && exit $$status

history: setup  ## measure the last N=5 commits that changed an operation, but for times, and publish (a minute or two each)
	$(BIN)/gaugeblock bench --asv benchmarks/results --history $(N)
	$(BIN)/python benchmarks/dashboard/publish.py

# tests/test_dashboard.py looks at the dashboard in Chromium; npm brings the dashboard's scripts. Both are Debian packages; where
# they cannot be had, those tests say so and are skipped.
browser:
	-@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	-@command -v npm >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends npm; }

test: browser  ## the linters, the gate over all that is built in, and all tests (half an hour)
	$(MAKE) --jobs 2 lint check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

clean:  ## remove .venv, reports and caches
	rm -rf .venv report machines build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
