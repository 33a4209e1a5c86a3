# `make demo` and `make test` need only Python (3.10 or later) and make: they set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test prove against_trl lint chat clean

demo: $(VENV)/installed
	$(BIN)/rlchat demo

chat: $(VENV)/installed
	$(BIN)/rlchat chat

test: export OMP_NUM_THREADS ?= 1  # two test processes on two cores
test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest -n 2

# The long proofs, whose figures the README quotes: an hour and more of two cores. Two nodes need root, for network
# namespaces, and iproute2.
prove: export OMP_NUM_THREADS ?= 1
prove: export PYTHONPATH := $(CURDIR):$(CURDIR)/tests
prove: $(VENV)/installed-dev
	$(BIN)/python -m prove.many_processes
	$(BIN)/python -m prove.two_nodes
	$(BIN)/python -m prove.stop_signals
	$(BIN)/python -m prove.kill_and_resume --kills 20
	$(BIN)/python -m prove.kill_and_resume --kills 20 --ranks 2
	$(BIN)/python -m prove.kill_and_resume --kills 3 --epochs 6 --ranks 2 --strategy fsdp2
	$(MAKE) against_trl

# PPO beside that of TRL 1.12, in one environment in which both run.
CURVES := benchmarks/.against_trl
against_trl: export OMP_NUM_THREADS ?= 1  # seconds of one thread can be compared on a machine that does other work too
against_trl: .venv-trl/installed
	.venv-trl/bin/python benchmarks/against_trl/same_replies.py
	set -e; for run in T-0 T-1 T-2 T-3 T-4 S-0 S-1 S-2 S-3; do \
	  args="--size $${run%-*} --seed $${run#*-}"; \
	  .venv-trl/bin/python benchmarks/against_trl/trl_side.py $$args --out $(CURVES)/trl-$$run.json; \
	  for critic in separate shared; do .venv-trl/bin/python benchmarks/against_trl/rlchat_side.py \
	    --critic $$critic $$args --out $(CURVES)/$$critic-$$run.json; done; done
	.venv-trl/bin/python benchmarks/against_trl/compare.py $(CURVES)

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

.venv-trl/installed: pyproject.toml
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --disable-pip-version-check -q -e . trl==1.12.0 accelerate==1.15.0
	touch $@

clean:
	rm -rf $(VENV) .venv-trl .mypy_cache .ruff_cache .pytest_cache .hypothesis
