# Everything here runs in .venv, which the first call makes. `make help` tells what there is.

# Another Python than the first new enough one:  make train PYTHON=/path/to/python3
PYTHON ?=
# Another build of torch than pip's default (on Linux: CUDA), from PyTorch's own index, at the first install:  make train TORCH=cpu
TORCH ?=
# More for the command itself:  make train ARGS='seed=1 device=cpu'  ·  make test ARGS='tests/replay -x'
ARGS ?=

VENV := .venv
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

.PHONY: help train test lint format bench tensorboard constraints clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'
	@sed -n 's/^# \(.*\):  \(make .*\)/  \1: \2/p' Makefile

train: $(VENV)/.installed ## install, then train one network on eight Atari games for a few minutes
	$(VENV)/bin/mtrl train env=atari_pack experiment=quickstart $(ARGS)

test: $(VENV)/.installed-dev ## install what tests need, then run them all
	$(VENV)/bin/python -m pytest -q --numprocesses auto --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev ## ruff (lint and format), mypy and import-linter; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

format: $(VENV)/.installed-dev ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed-bench ## speed against stable-baselines3 and the machine's limit, cost of weightings, memory, start-up times (40 minutes)
	$(VENV)/bin/python scripts/bench.py $(ARGS)

tensorboard: $(VENV)/.installed ## look at the runs in runs/ with a browser
	$(VENV)/bin/tensorboard --logdir runs $(ARGS)

constraints: ## pin anew: the newest releases that pyproject.toml admits
	scripts/constraints.sh > constraints.new
	mv constraints.new constraints.txt

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One file per set of packages says that it is installed, as pyproject.toml and constraints.txt are now.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[all,lint,test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[all,bench]'
	@touch $(VENV)/.installed $@

$(VENV)/bin/python:
	@set -- python3 python3.13 python3.12 python3.11 python3.14 python; \
	if [ -n "$(PYTHON)" ]; then set -- "$(PYTHON)"; fi; \
	for python in "$$@"; do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			echo "Making $(VENV) with $$python ($$("$$python" --version))"; \
			"$$python" -m venv --clear $(VENV) && exit 0; \
			rm -rf $(VENV); exit 1; \
		fi; \
	done; \
	echo "mtrl needs Python 3.11 or newer; tried: $$*. Install one, or name yours: make train PYTHON=/path/to/python3" >&2; exit 1
