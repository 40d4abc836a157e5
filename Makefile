# From a fresh clone, with Python 3.11 or newer and make: `make report`.

PRESET ?= quick
SEED ?= 0
ONLY ?=
PYTHON ?= python3

BIN := .venv/bin
# Touched when everything in requirements.txt is installed; newer requirements install again.
READY := .venv/.ready

.PHONY: help report test lab publish bench study soak handin

help:  ## this list
	@echo "make <target>, where <target> is one of"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

report: $(READY)  ## execute and render the report: PRESET=quick (or smoke, full), SEED=0
	@$(BIN)/python -m helpers.report --preset $(PRESET) --seed $(SEED)

test: $(READY)  ## check the style and run all tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest

handin: $(READY)  ## the zip to be handed in: the PDF and one notebook that needs nothing else
	@$(BIN)/python -m helpers.handin

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --ServerApp.root_dir=. notebooks/01_data_exploration.ipynb

bench: $(READY)  ## measure blocks and steps on an idle machine: fifty minutes
	@$(BIN)/python -m helpers.bench

study: $(READY)  ## does a matter? the runs that are missing, on held-out images: ONLY=ladder for some
	@$(BIN)/python -m helpers.study $(if $(ONLY),--only $(ONLY))

soak: $(READY)  ## kill a run a hundred times: are its bits those of an undisturbed one?
	@$(BIN)/python tests/soak.py

publish: $(READY)  ## execute the notebooks and store their outputs in them: ONLY="01 02" for some
	@$(BIN)/python -m helpers.report --publish $(if $(ONLY),--only $(ONLY))

$(READY): requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing requirements.txt into .venv (PyTorch is large: this takes some minutes)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it if it is not python3: PYTHON=python3.12."; \
	    exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
