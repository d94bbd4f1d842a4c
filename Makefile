# Two commands do all the set-up, each from a bare clone:
#   make quickstart   the whole flow, in minutes
#   make check        format, lint, types, fast tests
# Variables: PYTHON=python3.12 (another interpreter), VENV=DIR, EXTRAS="hf postgres",
# TORCH=auto|pip|URL (see tools/setup.py), JOBS=2 (test processes), ARGS=... (for quickstart).

PYTHON ?=
VENV ?= .venv
EXTRAS ?=
TORCH ?=
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

# The first Python that is new enough and can make a virtual environment; one that has made it
# already stays.
CANDIDATES := $(or $(PYTHON),$(wildcard $(BIN)/python) python3 python3.13 python3.12 python3.11)
WANTED := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
define set-up
@for python in $(CANDIDATES) ""; do \
  if [ -n "$$python" ] && "$$python" -c '$(WANTED)' >/dev/null 2>&1; then break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "set-up: no Python >= 3.11 with venv among: $(CANDIDATES). Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11" >&2; \
  exit 1; \
fi; \
"$$python" tools/setup.py --venv "$(VENV)" $(if $(TORCH),--torch "$(TORCH)") $(addprefix --extra ,$(1) $(EXTRAS))
endef

.PHONY: help quickstart check check-slow setup dev format lint types test

help:
	@sed -n '1,5p' Makefile; echo "Also: make check-slow, setup, dev, format, lint, types, test."

quickstart: setup
	$(BIN)/mutransfer quickstart $(ARGS)

check: lint types test

check-slow: dev
	$(PYTEST) -m slow

setup:
	$(call set-up,)

dev:
	$(call set-up,dev notebooks hf postgres)

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: dev
	$(BIN)/mypy

test: dev
	$(PYTEST) -m "not slow" -n $(JOBS)
