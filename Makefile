# Every target first makes sure that the environment in .venv is complete; that takes a moment when it is.
#   make setup | demo | test | test-slow | lint | format | bench | docs       make test ARGS="-k mapper -x"
# Variables: PYTHON (interpreter that makes .venv), VENV (its folder), TORCH (what pip installs as torch), ARGS.

SHELL := /bin/bash
VENV ?= .venv
PY := $(VENV)/bin/python
# pytest stops the whole run with an error after this many seconds.
TEST_SECONDS ?= 590
WORKERS ?= 2
# The first Python that is new enough and can make environments; 3.11 is the version that is tested.
FIND_PYTHON = for p in python3.11 python3 python3.12 python3.13 python3.10; do \
	if "$$p" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then echo "$$p"; break; fi; done
PYTHON ?= $(shell $(FIND_PYTHON))

export TORCH

.PHONY: setup demo test test-slow lint format bench docs

setup:
	@if [ -z "$(PYTHON)" ]; then echo "No Python 3.10 or newer with venv found: install Python 3.11, or set PYTHON." >&2; exit 1; fi
	@"$(PYTHON)" tools/setup_environment.py --venv "$(VENV)"

demo: setup
	"$(PY)" tools/demo.py $(ARGS)

# One thread per test process: the two processes keep two cores busy.
test: setup
	OMP_NUM_THREADS=1 "$(PY)" -m pytest -n $(WORKERS) --session-timeout $(TEST_SECONDS) $(ARGS)

test-slow: setup
	OMP_NUM_THREADS=1 "$(PY)" -m pytest -n $(WORKERS) -m slow $(ARGS)

lint: setup
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy

format: setup
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .
	"$(PY)" tools/config_page.py

bench: setup
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; "$(PY)" "$$script" $(ARGS); done

# The site goes to site/; what builds it has an environment of its own.
docs:
	@test -x .venv-docs/bin/mkdocs || { "$(PYTHON)" -m venv .venv-docs && eval .venv-docs/bin/pip install -q \
		$$(sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr ',' ' '); }
	.venv-docs/bin/mkdocs build --strict
