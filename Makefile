# make test | make demo [SUITE=glyphs|real]: both create .venv and install by themselves.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.stamp

.PHONY: help test lint types layers unit notebooks demo clean
help:
	@echo "make demo [SUITE=glyphs|real]   fine-tune, merge, correct, sweep, report"
	@echo "make test                       lint, types, import layers, tests, notebooks"

$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
