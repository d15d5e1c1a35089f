# make run [CONFIG=configs/row_lstm.py] [ARGS='--workdir=DIR --config.train.steps=100 ...']
# make evaluate [WORKDIR=runs/row_lstm/...]
# make test, make check, make setup

CONFIG ?= configs/row_lstm.py
ARGS ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

WORKDIR ?= pretrained/row_lstm

.PHONY: setup run evaluate test check bench results format pretrained clean

setup: $(VENV)/installed

run: setup
	$(BIN)/python launch.py --config $(CONFIG) $(ARGS)

# The model that ships with the repository, or the run in WORKDIR.
evaluate: setup
	$(BIN)/python launch.py --mode=evaluate --workdir $(WORKDIR) --allow_other_data $(ARGS)

# Trains the shipped model anew; SEQMNIST_DATA_DIR must name MNIST.
pretrained: setup
	$(BIN)/python -m pretrained.make

# A file's tests stay with one worker, so that what they share is made once.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile --durations=10 $(ARGS)

# RESULTS.md and docs/bakeoff.md, from the summaries under results/; the plot needs matplotlib.
results: $(VENV)/installed
	@{ cat results/introduction.md; $(BIN)/python launch.py --mode=table --workdirs results \
	  --csv results/table.csv --published results/published.csv; } > RESULTS.md
	@$(BIN)/python -m benchmarks.bakeoff

# All measurements against other libraries, into runs/bench and docs/: hours on two cores with FULL=--full.
bench: $(VENV)/installed-bench
	@mkdir -p runs/bench docs
	$(BIN)/python -m benchmarks.recurrence --json=runs/bench/recurrence.json $(FULL)
	$(BIN)/python -m benchmarks.plot --json=runs/bench/recurrence.json
	$(BIN)/python -m benchmarks.scaling --folder=runs/bench
	$(BIN)/python -m benchmarks.end_to_end --json=runs/bench/end_to_end.json
	$(BIN)/python -m benchmarks.replicas --json=runs/bench/replicas.json
	$(BIN)/python -m benchmarks.time_to_accuracy --json=runs/bench/time_to_accuracy.json
	$(BIN)/python -m benchmarks.unroll --json=runs/bench/unroll.json

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

# A stamp, because an interrupted venv leaves a python without pip.
$(VENV)/made:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python %d.%d found; 3.11 to 3.13 needed: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Each stamp is made anew when what it installs from has changed.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/made
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	$(BIN)/python -m seqmnist_jax.rnn.native
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench,parity]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# Injects faults, hundreds of each kind, and prints what came of them: about an hour.
.PHONY: faults
faults: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults --full $(ARGS)

# The kernels of 30 cells on 500 random shapes under each of GCC's sanitizers: address with undefined behaviour, thread.
.PHONY: sanitize
sanitize: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults.native $(ARGS)
