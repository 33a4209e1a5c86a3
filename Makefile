# `make demo` and `make test` need only Python (3.10 or later) and make: they set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test prove lint chat clean

demo: $(VENV)/installed
	$(BIN)/rlchat demo

chat: $(VENV)/installed
	$(BIN)/rlchat chat

test: export OMP_NUM_THREADS ?= 1  # two test processes on two cores
test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest -n 2

# The long proofs, whose figures the README quotes. Two nodes need root, for network namespaces, and iproute2.
prove: export OMP_NUM_THREADS ?= 1
prove: export PYTHONPATH := $(CURDIR):$(CURDIR)/tests
prove: $(VENV)/installed-dev
	$(BIN)/python -m prove.many_processes
	$(BIN)/python -m prove.two_nodes
	$(BIN)/python -m prove.stop_signals
	$(BIN)/python -m prove.kill_and_resume --kills 20
	$(BIN)/python -m prove.kill_and_resume --kills 20 --ranks 2

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A file as a stamp: pip runs again when pyproject.toml has changed, and a broken install leaves no stamp.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
