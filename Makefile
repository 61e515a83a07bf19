# `make demo` and `make test` do everything on a fresh machine with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=

.PHONY: demo demo-dense test test-distributed test-gpu test-lowest lint bench-overhead bench-communication bench-training
.PHONY: bench-format bench-inference scaling-docs clean
.PHONY: bench-quality-tiny bench-quality-small bench-quality-gpu quality-report

demo: $(VENV)/.demo  ## train a sparse English-German translator from nothing
	$(BIN)/accelerate launch --num_processes 1 scripts/translate.py recipes/translation/demo.yaml $(DEMO_ARGS)

demo-dense: $(VENV)/.demo  ## the same steps without GaP: the figure that the demo is compared with
	$(BIN)/accelerate launch --num_processes 1 scripts/translate.py recipes/translation/demo-dense.yaml $(DEMO_ARGS)

test: $(VENV)/.test  ## everything but benchmarks; needs no network and no GPU
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

test-distributed: $(VENV)/.test  ## of these, the ones on one, two and four gloo processes
	$(BIN)/python -m pytest tests/distributed tests/test_ddp.py $(PYTEST_ARGS)

test-gpu: $(VENV)/.test  ## on a machine with a CUDA GPU: those with models on it, and those that need one
	GAP_HF_TEST_DEVICE=cuda CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest tests/test_resume.py tests/test_trainer.py \
	  tests/test_methods.py tests/test_masks.py tests/test_patterns.py tests/test_inference.py $(PYTEST_ARGS)

test-lowest: .venv-lowest/.test  ## the same tests at the lower bounds of pyproject.toml
	.venv-lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench-overhead: $(VENV)/.bench  ## cost of a GaPTrainer step against Trainer's: paired, interleaved
	$(BIN)/python benchmarks/overhead.py

bench-training: $(VENV)/.bench  ## optimizer state, memory and step time with live_state, beside Trainer
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sparse_step.py

bench-communication: $(VENV)/.bench  ## bytes and time of DDP with live gradients alone, and its cost model
	$(BIN)/python benchmarks/communication.py

bench-format: $(VENV)/.bench  ## bytes, load time and memory of the packed form, beside the dense file and zstd
	$(BIN)/python benchmarks/format.py

bench-inference: $(VENV)/.bench  ## sparse layers against the best dense fp32 of torch and ONNX Runtime, on this CPU
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/output_layer.py
	$(BIN)/python benchmarks/live_weights.py

scaling-docs: $(VENV)/.bench  ## the numbers in docs/scaling.md, from what was recorded
	$(BIN)/python benchmarks/communication.py --table --into docs/scaling.md

QUALITY := $(BIN)/python benchmarks/quality
QUALITY_DATA := benchmarks/quality/data/small/train.tsv
QUALITY_ARGS ?=
TIER ?= tiny

bench-quality-tiny: $(VENV)/.bench  ## every method on the demo's model: hours of two CPU cores; the same call goes on
	$(QUALITY)/run.py benchmarks/quality/tiers/tiny.yaml $(QUALITY_ARGS)

bench-quality-small: $(VENV)/.bench $(QUALITY_DATA)  ## fewer methods on a larger model and corpus
	$(QUALITY)/run.py benchmarks/quality/tiers/small.yaml $(QUALITY_ARGS)

bench-quality-gpu: $(VENV)/.bench $(QUALITY_DATA)  ## transformer-base on one GPU
	$(QUALITY)/run.py benchmarks/quality/tiers/gpu.yaml $(QUALITY_ARGS)

quality-report: $(VENV)/.bench  ## tables and plots of a tier in docs/quality: make quality-report TIER=small
	$(QUALITY)/report.py benchmarks/quality/tiers/$(TIER).yaml

$(QUALITY_DATA): | $(VENV)/.bench
	$(BIN)/python benchmarks/quality/build_small.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[translation]'
	touch $@

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[bench]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

.venv-lowest/.test: pyproject.toml tools/lowest.py
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tools/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install -q -c .venv-lowest/constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest runs
