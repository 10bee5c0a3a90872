# make demo        show forgetting and its cure on a tiny model, and print the table
# make real        the same on a real model, SmolLM2-135M-Instruct, in some 50 CPU minutes: figures, and answers side by side (DATA=folder with
#                  gsm8k_train.jsonl and gsm8k_test.jsonl; without it they come from the Hugging Face hub)
# make test        run all tests
# make test-fast   run all tests but those marked slow
# make lint        run ruff
# make campaign    attack the commands with drawn inputs; SEED=7 MINUTES=30 (or CASES=500) say which and how many. Faults stay in
#                  runs/campaign; the table in CONTRIBUTING.md is made anew
# make docs-check  fail if a README's table differs from the newest benchmark records (python -m benchmarks.plot renews them)
# make env         only make the environment, .venv; the targets above make it if need be
# make vllm        on a machine with an NVIDIA GPU: add vLLM's CUDA build (on a CPU, vLLM is part of the environment)
# make gpu         on a machine with a GPU: test and time the kernels, compile and capture a training step; under nine minutes; writes a
#                  JSON and a page. ARGS="--parts rivals" (or sizes, context) measures more. Uses .venv if there is one, else python3.
# make fake-gpu    run training steps on a GPU that does everything but the arithmetic, and print launches and host time; in an environment
#                  of its own, .venv-fake-gpu (5 GB); says so in one line where it cannot
# Another Python: make test PYTHON=/path/to/python3.12

SHELL := /bin/bash
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet install

# Two workers of one thread each: right for two cores, since the suite is many small tests, not large matmuls. A file's tests share a worker,
# and with it the file's fixtures; tests/conftest.py starts the longest files first.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

.PHONY: demo real test test-fast env lint docs-check campaign gpu fake-gpu vllm

demo: env
	@$(RUN) -m benchmarks.forgetting.miniature.demo

real: env
	@$(PIP) --no-deps -r requirements-real.txt
	@$(RUN) -m benchmarks.forgetting.real_model.demo $(if $(DATA),--data "$(DATA)")

test: env
	@$(PYTEST) --durations=25

test-fast: env
	@$(PYTEST) -m "not slow"

gpu:
	@"$(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),$(or $(wildcard $(RUN)),python3))" -m benchmarks.gpu $(ARGS)

fake-gpu:
	@PYTHON="$(PYTHON)" tests/fake_gpu/run.sh $(ARGS)

# vLLM on a GPU is some gigabytes more, which only synthesis needs. On a CPU it is part of the environment.
vllm: env
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.version.cuda)'; then $(PIP) --no-deps -r requirements-synth-cuda.txt; \
	  else echo "torch here is a CPU build: its vLLM is installed already"; fi

lint: env
	@$(RUN) -m ruff check .

campaign: env
	@OMP_NUM_THREADS=1 $(RUN) -m tests.campaign --seed $(or $(SEED),0) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(CASES),--cases $(CASES)) \
	  --page CONTRIBUTING.md

docs-check: env
	@$(RUN) -m benchmarks.plot --check

env: .venv/installed

# Torch alone is resolved by pip, inside the pins: which build it is, and which CUDA packages come with it, depends on the machine.
# Everything else is installed exactly as listed. A CUDA build of torch brings its own Triton, a CPU build none.
.venv/installed: requirements.txt requirements-dev.txt requirements-cpu.txt requirements-cuda.txt \
  requirements-synth.txt requirements-synth-cpu.txt
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { echo "Steadfast needs Python 3.11, 3.12 or 3.13; found" \
	  "'$(PYTHON)' ($$("$(PYTHON)" --version 2>&1)); name one: make $(or $(MAKECMDGOALS),env) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing the pinned packages into .venv (once; a few minutes)"
	@"$(PYTHON)" -m venv .venv
	@$(PIP) -c requirements.txt -c requirements-cuda.txt "$$(grep '^torch==' requirements.txt)"
	@$(PIP) --no-deps -r requirements.txt -r requirements-dev.txt -r requirements-synth.txt
	@$(RUN) -c 'import sys, torch; sys.exit(not torch.version.cuda)' || $(PIP) --no-deps -r requirements-cpu.txt -r requirements-synth-cpu.txt
	@touch $@
