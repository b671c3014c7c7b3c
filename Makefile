# make demo   train a generator on the embedded pictures and show what it makes
# make test   lint, types and every test, slow ones too
#
# Both need Python 3.11 or newer, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := data tokenizer prior pipelines training evaluation scripts

.PHONY: demo test lint types clean

demo: $(VENV)/.installed-demo
	$(BIN)/smalti demo

test: $(VENV)/.installed-test lint types
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The packages lie at the root but are imported as smalti.*: the checker sees a copy laid out so.
types: $(VENV)/.installed-test
	rm -rf build/types && mkdir -p build/types
	cp -r smalti build/types/smalti
	cp -r $(PACKAGES) build/types/smalti/
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "smalti needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,eval]'
	touch $@

clean:
	rm -rf $(VENV) .types build *.egg-info
