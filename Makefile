# `make bench` and `make test` set up .venv when it is missing or out of date, then run.

# The first Python on the PATH that is 3.11 to 3.13; PYTHON=/path/to/python selects another.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)

# Tests run in parallel, except on a machine with a GPU, which they would share.
PARALLEL := $(shell nvidia-smi >/dev/null 2>&1 || echo --numprocesses auto --maxprocesses 4 --dist worksteal)

# GPU tests share the GPU: 8 processes fit its memory, and compile kernels on 16 cores. A test that
# hangs ends its process, which xdist replaces.
GPU_WORKERS ?= 8
ON_GPU := -m pytest --ignore=tests/bench/peers --timeout 60 --timeout-method thread

.DEFAULT_GOAL := help
.PHONY: bench test quick test-gpu gate lint setup clean help

bench: .venv/.ready  ## check and time every op, answer a question end to end; writes a page to report/
	@.venv/bin/python -m bench --report report

test: .venv/.ready  ## run the tests
	@.venv/bin/python -m pytest $(PARALLEL)

quick: .venv/.ready  ## run the fast tests, in a minute: no Triton interpreter, subprocesses, transformers or timm
	@.venv/bin/python -m pytest $(PARALLEL) -m "not (gpu or interpreter or cli or judge)"

test-gpu: .venv/.ready  ## run the GPU tests in parallel, without those of peers
	@echo "test-gpu: $(GPU_WORKERS) processes (GPU_WORKERS=...), then one for tests that may hang the GPU or time it"
	@.venv/bin/python $(ON_GPU) -m "gpu and not slow_gpu" --numprocesses $(GPU_WORKERS) --dist worksteal; \
	status=$$?; .venv/bin/python $(ON_GPU) -m "gpu and slow_gpu" --numprocesses 1 || status=1; exit $$status

gate: .venv/.ready  ## compare kernels, speed-ups and tables with what is committed
	@.venv/bin/python -m profiles static --quick
	@.venv/bin/python -m bench gate
	@.venv/bin/python -m profiles tables

lint: .venv/.ready  ## check style, formatting and types
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check .
	@.venv/bin/mypy --no-error-summary

setup: .venv/.ready  ## only set up .venv
	@echo "setup: .venv is ready"

clean:  ## remove .venv and everything else that was created here
	rm -rf .venv build report *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*##/make \1\t/p' Makefile | expand -t 14

.venv/.ready: setup.py Makefile .ci/environment.py
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.11 to 3.13 on the PATH; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) .ci/environment.py
	@touch $@
