# Everything on a fresh machine: `make demo` and `make test` build .venv themselves and reuse it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export VLLM_CPU_KVCACHE_SPACE ?= 1
# The rollouts of the tests are tiny: do not spin threads against each other, and ask no hub.
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: setup demo test test-fast lint bench clean

setup: $(VENV)/.ready

# pip, twice: torch with what it needs; then the pins alone, since vLLM's own metadata asks for CUDA builds of
# torch's relatives that break it here.
$(VENV)/.ready: tests/requirements-cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vllm_compat needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch 2.13.0 and vLLM 0.32.0 for the CPU into $(VENV) (about two minutes)"
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-cpu.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation ./tests/vllm_metadata -e .
	touch $@

demo: setup
	$(RUN) examples/v0_parity/demo.py

test: setup lint
	$(RUN) -m pytest tests

test-fast: setup
	$(RUN) -m pytest tests -m "not live"

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: setup
	$(RUN) benchmarks/import_time.py
	$(RUN) benchmarks/throughput.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
