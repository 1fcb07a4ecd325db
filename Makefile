# Everything runs in .venv; a stamp per set of extras makes the second run start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-others torch-alone floor nightly lowest newest lint docs tutorials figures package release-check extras install clean

demo: $(VENV)/.align
	$(BIN)/cloob demo $(ARGS)

# A file's tests stay in one process, so that what they share is made once.
TOGETHER := -n auto --dist loadfile

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER) -m "not nightly" $(ARGS)

# The objective, ranks included, where nothing but torch is installed.
ALONE := tests/functional tests/test_auditor.py tests/test_objective_tracing.py tests/test_distributed.py
torch-alone: $(VENV)/.dev
	$(BIN)/python tests/torch_alone.py $(VENV)/torch-alone
	PYTHONPATH=src OMP_NUM_THREADS=1 $(VENV)/torch-alone/bin/python -m pytest -p no:cacheprovider -m "not nightly" \
	  -W "ignore:Failed to initialize NumPy:UserWarning" $(ALONE) tests/test_objective.py $(ARGS)

# What torch-alone does not run; both together are all default tests.
test-others: $(VENV)/.dev
	$(MAKE) test ARGS="$(ALONE:%=--ignore %) $(ARGS)"

# The objective, ranks included, with the lowest torch; tracing (compile, export) needs a later one.
floor: $(VENV)/.dev
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-floor
	$(BIN)/uv pip install --quiet --python .venv-floor/bin/python "torch==2.6.*" numpy --group test
	PYTHONPATH=src OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -n auto -p no:cacheprovider -m "not nightly" \
	  tests/functional tests/test_objective.py tests/test_distributed.py $(ARGS)

nightly: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER) --timeout 1800 --hypothesis-profile nightly $(ARGS)

# The suite with the lowest versions that pyproject.toml allows. Old packages warn of what newer ones have changed, and
# torch 2.10 of its own ways: graphs that are checkpointed, a profiler that begins anew.
lowest: $(VENV)/.dev
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --all-extras --group dev --output-file .venv-lowest.txt pyproject.toml
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --requirements .venv-lowest.txt
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(TOGETHER) -m "not nightly" -W default::DeprecationWarning \
	  -W "ignore:remat_using_tags:UserWarning" -W "ignore:Warning:UserWarning:torch.profiler.profiler" $(ARGS)

# The core of the suite with another Python, and data workers by each way of starting them: make newest NEWEST=3.14
NEWEST ?= 3.13
CORE := tests/functional tests/data tests/models tests/training tests/commands $(wildcard tests/test_*.py)
WORKERS := tests/data/test_data_loader.py tests/training/test_train_loop.py tests/training/test_train_faults.py
newest: $(VENV)/.dev
	$(BIN)/uv venv --quiet --clear --python $(NEWEST) .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest/bin/python --editable ".[align]" --group test
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(TOGETHER) -m "not nightly" $(CORE) $(ARGS)
	for method in spawn forkserver; do \
	  OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n auto -m "not nightly" --start-method $$method $(WORKERS) || exit 1; \
	done

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/docs.
docs: $(VENV)/.dev
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs build/docs

# What the tutorials print and draw, run anew on their pages; it takes minutes.
tutorials: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_docs.py -k tutorials --update-golden

# The numbers and the drawings of the pages, from the records.
figures: $(VENV)/.dev
	$(BIN)/python -m benchmarks.figures

# Wheel and sdist in dist/, looked at and tried out. WHOLE=--whole installs all from the index and runs the demo.
WHOLE ?=
package: $(VENV)/.dev
	$(BIN)/python tests/package_check.py dist $(VENV)/package $(WHOLE)

# All that a machine can check of a release, and what is left for a person.
release-check: lint docs package
	@$(BIN)/python tests/release_check.py

# The wheel of `make package` with each extra alone, in environments of their own, on Python 3.11 to 3.13 as far as here.
extras: $(VENV)/.dev
	$(BIN)/python tests/extras.py dist/*.whl $(VENV)/extras

install: $(VENV)/.dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "cloob needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Say which: make PYTHON=python3.12 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"  # knows groups

$(VENV)/.align: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV); the first time takes some minutes …"
	$(BIN)/python -m pip install --quiet --editable ".[align,serve]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[all]" --group dev  # a third of it is ever imported
	@touch $@ $(VENV)/.align

clean:
	rm -rf $(VENV) .venv-* build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
