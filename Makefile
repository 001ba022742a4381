# Everything from an empty clone, with only Python >= 3.11 (pip, venv) and make.
PYTHON ?= python3
BIN = .venv/bin
# Options of torchx and of the job: make train ARGS="-- --recipe paper"
# A rank for each GPU that may be used; two without any.
GPUS = $(shell if [ -n "$${CUDA_VISIBLE_DEVICES+set}" ]; then echo "$$CUDA_VISIBLE_DEVICES" | tr ',' '\n'; \
	else nvidia-smi -L 2>/dev/null | grep '^GPU '; fi | grep -c '^[^-]')
RANKS ?= 1x$(patsubst 0,2,$(GPUS))
ARGS ?=
# A worker per core. The tests of a file stay together, as they share what their fixtures have made.
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 30

.PHONY: help setup train test newest faults mutants gpu-check lint sbom clean

help:  ## say what there is (the default)
	@echo "make setup   prepare .venv: CUDA builds where nvidia-smi answers, CPU builds elsewhere"
	@echo "make train   set up, then train through TorchX, a rank per GPU, two without (RANKS=1x4, ARGS=\"-- --help\")"
	@echo "make test    set up, then run all tests in parallel (ARGS=\"-k model\")"
	@echo "make newest  the tests with the newest TorchRec and FBGEMM, in an environment of their own (ARGS=\"tests/model\")"
	@echo "make faults  set up, then the long fault campaign: kills, signals, full disks (half an hour)"
	@echo "make mutants break the code in many places, one after the other: do the tests see each? (some ten minutes)"
	@echo "make gpu-check  all that only a machine with a GPU can show, in one report (exit code 2 without a GPU)"
	@echo "make lint    set up, then ruff, mypy and hadolint, as .ci/run and pre-commit run them"
	@echo "make sbom    licences.md and sbom.json (CycloneDX) of ENVIRONMENT, by default .venv, in build/sbom"
	@echo "make clean   remove .venv and what the tools left"

setup:
	@$(PYTHON) .ci/setup.py

train: setup
	$(BIN)/torchx run apps/deepfm.py -j $(RANKS) $(ARGS)

test: setup
	$(PYTEST) $(ARGS)

newest: BIN = .venv-newest/bin
newest:
	@NEWEST=1 $(PYTHON) .ci/setup.py
	$(PYTEST) $(ARGS)

faults: setup
	$(PYTEST) -m campaign
	$(BIN)/python -W ignore -m tests.faults.campaign $(ARGS)

mutants: setup
	$(BIN)/python -m tests.support.mutants $(ARGS)

gpu-check: setup
	$(BIN)/python -m benchmarks.training.gpu_check $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile Dockerfile.torchx

# The tools stand beside the environment that they describe, or they would be in it. An image without them:
# make sbom ENVIRONMENT=/opt/torchrec_deepfm/.venv
ENVIRONMENT ?= .venv
sbom:
	$(PYTHON) -m venv build/sbom/tools
	build/sbom/tools/bin/pip install -q pip-licenses cyclonedx-bom
	build/sbom/tools/bin/pip-licenses --python $(ENVIRONMENT)/bin/python --with-urls --format markdown \
		--output-file build/sbom/licences.md
	build/sbom/tools/bin/cyclonedx-py environment --pyproject pyproject.toml -o build/sbom/sbom.json $(ENVIRONMENT)/bin/python

clean:
	rm -rf .venv .venv-newest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
