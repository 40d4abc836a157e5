# From a fresh clone, with Python 3.11 or newer and make: `make report`.

PRESET ?= small
SEED ?=
ONLY ?=
GROUP ?= a
PYTHON ?= python3

BIN := .venv/bin
# Touched when everything in requirements.txt is installed; newer requirements install again.
READY := .venv/.ready
# Two workers with one thread each are quicker than one with two.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: help report test test-all lab bench study soak publish handin

help:  ## this list
	@echo "make <target>, where <target> is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

report: $(READY)  ## execute and render the notebooks: PRESET=small (or smoke, medium, large), SEED=1
	@$(BIN)/python -m helpers.report --preset "$(PRESET)" $(if $(SEED),--seed "$(SEED)")

test: $(READY)  ## check the style and run all but the slow tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(PYTEST) -m "not slow"

test-all: $(READY)  ## check the style and run all tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(PYTEST)

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --ServerApp.root_dir=. notebooks/01_data_exploration.ipynb

bench: $(READY)  ## measure training steps on an idle machine: under ten minutes
	@$(BIN)/python -m helpers.report.bench

study: $(READY)  ## train what is missing of a group in notebooks/runs/study.yaml: GROUP=a
	@$(BIN)/python -m helpers.study "$(GROUP)"

soak: $(READY)  ## kill a run a hundred times: are its bits those of an undisturbed one?
	@$(BIN)/python tests/soak.py

publish: $(READY)  ## store the notebooks' outputs (ONLY="01 02": of some) and the README's table
	@$(BIN)/python -m helpers.report --publish $(ONLY)

handin: $(READY)  ## make handin/: the PDF and one self-contained notebook
	@$(BIN)/python -m helpers.report --handin

$(READY): requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing requirements.txt into .venv (PyTorch is large: this takes some minutes)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it if it is not python3: PYTHON=python3.12."; \
	    exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
