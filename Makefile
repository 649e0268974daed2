# Every target makes .venv itself when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PRESET ?= mini
MODEL ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install figures test test-fast test-long lab bench scale train checksums lint

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; call make PYTHON=/path/to/python3.11.")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $(STAMP)

install: $(STAMP) ## make .venv with the tested versions

figures: $(STAMP) ## run the notebooks on mini-flux (or MODEL=flux-dev) and fill figures/preview (ARGS="--tier full": figures/paper)
	$(RUN) -m malib.figures $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: $(STAMP) ## all tests that CI runs
	$(RUN) -m pytest -m "not long and not browser" $(ARGS)

test-fast: $(STAMP) ## exactness of every edit, one contract per architecture: at most three minutes
	$(RUN) -m pytest -m "not slow and not long and not browser" $(ARGS)

test-long: $(STAMP) ## tests that do not fit into CI
	$(RUN) -m pytest -m "long or browser" $(ARGS)

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab --notebook-dir=notebooks $(ARGS)

bench: $(STAMP) ## what recording costs, side by side with plain generation
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[bench]" -c constraints.txt
	$(RUN) -m tests.benchmarks.bench --readme README.md $(ARGS)

scale: $(STAMP) ## the same at FLUX.1-dev's true width, random weights: minutes on a CPU, better on a GPU
	$(RUN) -m tests.benchmarks.scale --readme README.md $(ARGS)

train: $(STAMP) ## train a bundled model: make train PRESET=tiny
	$(RUN) -m malib.miniflux.train --preset $(PRESET) $(ARGS)

checksums: ## write data/SHA256SUMS anew, after a file in data/ has changed on purpose
	cd data && find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs sha256sum > SHA256SUMS

lint: $(STAMP) ## ruff: lint and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
