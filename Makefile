# Needs only GNU make, Python 3.10 or newer and, for the C++ kernels, a C++ compiler.
# Whatever else is needed goes into .venv, at the versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More arguments for the command behind a target: make test ARGS="-k gaussian"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test bench lint format clean

help:
	@echo "make train    train a VAE on the digits data set; results go to runs/digits"
	@echo "make test     run the tests"
	@echo "make bench    time the kernels against plain PyTorch on this machine"
	@echo "make lint     check style and formatting"
	@echo "make format   fix style and formatting"
	@echo "make clean    delete what the other targets made, $(VENV) included; keeps runs/"
	@echo
	@echo "PYTHON=python3.12 chooses the Python that makes $(VENV); ARGS=... is passed on."

train: $(STAMP)
	$(BIN)/vae-fast train --out runs/digits $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check . $(ARGS)
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix . $(ARGS)
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info vae_fast/_lib .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no '$(PYTHON)' here; name a Python: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: Python 3.10 or newer is needed, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1); choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "Making $(VENV) with $$($(PYTHON) --version 2>&1)"; rm -rf $(VENV); \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "make: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv;" \
	      "or choose another Python: make PYTHON=..." >&2; exit 1; }; }
	@echo "Installing the package and its tools into $(VENV); the first time this takes minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
