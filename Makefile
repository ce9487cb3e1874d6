# All targets run in .venv, which the first call creates. `make help` lists the targets.

# Another Python than the first suitable one:  make train PYTHON=/path/to/python3
PYTHON ?=
# Another build of torch than pip's default (on Linux: CUDA), from PyTorch's index, at the first installation:  make train TORCH=cpu
TORCH ?=
# Additional arguments:  make train ARGS='seed=1 device=cpu'  ·  make test ARGS='tests/replay -x'
ARGS ?=

VENV := .venv
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

.PHONY: help train test lint format bench tensorboard constraints clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'
	@sed -n 's/^# \(.*\):  \(make .*\)/  \1: \2/p' Makefile

train: $(VENV)/.installed ## install, then train one network on eight Atari games for a few minutes
	$(VENV)/bin/mtrl train env=atari_pack experiment=quickstart $(ARGS)

test: $(VENV)/.installed-dev ## install the test dependencies, then run all tests
	$(VENV)/bin/python -m pytest -q --numprocesses auto --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev ## run ruff (lint and format), mypy and import-linter without changing files
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

format: $(VENV)/.installed-dev ## fix and format with ruff
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed-bench ## measure all performance targets: speed, memory, startup times (40 minutes)
	$(VENV)/bin/python scripts/bench.py $(ARGS)

tensorboard: $(VENV)/.installed ## start TensorBoard for runs/
	$(VENV)/bin/tensorboard --logdir runs $(ARGS)

constraints: ## update the pins to the newest releases that pyproject.toml allows
	scripts/constraints.sh > constraints.new
	mv constraints.new constraints.txt

clean: ## remove .venv and caches, but not runs/
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A file per set of packages marks the set as installed with the current pyproject.toml and constraints.txt.
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
			echo "Creating $(VENV) with $$python ($$("$$python" --version))"; \
			"$$python" -m venv --clear $(VENV) && exit 0; \
			rm -rf $(VENV); exit 1; \
		fi; \
	done; \
	echo "mtrl needs Python 3.11 or newer; tried: $$*. Install one, or use make train PYTHON=/path/to/python3" >&2; exit 1
