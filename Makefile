# `make train` and `make test` are all that a fresh clone needs: they make .venv, install into it and do their job.
# Any other interpreter than the one found: `make train PYTHON=/path/to/python3.12`.

BIN := .venv/bin
WORKERS ?= auto
# The oldest jax that setup.cfg allows; the floor's tests run with it.
FLOOR := $(shell sed -n 's/^ *jax>=\([0-9.]*\).*/\1/p' setup.cfg)
# What leans on jax's own workings: every mechanism, kernels in their interpreters, a model on a mesh. The ops' own
# tests ask about arithmetic, which the mechanisms' ask again here.
CORE := tests/pallas_kernels tests/attention/modules/test_decoder.py \
  $(addprefix tests/attention/test_,$(addsuffix .py,variants flash explicit kernels linear_kernels context_parallel))
# Long tests stand last: who is idle takes them over.
PYTEST := -m pytest -q -n $(WORKERS) --maxprocesses=8 --dist=worksteal

.PHONY: help train test test-floor compile-check lint format clean

help:
	@echo 'make train        train a small language model; more flags by ARGS="--steps=10"'
	@echo 'make test         every test; one part of them by ARGS="tests/attention"'
	@echo 'make test-floor   the core tests with jax $(FLOOR), the oldest that is supported'
	@echo 'make compile-check  what compilers for absent chips say; ARGS="--chips=v5e --shapes=7b_4k --check"'
	@echo 'make lint         ruff, its formatter, pyrefly and the architecture'
	@echo 'make format       let ruff rewrite what it can'
	@echo 'make clean        remove the environments, the caches and what the build left'

train: .venv/.installed
	$(BIN)/python -m experiments.train $(ARGS)

test: .venv/.installed
	$(BIN)/python $(PYTEST) $(ARGS)

test-floor: .venv-floor/.installed
	.venv-floor/bin/python $(PYTEST) -m "not slow" $(wildcard $(CORE)) $(ARGS)

compile-check: .venv-aot/.installed
	.venv-aot/bin/python -m experiments.compile_check $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-floor .venv-aot build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interpreter qualifies when it runs (a version manager's shim may exist and fail), is new enough and has venv.
QUALIFY := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
define NO_PYTHON
Python 3.12 or newer, with venv, is needed and was not found: install it from your package manager or https://www.python.org/downloads, or name one by PYTHON=/path/to/python3.12.
endef

.venv-floor/.installed: PINS := 'jax==$(FLOOR)'
# Compilers for chips that are absent: two gigabytes, one of them proprietary, so never in .venv.
.venv-aot/.installed: EXTRAS := aot,experiments,test
EXTRAS := experiments,test

# The stamp keeps what was installed from, so that a touched but equal file asks for no network.
.venv/.installed .venv-floor/.installed .venv-aot/.installed: setup.cfg pyproject.toml
	@if cat $^ | cmp -s - $@ && $(@D)/bin/python $(QUALIFY); then touch $@; exit; fi; \
	if ! $(@D)/bin/python $(QUALIFY); then \
	  for python in "$(PYTHON)" python3 python3.12 python3.13 python3.14 ''; do \
	    [ -n "$$python" ] && "$$python" $(QUALIFY) && break; \
	  done; \
	  if [ -z "$$python" ]; then echo '$(NO_PYTHON)' >&2; exit 1; fi; \
	  echo "Making $(@D) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(@D) || exit 1; \
	fi; \
	echo 'Installing into $(@D); the first time takes a few minutes'; \
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[$(EXTRAS)]' && \
	  cat $^ > $@
