# Two commands are all a newcomer needs:  make demo   and   make test.
# Each sets up .venv with pip. `make lint` runs what CI checks besides the tests.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEVSTAMP := $(VENV)/.installed-dev

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/fewstep demo

test: $(DEVSTAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --durations 25

lint: $(DEVSTAMP)
	$(BIN)/ruff check fewstep tests examples tools
	$(BIN)/ruff format --check fewstep tests examples tools
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(DEVSTAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
