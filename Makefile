# make run [CONFIG=configs/row_lstm.py] [ARGS='--workdir=DIR --config.train.steps=100 ...']
# make test, make check, make setup

CONFIG ?= configs/row_lstm.py
ARGS ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup run test check format clean

setup: $(VENV)/installed

run: setup
	$(BIN)/python launch.py --config $(CONFIG) $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

# Lint, format and types.
check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python %d.%d found; 3.11 to 3.13 needed: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)

# Each stamp is made anew when what it installs from has changed.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
