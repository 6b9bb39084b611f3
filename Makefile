# Two commands are all a newcomer needs:  make demo   and   make test.
# Each sets up .venv with pip first; an interrupted set-up is completed by the same command.
# `make help` lists all targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEVSTAMP := $(VENV)/.installed-dev
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint docs docs-serve wheel clean help
.NOTPARALLEL:

demo: $(STAMP)  ## distil the shipped Fashion-MNIST teacher and show the result: a few minutes
	$(BIN)/python -m fewstep demo

test: $(DEVSTAMP)  ## run all tests
	$(PYTEST) --durations 25

test-fast: $(DEVSTAMP)  ## run the tests not marked slow, for work in progress: under two minutes
	$(PYTEST) -m "not slow" --durations 10

lint: $(DEVSTAMP)  ## check style, format, imports and Markdown, as CI does besides the tests
	$(BIN)/ruff check fewstep tests examples tools benchmarks
	$(BIN)/ruff format --check fewstep tests examples tools benchmarks
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python tools/check_markdown.py

docs: $(DEVSTAMP)  ## build the documentation site into site/, strictly: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(DEVSTAMP)  ## show the documentation site on http://localhost:8000 while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

wheel: $(DEVSTAMP)  ## build the wheel, install it in a new environment and run the demo there, shortened
	sh tools/try_wheel.sh $(VENV) demo

clean:  ## remove the set-up and what packaging left
	rm -rf $(VENV) build dist site *.egg-info

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r a b; do printf '%-16s %s\n' "$$a" "$$b"; done

$(STAMP): pyproject.toml constraints.txt
	@sh tools/set_up.sh $(PYTHON) $(VENV) .
	@touch $@

$(DEVSTAMP): pyproject.toml constraints.txt
	@sh tools/set_up.sh $(PYTHON) $(VENV) '.[dev]'
	@touch $@ $(STAMP)
