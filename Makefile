# Two commands for a fresh machine with Python 3.11 or 3.12: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

TRITON_OF_GPU_MACHINES := 3.6.0

.PHONY: demo test slow check docs install clean

demo: $(VENV)/installed
	$(BIN)/multiexit demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto

# storms, fuzzing, sanitizers, every kernel for every GPU under both versions of triton
slow: $(VENV)/installed-test $(VENV)/triton-$(TRITON_OF_GPU_MACHINES)
	$(BIN)/python -m pytest -n auto -m slow
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-$(TRITON_OF_GPU_MACHINES) $(BIN)/python -m pytest -n auto -m slow tests/kernels/test_compiles.py

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed-test
	$(BIN)/python -m typer multiexit_engine.cli utils docs --name multiexit --output docs/cli.md

install: $(VENV)/installed-test

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/cpu/*)
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.12 ...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/triton-%: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

clean:
	rm -rf $(VENV) build dist *.egg-info
