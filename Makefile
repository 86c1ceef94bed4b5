# Needs only GNU make, Python 3.10 or newer and, for the C++ kernels, a C++ compiler.
# Whatever else is needed goes into .venv, at the versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More arguments for the command behind a target: make test ARGS="-k gaussian"
ARGS ?=
# Random calls of make fuzz
FUZZ ?= 20000

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test fuzz sanitize matrix bench lint format clean

help:
	@echo "make train    train a VAE on the digits data set; results go to runs/digits"
	@echo "make test     run the tests"
	@echo "make fuzz     20 000 random calls, new ones each time; some minutes. FUZZ=3000: so many"
	@echo "make sanitize the C++ kernels under AddressSanitizer and UBSan, for each instruction set;"
	@echo "              some 30 minutes. ARGS=avx2: one of base, avx2 and avx512"
	@echo "make matrix   the tests with other versions of torch and Triton, without Triton, without a"
	@echo "              compiler; an hour and a half, and 25 GB in .matrix/. ARGS=torch-2.12.1: one of them"
	@echo "make bench    time the kernels against plain PyTorch on this machine"
	@echo "make lint     check style and formatting"
	@echo "make format   fix style and formatting"
	@echo "make clean    delete what the other targets made, $(VENV) included; keeps runs/"
	@echo
	@echo "PYTHON=python3.12 chooses the Python that makes $(VENV); ARGS=... is passed on."

train: $(STAMP)
	$(BIN)/vae-fast train --out runs/digits $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

fuzz: $(STAMP)
	VAE_FAST_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/test_fuzz.py $(ARGS)

sanitize: $(STAMP)
	$(BIN)/python tests/sanitize.py $(ARGS)

matrix: $(STAMP)
	$(BIN)/python tests/matrix.py $(ARGS)

bench: $(STAMP)
	@mkdir -p .benchmarks; rm -f .benchmarks/last.json
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=.benchmarks/last.json $(ARGS)
	$(BIN)/python -m benchmarks.report .benchmarks/last.json

lint: $(STAMP)
	$(BIN)/ruff check . $(ARGS)
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix . $(ARGS)
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .matrix build dist *.egg-info vae_fast/_lib .pytest_cache .ruff_cache .benchmarks
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
