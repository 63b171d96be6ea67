# Every target installs what it needs into .venv first, once: a stamp in .venv says what is there.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first Python of a supported version that really starts (a version manager's shim may exist and still refuse).
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# gpu where an NVIDIA driver answers, else cpu; `make install BUILD=cpu` to choose.
BUILD ?= $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)

VENV := .venv
PY := $(VENV)/bin/python
# pip prints lines for each of 107 packages; `make install QUIET=` shows them, with the progress of downloads.
QUIET ?= --quiet
PIP := $(PY) -m pip --disable-pip-version-check install $(QUIET)
RUNTIME := $(VENV)/.runtime-$(BUILD)
EDITABLE := $(VENV)/.medlit
TOOLS := $(VENV)/.tools
KERNEL := $(VENV)/.kernel
CHECKED := src tests $(wildcard benchmarks docs scripts)

##@ Start here
.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: quickstart
quickstart: install ## Fine-tune the bundled 135M Llama, test it, compare it with baselines
	@$(PY) scripts/quickstart.py

.PHONY: test
test: lint types unit ## Check style and types, run the tests

##@ Environment
.PHONY: install
install: $(EDITABLE) ## Install medlit and its packages into .venv (CUDA builds if there is a GPU)

.PHONY: dev
dev: install $(TOOLS) ## Install the development tools too

.PHONY: doctor
doctor: install ## Check this machine and name remedies
	$(VENV)/bin/medlit doctor

# PLATFORM and FOR are the other machine's: make bundle PLATFORM=cuda FOR=3.12 CONFIGS="configs/llama31_8b.yaml"
PLATFORM ?= cpu
FOR ?=
$(if $(filter-out cpu cuda gpu,$(PLATFORM)),$(error PLATFORM is cpu or cuda, not $(PLATFORM)))
CONFIGS ?=
BUNDLE = PYTHONPATH=src $(PY) scripts/bundle.py --build $(if $(filter cuda gpu,$(PLATFORM)),gpu,cpu) \
  $(addprefix --python ,$(FOR)) $(addprefix --config ,$(CONFIGS))
.PHONY: bundle
bundle: $(VENV)/.made ## Collect in dist/ what an offline machine needs (PLATFORM=cpu|cuda FOR=3.11|3.12)
	$(BUNDLE) $(ARGS)

.PHONY: bundle-test
bundle-test: $(VENV)/.made ## Make a bundle, install it offline and train two steps
	rm -rf dist/test
	$(BUNDLE) --output dist/test
	$(PY) tests/scripts/bundle_offline.py dist/test/medlit-*

.PHONY: clean
clean: ## Remove .venv and tool caches; runs and downloaded weights stay
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Develop
.PHONY: lint
lint: dev ## Check style, format (ruff) and the layers of imports (import-linter)
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/ruff format --check $(CHECKED)
	$(VENV)/bin/lint-imports --no-cache

.PHONY: types
types: dev ## Check types (mypy, strict)
	$(VENV)/bin/mypy

.PHONY: unit
unit: dev ## Run the tests, but not the slow and GPU ones (ARGS="-m slow" to choose)
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/pytest -n auto --maxprocesses 4 --dist worksteal --disable-warnings $(ARGS)

.PHONY: notebook
notebook: dev $(KERNEL) ## Run examples/medlit.ipynb from top to bottom, and check its results
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/pytest -m slow tests/test_notebook.py

.PHONY: faults
faults: dev ## Kill a small fit fifty times; the result must not change (ARGS="--kills 500" for more)
	$(PY) tests/faults/harness.py $(ARGS)

.PHONY: format
format: dev ## Format the code
	$(VENV)/bin/ruff check --fix $(CHECKED)
	$(VENV)/bin/ruff format $(CHECKED)

.PHONY: docs
docs: install ## Regenerate docs/settings.md from the help texts
	$(PY) docs/generate_settings.py

.PHONY: tensorboard
tensorboard: install ## Show all runs in TensorBoard
	$(VENV)/bin/tensorboard --logdir logs

# ---- what the targets above stand on ----

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "medlit needs Python 3.11 or 3.12 and found neither: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "medlit needs Python 3.11 or 3.12 and $(PYTHON) is another version or does not start: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "$(PYTHON) cannot make virtual environments: install its venv package, for example python3.11-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME): $(VENV)/.made requirements/base.txt requirements/$(BUILD).txt requirements/serve.txt
	@echo "Installing PyTorch and the other packages ($(BUILD)) into $(VENV): 0.6 GB, with CUDA 2.7; about 3 minutes, once."
	@$(PIP) --constraint requirements/base.txt $$(grep -E '^torch(vision)?==' requirements/$(BUILD).txt)
	@$(PIP) --no-deps --requirement requirements/$(BUILD).txt --requirement requirements/serve.txt
	@rm -f $(VENV)/.runtime-* && touch $@

$(EDITABLE): $(RUNTIME) pyproject.toml
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(TOOLS): $(RUNTIME) requirements/dev.txt
	@echo "Installing the development tools into $(VENV): a minute, once."
	@$(PIP) --no-deps --requirement requirements/dev.txt
	@touch $@

$(KERNEL): $(TOOLS) requirements/notebook.txt
	@echo "Installing a Jupyter kernel into $(VENV): half a minute, once."
	@$(PIP) --no-deps --requirement requirements/notebook.txt
	@touch $@
