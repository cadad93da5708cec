# make install | demo | demo-full | test | bench | campaign | clean. Everything lives in .venv; versions come from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# the variables hold the build's own environment to the same versions (which of them is read depends on pip's age)
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
               $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE \
           $(shell find src native -name __pycache__ -prune -o -print 2>/dev/null)

.PHONY: install demo demo-full test bench campaign clean

install: .venv/installed

demo: install
	@$(BIN)/monosem run --out runs/demo
	@$(BIN)/monosem explain runs/demo
	@echo "to look at it: $(BIN)/monosem serve runs/demo"

# Every metric of the paper, and rules, effects and labelled tasks of more latents, for pages without gaps: half an hour more with
# AMX, twice that without.
demo-full: demo
	@$(BIN)/monosem eval runs/demo --suite quick
	@$(BIN)/monosem explain runs/demo --n2g 1024 --ablations 256 --tasks gao61
	@echo "to look at it: $(BIN)/monosem serve runs/demo"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest
	@PYTHON=$(BIN)/python native/tests/run

# Ours beside other libraries, which it installs in environments of their own on first use: 6 GB, and half an hour.
bench: install
	@$(BIN)/python -m benchmarks train
	@$(BIN)/python -m benchmarks harvest

# 2,000 trials of kills, damage and odd input (docs/robustness.md): half an hour on two cores, alone.
campaign: .venv/installed-dev
	PYTHONPATH=tests $(BIN)/python -m robustness --trials 2000 --out results/robustness
	$(BIN)/python experiments/tables.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: $(SOURCES) | $(BIN)/pip
	@echo "installing monosem into .venv (the first time takes a few minutes)" >&2
	@$(PIP_INSTALL) ".[viewer]"
	@touch $@

.venv/installed-dev: $(SOURCES) | $(BIN)/pip
	@echo "installing monosem[dev] into .venv (the first time takes a few minutes)" >&2
	@$(PIP_INSTALL) ".[dev]"
	@touch $@ .venv/installed

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: name a newer one, e.g. make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
