# Everything on a fresh machine: `make demo` and `make test` build .venv themselves and reuse it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export VLLM_CPU_KVCACHE_SPACE ?= 1
# The rollouts of the tests are tiny: do not spin threads against each other, and ask no hub.
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

# Two tests at a time, on one thread each: starting an engine is work for one core, and a tiny model is no more.
WORKERS ?= 2
TESTED := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(RUN) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: setup demo test test-fast lint bench sources matrix releases evidence rl-parity rl-parity-smoke integrations gpu-reference clean

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
	$(TESTED) tests

test-fast: setup
	$(TESTED) tests -m "not live"

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: setup
	$(RUN) benchmarks/import_time.py
	$(RUN) benchmarks/start_cost.py
	$(RUN) benchmarks/throughput.py
	$(RUN) benchmarks/lm_head.py
	$(RUN) benchmarks/weight_update.py
	$(RUN) benchmarks/weight_transports.py
	$(RUN) benchmarks/prefix_caching.py

# What did a release move? VERSION=<version|wheel|folder>; WRITE=1 keeps it; DIFF=<version> prints the changed bodies.
sources: setup
	@test -n "$(VERSION)" || { echo 'make sources VERSION=0.34.0 (or a path to a wheel)'; exit 2; }
	$(RUN) tests/releases/sources.py $(VERSION) $(if $(WRITE),--write) $(if $(DIFF),--diff $(DIFF))

# One real engine after another, each in an environment of its own: VERSIONS="0.18.1 0.26.0", or the standard list.
matrix: setup
	$(RUN) tests/releases/matrix.py $(VERSIONS)

# Each family's small model against V0, on each release; what is found goes into profiles/*.toml. FAMILIES="gemma2 phi3",
# VERSIONS="0.18.1", DTYPE=bfloat16, RECORD=1 makes the references again, ENGINES=<folder of environments>.
evidence: setup
	$(RUN) tests/families/evidence.py $(FAMILIES) $(if $(VERSIONS),--versions $(VERSIONS)) $(if $(DTYPE),--dtype $(DTYPE)) \
		$(if $(RECORD),--record) $(if $(ENGINES),--folder $(ENGINES))

# The tables in README.md and docs/releases.md, from the data of the two above.
releases: setup
	$(RUN) tests/releases/documents.py

# The proof in training (docs/rl_parity.md): all arms, seeds and algorithms, resumed; WORKLOADS="gspo", MINUTES=60,
# ENGINES=<folder of environments>. The budget is an hour for each algorithm on two cores, environments not counted.
rl-parity: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r examples/rl_parity/requirements.txt
	$(RUN) examples/rl_parity/study.py $(if $(WORKLOADS),--workloads $(WORKLOADS)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(ENGINES),--engines $(ENGINES))
	$(RUN) examples/rl_parity/figures.py

rl-parity-smoke: setup
	$(RUN) examples/rl_parity/smoke.py

# Other people's trainers without and with vllm_compat (docs/integrations/): CLIENTS="trl_colocate openai_client", or all.
integrations: setup
	$(RUN) examples/integrations/run.py $(CLIENTS)

# The reference run on a card (docs/gpu_reference.md), with the vLLM that RUN's Python has: RUN=python3 for your own
# environment; ARGS="--device cpu" rehearses it. Exit code 3: the same command goes on.
gpu-reference:
	$(RUN) -m vllm_compat gpu-reference $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
