# Everything runs in .venv, which `setup` makes. Nothing but Python 3.11 or 3.12, make and pip is needed.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all lint bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python examples/spoken_digits/demo.py

# Two parts side by side, for two cores: those with a cluster and a few that take long, and the rest.
BESIDE := tests/cluster tests/unit/adapters $(addprefix tests/properties/test_,matrix.py bit_identity.py world_sizes.py \
	audio_runs.py augmented_runs.py kill_while_saving.py faults.py seq2seq_runs.py experts.py \
	patch_runs.py flow_runs.py pair_runs.py grpo_runs.py dpo_runs.py sharded_load.py experts_move.py gradients.py)

test: setup
	@$(BIN)/python -m pytest -m 'not slow and not gpu' $(BESIDE) > cluster-tests.log 2>&1 & \
	cluster=$$!; rest=0; \
	$(BIN)/python -m pytest -m 'not slow and not gpu' $(BESIDE:%=--ignore=%) || rest=$$?; \
	wait $$cluster; cluster=$$?; cat cluster-tests.log; rm -f cluster-tests.log; \
	test $$cluster = 0 -a $$rest = 0

# All of them, slow ones too; PART=failures: one part (tests/support/parts.py names them).
test-all: setup
	$(BIN)/python -m pytest $(if $(PART),--part=$(PART))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

bench: setup
	for name in padding plan shuffle ingest overhead resume restart chaos strategies moe clips scale shapes index; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) build site *.egg-info
