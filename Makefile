# Every target sets up what it needs in .venv; `make help` lists them.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := .venv/.installed
DEMO_DATA := .venv/.demo-data
# Of its own: the libraries in it want older packages than constraints.txt has.
INTEGRATIONS := .venv-integrations
OFFLINE := { echo 'pip could not install it, see above (is there a network?)'; exit 1; }
BUILT_FROM := pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')

.PHONY: help venv demo test soak integrations lint bench clean

help:
	@echo 'make demo     train H2Rec and what it is compared with on MovieLens-100k, and write a report'
	@echo 'make test     run the tests                      (ARGS="-k name" goes to pytest)'
	@echo 'make soak     kill commands at random moments and look whether they go on (a quarter of an hour)'
	@echo 'make integrations   run the tests with models of other libraries, in $(INTEGRATIONS)'
	@echo 'make lint     check style and formatting'
	@echo 'make bench    run the benchmarks                 (ARGS="..." goes to pytest)'
	@echo 'make venv     only make .venv: pinned dependencies and the editable build'
	@echo 'make clean    remove what builds and tests leave behind; .venv stays'
	@echo 'PYTHON=python3.12 make ... makes .venv with another Python (remove .venv first)'

venv: $(INSTALLED)

demo: $(INSTALLED) $(DEMO_DATA)
	$(BIN)/h2rec demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest tests $(ARGS)

soak: $(INSTALLED)
	$(BIN)/python -m pytest tests/soak -s $(ARGS)

integrations: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks $(ARGS)

lint: $(BIN)/ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	@echo '== making .venv with $(PYTHON)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "h2rec needs Python 3.10 or newer, got " + sys.version)'
	@$(PYTHON) -m venv .venv

$(BIN)/ruff: constraints.txt | $(BIN)/python
	@echo '== installing ruff'
	@$(PIP_INSTALL) ruff || $(OFFLINE)
	@touch $@

$(INSTALLED): $(BUILT_FROM) | $(BIN)/python
	@echo '== installing the pinned dependencies (PyTorch is large: this takes minutes the first time)'
	@$(PIP_INSTALL) setuptools ninja pybind11 torch || $(OFFLINE)
	@echo '== building h2rec in place, and installing what it needs to train and to be tested'
	@rm -f h2rec/*.so
	@$(PIP_INSTALL) --no-build-isolation --editable '.[train,text,test,lint]' || $(OFFLINE)
	@$(BIN)/python -c 'import h2rec; h2rec.show_config()' | grep '^extension'
	@touch $@

$(INTEGRATIONS)/.installed: pyproject.toml constraints.txt | $(INSTALLED)
	@echo '== making $(INTEGRATIONS): PyTorch, transformers, RePlay, RecTools, RecBole (minutes the first time)'
	@$(PYTHON) -m venv $(INTEGRATIONS)
	@$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  setuptools ninja pybind11 $$(grep '^torch==' constraints.txt) || $(OFFLINE)
	@H2REC_BUILD_EXT=0 $(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --editable '.[integrations]' || $(OFFLINE)
	@touch $@

$(DEMO_DATA): constraints.txt | $(INSTALLED)
	@echo '== installing recbole without its dependencies: only the MovieLens-100k files in it are used'
	@$(PIP_INSTALL) --no-deps recbole || { \
	  echo 'MovieLens-100k could not be fetched (is there a network?).'; \
	  echo 'To train on interactions of your own instead: $(BIN)/h2rec train --help'; exit 1; }
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find h2rec kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f h2rec/*.so $(INSTALLED)
