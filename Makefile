# `make demo` and `make test` are the two commands of the README; each sets up .venv first, once.
# Without make (Windows): py scripts\setup.py, then .venv\Scripts\edgelora demo.

PYTHON ?= python3
# What pip is asked for in the parity environment; torch==X.Y.Z pins it (.ci/run does).
TORCH ?= torch
DEMO_ARGS ?=
SERVE_ARGS ?=
SOAK_ARGS ?=
KILL_ARGS ?=
FUZZ_ARGS ?=
BENCH_ARGS ?=
BENCH_FOLDER ?= build/bench
PYTEST_ARGS ?=

# Test files on up to four cores at a time, each with one thread of its own.
ON_CORES := -n auto --maxprocesses 4 --dist loadfile

BIN := .venv/bin
PARITY := .venv-parity/bin
CLIENTS := .venv-clients/bin

# Material for developers (trained adapters, datasets) that some tests use where it exists.
ifneq ($(wildcard ../shared),)
export EDGELORA_SHARED ?= $(abspath ../shared)
endif

.DEFAULT_GOAL := help
.PHONY: help setup setup-parity setup-clients demo serve test test-slow test-parity test-clients soak check \
	peers bench bench-report clean picture

help: ## this list
	@grep -hE '^[a-z%-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: ## make .venv (demo, serve and dev extras, no torch)
	@$(PYTHON) scripts/setup.py --venv .venv --extras demo,dev

setup-parity: ## make .venv-parity (with torch, transformers and PEFT)
	@$(PYTHON) scripts/setup.py --venv .venv-parity --extras demo,dev,train --first "$(TORCH)"

setup-clients: ## make .venv-clients (with OpenAI's client and others, no torch)
	@$(PYTHON) scripts/setup.py --venv .venv-clients --extras demo,clients

demo: setup ## build an adapter for an example, evaluate it, show an answer before and after
	@$(BIN)/edgelora demo $(DEMO_ARGS)

serve: setup ## serve the demo's adapter as OpenAI's API, with a page to talk to it
	@test -n "$(wildcard build/demo/*.gguf)" || $(BIN)/edgelora demo $(DEMO_ARGS)
	@for adapter in build/demo/*.gguf; do set -- "$$@" --adapter "$$adapter"; done; \
	exec $(BIN)/edgelora serve --base smollm2-135m-instruct "$$@" $(SERVE_ARGS)

test: setup ## the tests: no torch, no network
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ON_CORES) $(PYTEST_ARGS)

test-slow: setup ## kills, interrupts and whole commands, many times over
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ON_CORES) $(PYTEST_ARGS)

test-parity: setup-parity ## comparisons with torch, PEFT and llama.cpp's converter
	@EDGELORA_LLAMA_CPP="$$($(PARITY)/python scripts/fetch_llama_cpp_source.py)" && \
	export EDGELORA_LLAMA_CPP && \
	OMP_NUM_THREADS=1 $(PARITY)/python -m pytest -m parity tests/parity $(ON_CORES) $(PYTEST_ARGS)

test-clients: setup-clients ## the server with clients that others wrote, the page in Chromium
	@command -v chromium >/dev/null || { echo "make test-clients needs chromium on the PATH" \
	"(Debian, Ubuntu: apt-get install chromium)" >&2; exit 1; }
	@test -f build/demo/returns.gguf || $(CLIENTS)/edgelora demo --quick
	@$(CLIENTS)/python -m pytest -m clients tests/clients $(PYTEST_ARGS)

soak: setup ## 2,000 requests to the server, 200 kills of commands, 20,000 files changed at random
	@$(BIN)/python scripts/soak.py $(SOAK_ARGS)
	@$(BIN)/python scripts/kill_test.py $(KILL_ARGS)
	@$(BIN)/python scripts/fuzz.py $(FUZZ_ARGS)

check: setup ## the gate: ruff, mypy --strict, import direction
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_architecture.py

bench: setup ## what can be measured without other material, side by side: 15 GB in BENCH_FOLDER, over an hour
	@$(BIN)/python scripts/benchmark_convert.py
	@$(BIN)/python scripts/benchmark_score.py
	@$(BIN)/python scripts/make_shape.py mistral-7b $(BENCH_FOLDER) --base q4_0 --bank 500 --peft 1 \
		--vocabulary models/catalogue/mistral-7b-v0.1.vocabulary.gguf
	@$(BIN)/python scripts/benchmark_merge.py $(BENCH_FOLDER)
	@$(BIN)/python scripts/benchmark_scale.py bank $(BENCH_FOLDER) --merge 32 500
	@$(BIN)/python scripts/benchmark_build.py $(BENCH_FOLDER)
	@$(BIN)/python scripts/bench_report.py

bench-%: setup ## run scripts/benchmark_NAME.py, e.g. make bench-merge BENCH_ARGS="--help"
	@$(BIN)/python scripts/benchmark_$*.py $(BENCH_ARGS)

peers: setup ## build llama-server, llama-bench and llama-batched-bench to compare with, once
	@$(BIN)/python scripts/build_peers.py

bench-report: setup ## write the tables of docs/ from results/*.jsonl
	@$(BIN)/python scripts/bench_report.py

picture: setup ## docs/build.svg from a real build
	@$(BIN)/python scripts/terminal_picture.py

clean: ## remove environments, builds and caches
	rm -rf .venv .venv-parity .venv-clients build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
