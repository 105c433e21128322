# make demo   sets up .venv and runs the walk-through (needs Python 3.11 or newer and PyPI)
# make test   sets up .venv and runs everything that CI runs
#
# Variables: PYTHON=python3.12   the interpreter of a new .venv
#            EXTRAS=dev          a suite without torch: the parity tests are then skipped
#            PYTEST_ARGS='-k lora'
#            JOBS=2            test processes, of up to 5 GB each (compiling is most of the time)

VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= convert,video,volumes,dicom,coco,tfds,dev
PYTEST_ARGS ?=
JOBS ?= 2

# Asks each candidate for its version, because a name on the PATH may be a launcher of nothing.
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
endif

# What the tests compare with. The second list is installed without dependencies, which would bring
# CUDA, and built beside the PyTorch that is there: what they need is in the first list or there.
REFERENCE_NEEDS := peft hydra-core iopath scikit-image scikit-learn setuptools
REFERENCE := torchvision segment-anything sam2 monai medpy galore-torch loralib
# Bytecode is compiled when a module is first used, which is sooner done than for all of them.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check \
	-c constraints.txt
comma := ,
TEST_STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
DEMO_STAMP := $(VENV)/.installed-demo
TYPED := samjax $(if $(findstring convert,$(EXTRAS)),convert)

.PHONY: demo test lint format lock clean

demo: $(DEMO_STAMP)
	$(BIN)/python -m experiments.demo --out runs/demo

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python $(TYPED)

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolves constraints.txt anew; PYTHON311 and PYTHON312 may name the two interpreters.
lock:
	$(or $(PYTHON311),python3.11) .ci/lock.py $(or $(PYTHON311),python3.11) $(or $(PYTHON312),python3.12)

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "samjax needs Python 3.11 or newer, and none is on the PATH." \
			"Name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit( \
		"samjax needs Python 3.11 or newer, and $(PYTHON) is " + ".".join(map(str, v)))'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@echo "Installing into $(VENV): a few minutes, the first time only."

# A stamp that is older than these two files means: install again.
$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[convert]"
	touch $@

$(TEST_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[$(EXTRAS)]"
ifneq (,$(findstring convert,$(EXTRAS)))
	$(PIP_INSTALL) $(REFERENCE_NEEDS)
	SAM2_BUILD_CUDA=0 $(PIP_INSTALL) --no-deps --no-build-isolation $(REFERENCE)
endif
	touch $@
