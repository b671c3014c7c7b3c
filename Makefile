# make try    new pictures of a pipeline that ships with smalti, in seconds
# make demo   train a generator on the embedded pictures and show what it makes
# make test   every test, slow ones too
# make lint   style;   make types   type checks
# make docs   the documentation site, in build/site; a dead link fails it
# make bench  speed beside peers and beside the limits of the machine, as a table of ratios
# make bench-gpu   checks and the same table on a GPU, 6 minutes at most, into bench-gpu.md; uses the
#             Python of .venv if there is one, else PYTHON, and installs nothing
# make fault-campaign   kills, full disks, flipped bits and edited recipes, 20 minutes at most
#
# Each other needs Python 3.11 or newer and nothing else: what it uses is installed into .venv, once.
# make demo ARGS=--quick and make test ARGS="-k hub" pass options on; make test WORKERS=8 runs eight
# test files at once, each on one core.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := data tokenizer prior pipelines training evaluation scripts

.PHONY: try demo test lint types docs bench bench-gpu fault-campaign layout clean

try: $(VENV)/.installed-demo
	$(BIN)/python examples/new_pictures.py $(ARGS)

demo: $(VENV)/.installed-demo
	$(BIN)/smalti demo $(ARGS)

test: $(VENV)/.installed-test
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test layout
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-test layout
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/bench_gpu.py $(ARGS)

fault-campaign: $(VENV)/.installed-demo
	$(BIN)/python tools/fault_campaign.py $(ARGS)

# The packages lie at the root but are imported as smalti.*: the type checker and the reference pages
# see a copy laid out so.
layout:
	rm -rf build/types && mkdir -p build/types
	cp -r src/smalti build/types/smalti
	cp -r $(PACKAGES) build/types/smalti/

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "smalti needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
		exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "Python's venv module is missing: install it (on Debian, apt install python3-venv)"; \
		exit 1; }
	@touch $@

$(VENV)/.installed-demo: pyproject.toml $(VENV)/.created
	@echo "Installing smalti and what it needs into $(VENV): once, a few minutes."
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.created
	@echo "Installing smalti and what its tests need into $(VENV): once, a few minutes."
	$(BIN)/python -m pip install --quiet --editable '.[test,eval]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
